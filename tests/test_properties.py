"""Random small networks against the oracle: blocks drawn in any order, any of them masked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import masksurgery
from nets import randomise
from oracles import by_member, input_repeat

C = 8


class Block(nn.Module):
    """One of many ways to get from [b, 8, h, w] to [b, 8, h, w]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        groups = {"depthwise": C, "grouped": 2}.get(kind, 1)
        self.conv, self.bn = nn.Conv2d(C, C, 3, padding=1, groups=groups), nn.BatchNorm2d(C)
        self.fc1, self.fc2, self.norm = nn.Linear(C, 2 * C), nn.Linear(2 * C, C), nn.LayerNorm(C)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if self.kind in ("conv", "depthwise", "grouped"):
            return self.bn(self.conv(x)).relu()
        if self.kind == "residual":
            return x + F.gelu(self.bn(self.conv(x)))
        if self.kind == "gate":
            return x * self.fc2(self.fc1(x.mean((2, 3))).relu()).sigmoid().view(b, c, 1, 1)
        if self.kind == "branches":
            return self.bn(x) * torch.tanh(self.conv(x))
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        if self.kind == "mlp":
            y = self.fc2(F.silu(self.fc1(tokens)))
        elif self.kind == "sequence_first":
            y = self.fc2(F.gelu(self.fc1(tokens.transpose(0, 1)))).transpose(0, 1)
        elif self.kind == "windows":
            y = self.fc2(self.fc1(tokens.reshape(b * 2, h * w // 2, c)).relu()).reshape(b, h * w, c)
        elif self.kind == "attention":
            q, k = self.fc1(tokens).chunk(2, -1)
            y = (q @ k.transpose(1, 2) / 3).softmax(-1) @ tokens
        else:
            raise ValueError(self.kind)
        return x + y.transpose(1, 2).reshape(b, c, h, w)


class Network(nn.Module):
    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, C, 3, padding=1), nn.Sequential(*map(Block, kinds))
        self.head = nn.Linear(C, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


KINDS = [
    "conv",
    "depthwise",
    "grouped",
    "residual",
    "gate",
    "branches",
    "mlp",
    "sequence_first",
    "windows",
    "attention",
]


NETWORKS = (
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=5),
    st.integers(1, 5),
    st.floats(1.2, 4),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)


@settings(max_examples=5)
@given(*NETWORKS)
def test_random_networks(kinds: list[str], n: int, scale: float, batch: int, random) -> None:
    check(kinds, n, scale, batch, random)


@pytest.mark.slow
@settings(max_examples=30)
@given(*NETWORKS)
def test_more_random_networks(kinds: list[str], n: int, scale: float, batch: int, random) -> None:
    check(kinds, n, scale, batch, random)


def check(kinds: list[str], n: int, scale: float, batch: int, random) -> None:
    base = randomise(Network(kinds), 0).double().eval()
    x = torch.randn(batch, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = masksurgery.convert(base, n=n, scale=scale, example_inputs=(x,))
    masksurgery.verify(model, base, x)
    sites = [site.layer for site in model.surgery.sites]
    chosen = random.sample(sites, random.randint(1, len(sites)))
    partial = masksurgery.convert(base, n=n, scale=scale, example_inputs=(x,), include=chosen)
    assert {site.layer for site in partial.surgery.sites} == set(chosen)
    masksurgery.verify(partial, base, x)
    with torch.no_grad():
        late, early = partial(x).members, by_member(input_repeat(partial, (x,)), n)
    assert (late - early).abs().max() <= 1e-12 * early.abs().max()
    masksurgery.verify(masksurgery.convert(base.train(), n=n, scale=scale, example_inputs=(x,)), base, x, mode="train")

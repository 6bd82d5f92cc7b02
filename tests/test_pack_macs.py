"""What packed members multiply and add, against an independent count; and that count against counts by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masksurgery
from masksurgery.macs import count_macs
from nets import randomise
from pack_counts import needed_macs, packed_macs, products_of


def count(base: nn.Module, x: Tensor, **kwargs: Any) -> tuple[Counter[str], list[np.ndarray]]:
    """The independent count for one sample, and the masks in the order of the sites."""
    base = randomise(base).double().eval()
    model = masksurgery.convert(base, n=3, example_inputs=(x,), task="regression", **kwargs)
    found = needed_macs(model, base, (x,), products_of(base, (x[:1],)))
    return found, [model.surgery.masks[site.mask] for site in model.surgery.sites]


def images() -> Tensor:
    return torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_layer_between_two_masks_is_narrow_on_both_sides() -> None:
    base = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 10, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(160, 5)
    )
    found, (first, second) = count(base, images())
    both = [int(a.sum() * b.sum()) for a, b in zip(first, second, strict=True)]
    # The stem is the same for all; each channel becomes 16 columns of the Linear.
    assert found == {"0": 16 * 3 * 12 * 9, "2": 16 * 9 * sum(both), "5": 16 * 5 * int(second.sum())}


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12)
        self.conv, self.depthwise = nn.Conv2d(12, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(self.depthwise(x + self.conv(self.norm(x))).mean((2, 3)))


def test_a_sum_has_the_channels_of_both() -> None:
    found, (stem, conv) = count(Sum(), images(), exclude=["depthwise"])
    either = int((stem | conv).sum())
    # The norm makes constants of zeros; the border of zeros around them shows it, and nothing of 12 can be left out.
    assert found == {
        "stem": 36 * 3 * 12,
        "conv": 36 * 9 * 12 * int(conv.sum()),
        "depthwise": 36 * 9 * either,
        "head": 5 * either,
    }


def test_constants_belong_to_the_bias_where_there_is_no_border() -> None:
    base = Sum()
    base.conv = nn.Conv2d(12, 12, 1)
    found, (stem, conv) = count(base, images(), exclude=["depthwise"])
    assert found["conv"] == 36 * int((stem.sum(1) * conv.sum(1)).sum())


class Heads(nn.Module):
    """Two heads of four channels; the second is off where its mask is."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.stem, self.switch, self.qkv, self.proj = (nn.Linear(a, b) for a, b in ((7, 9), (9, 6), (9, 24), (8, 5)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        on = F.gelu(self.switch(x))[..., :2].transpose(1, 2)[..., None]
        return self.proj((y * on).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [True, False])
def test_a_head_that_nobody_reads_is_dead(fused: bool) -> None:
    x = torch.randn(4, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, (stem, switch) = count(Heads(fused), x, include=["stem", "switch"], seed=2)
    on = switch[:, :2].sum(1)
    assert on.min() == 1 and on.max() == 2
    assert found["stem"] == 3 * 7 * 9
    assert found["switch"] == 3 * int((stem.sum(1) * on).sum())
    assert found["qkv"] == 3 * 12 * int((stem.sum(1) * on).sum())
    assert found[""] == 2 * 3 * 3 * 4 * int(on.sum())
    assert found["proj"] == 3 * 5 * 4 * int(on.sum())


# --- packed models ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model, the most that all members may cost (the base model is 1), and how to make it small."""

    name: str
    limit: float
    size: int = 64
    kwargs: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


SMALL_VIT = {"size": 64, "kwargs": {"img_size": 64}}
SMALL_SWIN = {"size": 56, "kwargs": {"img_size": 56}}
CASES = [
    Case("resnet50", 1.46),
    Case("resnet50", 1.2, options={"tie": "stream"}),
    Case("efficientnet_b0", 1.42),
    Case("mobilenetv3_large_100", 1.5),
    Case("convnext_tiny", 1.4),
    Case("vit_small_patch16_224", 2.45, **SMALL_VIT),
    Case("vit_small_patch16_224", 1.78, options={"heads": True}, **SMALL_VIT),
    Case("swin_tiny_patch4_window7_224", 2.4, **SMALL_SWIN),
    Case("swin_tiny_patch4_window7_224", 1.75, options={"heads": True}, **SMALL_SWIN),
]


def needed_at_224(case: Case, masks: dict[str, np.ndarray], whole: list) -> Counter[str]:
    """The independent count, with the products of a small image and the sizes of a large one."""
    base = randomise(timm.create_model(case.name, **case.kwargs)).double().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, case.size, case.size, dtype=torch.float64, generator=generator)
    model = masksurgery.convert(base, example_inputs=(x,), **case.options)
    assert masks.keys() == model.surgery.masks.keys()
    assert all(np.array_equal(mask, model.surgery.masks[name]) for name, mask in masks.items())
    return needed_macs(model, base, (x,), whole)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case.name, *case.options]))
def test_packed_members_cost_what_they_need(case: Case) -> None:
    with torch.device("meta"):
        base, image = timm.create_model(case.name).eval(), torch.zeros(1, 3, 224, 224)
    whole = products_of(base, (image,))
    macs = sum(call.macs for call in whole)
    assert macs == count_macs(base, (image,))  # no product is overlooked

    model = masksurgery.convert(base, **case.options)
    packed = masksurgery.pack(model, layout="unrolled", dense=False)
    # Only a LayerNorm needs all channels: of zeros it makes other numbers.
    assert {barrier for barrier in packed.barriers if "LayerNorm" not in barrier.reason} == set()

    needed = needed_at_224(case, dict(model.surgery.masks), whole)
    found = packed_macs(products_of(packed, (image,)))
    assert found.total() == count_macs(packed, (image,))
    more = ((found - needed) + (needed - found)).most_common(5)
    assert found.total() / needed.total() == pytest.approx(1, abs=0.02), more
    assert found.total() <= case.limit * macs

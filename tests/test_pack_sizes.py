"""A packed model takes inputs of other sizes than its example, as the converted one does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masksurgery
from nets import NETS, randomise
from packing import as_dtype, assert_packed, run

Forward = Callable[["Sized", Tensor], Tensor]


class Sized(nn.Module):
    """A convolutional network whose middle is a function of its layers and of x [b, c, h, w]."""

    def __init__(self, middle: Forward) -> None:
        super().__init__()
        self.middle = middle
        self.stem, self.conv, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.bn, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self, self.stem(x).relu())
        return self.head(F.relu(self.last(x)).mean((2, 3)))


def halves(self: Sized, x: Tensor) -> Tensor:
    top, bottom = self.conv(x).chunk(2, 2)
    return torch.cat([bottom, top.relu()], 2)


def first_row(self: Sized, x: Tensor) -> Tensor:
    first, rest = x.split([1, x.shape[2] - 1], 2)
    return torch.cat([first, self.conv(rest)], 2)


def masked_first_row(self: Sized, x: Tensor) -> Tensor:
    """Only a part of the rows is masked."""
    return torch.cat([x[:, :, :1], F.relu(self.conv(x))[:, :, 1:]], 2)


def divided_by_width(self: Sized, x: Tensor) -> Tensor:
    """Constant channels, divided by a number that depends on the size."""
    return F.relu(self.bn(x) / x.shape[-1]) + self.conv(x)


def first_row_only(self: Sized, x: Tensor) -> Tensor:
    first, _ = self.conv(x).split([1, x.shape[2] - 1], 2)
    return first


def first_half_only(self: Sized, x: Tensor) -> Tensor:
    left, _ = self.conv(x).chunk(2, 3)
    return left


def summed(self: Sized, x: Tensor) -> Tensor:
    """Constant channels, summed over a number of places that depends on the size."""
    return F.relu(self.bn(x).sum((2, 3), keepdim=True) - 1) + self.conv(x)


def pooled_beside(self: Sized, x: Tensor) -> Tensor:
    """A sum of a map and of its mean."""
    return F.adaptive_avg_pool2d(self.conv(x), 1) + F.relu(self.conv(x))


def rows_as_channels(self: Sized, x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return self.conv(x).reshape(b, -1, w).cumsum(2).reshape(b, c, h, w)


def shifted(self: Sized, x: Tensor) -> Tensor:
    return F.pad(self.bn(self.conv(x)).roll(x.shape[3] // 2, 3), (1, 0, 2, 1))


def constant_columns(self: Sized, x: Tensor) -> Tensor:
    """Constants of one value stand beside those of another, in places that depend on the size."""
    return self.conv(F.relu(torch.cat([self.bn(x), x.sigmoid()], 3)))


MIDDLES = (
    halves, first_row, first_row_only, first_half_only, masked_first_row, divided_by_width, summed, pooled_beside,
    rows_as_channels, shifted, constant_columns,
)  # fmt: skip
OF_A_DOT = (masked_first_row, divided_by_width, summed, pooled_beside, constant_columns)


@pytest.mark.slow
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("middle", "example"), [*((middle, (6, 4)) for middle in MIDDLES), *((middle, (1, 1)) for middle in OF_A_DOT)]
)
def test_another_image_size(middle: Forward, example: tuple[int, int], dense: bool) -> None:
    model = masksurgery.convert(
        randomise(Sized(middle)).double(), example_inputs=torch.zeros(1, 3, *example, dtype=torch.float64)
    ).eval()
    packed = masksurgery.pack(model, "unrolled", dense=dense)
    for size in (example, (8, 6), (3, 7), (12, 12)):
        x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert_packed(packed, model, (x,))


class Texts(nn.Module):
    """Tokens [b, t] of any length and a mask [b, t], with attention among them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.qkv, self.proj, self.fc1, self.fc2 = (nn.Linear(*s) for s in ((8, 24), (8, 8), (8, 12), (12, 8)))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, mask[:, None, None]).transpose(1, 2).reshape(b, t, c))
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("heads", [False, True])
def test_texts_of_another_length(length: int, dense: bool, heads: bool) -> None:
    ids, mask = torch.zeros(1, length, dtype=torch.long), torch.ones(1, length, dtype=torch.bool)
    model = masksurgery.convert(randomise(Texts()).double(), example_inputs=(ids, mask), heads=heads).eval()
    packed = masksurgery.pack(model, "unrolled", dense=dense)
    for tokens in (length, 1, 3, 17):
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(11, (4, tokens), generator=generator)
        mask = torch.arange(tokens) <= torch.randint(tokens, (4, 1), generator=generator)
        assert_packed(packed, model, (ids, mask))


class Positions(nn.Module):
    """Texts no longer than a table, of which the last token is read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.hidden, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.table = nn.Parameter(torch.zeros(1, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x) + self.table[:, : x.shape[1]])
        return self.head(F.relu(self.hidden(x))[:, -1])


class Masked(nn.Module):
    """As many tokens as features, in the example."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc1, self.fc2, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.stem(x)
        x = (x + self.fc2(F.gelu(self.fc1(x)))) * mask[..., None]
        return self.head(x[:, -1])


class TwoImages(nn.Module):
    """Two images of different sizes, of which the last row is read."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        low = F.interpolate(F.relu(self.low(low)), scale_factor=2)
        x = F.relu(self.conv(torch.cat([low, F.relu(self.high(high))], 1)))
        return self.head(x[:, :, -1:].mean((2, 3)))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("net", "sizes"),
    [
        (Positions, [((n, 5),) for n in (6, 4, 1)]),
        (Masked, [((n, 8), (n,)) for n in (8, 12, 5)]),
        (TwoImages, [((3, n, n), (1, 2 * n, 2 * n)) for n in (4, 6, 3)]),
    ],
)
def test_sizes_that_depend_on_each_other(net: type[nn.Module], sizes: list, dense: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    every = [tuple(torch.randn(2, *shape, generator=generator).double() for shape in shapes) for shapes in sizes]
    model = masksurgery.convert(randomise(net()).double().eval(), example_inputs=every[0])
    packed = masksurgery.pack(model, "unrolled", dense=dense)
    for inputs in every:
        assert_packed(packed, model, inputs)


def larger(x: Tensor, dims: range) -> Tensor:
    for d in dims[: x.dim()]:
        x = torch.cat([x, x.flip(d)], d) if d < x.dim() else x
    return x


@pytest.mark.slow
@pytest.mark.parametrize(("dims", "least"), [(range(2, 5), 50), (range(1, 2), 10)])
def test_hazard_nets_that_take_larger_inputs(dims: range, least: int) -> None:
    """Whatever the converted model takes the packed one takes too, and predicts the same."""
    taken = []
    for net in NETS.values():
        torch.manual_seed(1)
        inputs = as_dtype(net.inputs(3), torch.float64)
        base = randomise(net.build(), 1).double().eval()
        model = masksurgery.convert(base, example_inputs=inputs, **net.convert_kwargs).eval()
        many = tuple(larger(x, dims) for x in inputs)
        if all(x.shape == y.shape for x, y in zip(inputs, many, strict=True)):
            continue
        try:
            run(model, many)
        except (RuntimeError, ValueError, IndexError):
            continue
        taken.append(net.name)
        for dense in (False, True):
            assert_packed(masksurgery.pack(model, "unrolled", dense=dense), model, many)
    assert len(taken) >= least, taken

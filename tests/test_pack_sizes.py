"""A packed model takes inputs of other sizes than its example, as the converted one does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masksurgery
from nets import randomise
from packing import assert_packed

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

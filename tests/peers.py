"""Stand-ins for mask layers of other packages, which do what those do and have their class names and attributes.

The real ones cannot all be installed together; masksembles 1.1.1 is, in the extra `test`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from masksurgery import generate_masks


def by_parts(x: Tensor, masks: Tensor) -> Tensor:
    """Rows of equal parts of a batch times the masks, as all of them compute it; the batch must be a multiple of n."""
    n, channels = masks.shape
    if len(x) % n:
        raise ValueError("the batch is no multiple of n")
    shape = (n, 1, channels, *(1,) * (x.dim() - 2))
    return (x.unflatten(0, (n, -1)) * masks.reshape(shape)).flatten(0, 1)


def float64_masks(channels: int, n: int, scale: float) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(generate_masks(channels, n, scale)).double(), requires_grad=False)


class Old(nn.Module):
    """masksembles 1.0 and 1.1: float64 parameters, and outputs that are float32 whatever comes in."""

    def __init__(self, channels: int, n: int, scale: float) -> None:
        super().__init__()
        self.channels, self.n, self.scale = channels, n, scale
        self.masks = float64_masks(channels, n, scale)

    def forward(self, x: Tensor) -> Tensor:
        return by_parts(x, self.masks).float()


class TorchUncertainty(nn.Module):
    """torch-uncertainty 0.1 to 0.13: its layers do not keep the scale."""

    def __init__(self, channels: int, num_masks: int, scale: float) -> None:
        super().__init__()
        self.num_masks = num_masks
        self.masks = float64_masks(channels, num_masks, scale)

    def forward(self, x: Tensor) -> Tensor:
        return by_parts(x, self.masks).to(x.dtype)


class Mask1d(TorchUncertainty): ...


class Mask2d(TorchUncertainty): ...


class MaskedConv2d(nn.Module):
    """Its convolution reads what is masked, and its mask layer is a child of it."""

    def __init__(self, in_channels: int, out_channels: int, num_estimators: int, scale: float) -> None:
        super().__init__()
        self.mask = Mask2d(in_channels, num_estimators, scale)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.mask(x))


class Probly(nn.Module):
    """probly: float32 buffers, and in training one mask for each sample, drawn at random."""

    def __init__(self, channels: int, n: int, scale: float) -> None:
        super().__init__()
        self.n, self.scale = n, scale
        self.register_buffer("masks", float64_masks(channels, n, scale).detach().float())

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            drawn = self.masks[torch.randint(self.n, (len(x),))]
            return x * drawn.reshape(*drawn.shape, *(1,) * (x.dim() - 2))
        return by_parts(x, self.masks)


class MasksemblesLinear(Probly): ...


class MasksemblesLayer(Old):
    """lightning-uq-box: one class for vectors and images."""


class Counting(Old):
    """A layer seen in the wild: one mask a call in eval mode, in turn."""

    def __init__(self, channels: int, n: int, scale: float) -> None:
        super().__init__(channels, n, scale)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (x * self.masks[self.calls % self.n].reshape(-1, *(1,) * (x.dim() - 2))).float()


def named(name: str, base: type[nn.Module]) -> type[nn.Module]:
    """A class that is called as another package calls it."""
    return type(name, (base,), {})

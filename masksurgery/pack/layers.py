"""Convolutions and Linear layers, with what is folded into their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from masksurgery.kinds import is_layer

LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear
)  # fmt: skip


NAMED_LAYERS = ("Conv2dSame", "Linear")  # of timm: a convolution that pads by itself, a Linear that minds autocast


@dataclass
class Affine:
    """x * scale + shift along one dimension; a float scales all alike."""

    scale: Tensor | float
    shift: Tensor | None = None
    dim: int = 0


@dataclass
class Layer:
    """A convolution or Linear with what is folded into it, in float64.

    Attributes:
        module: With its own weights.
        dim: Where the channels are in its input and its output.
        scale: Of its outputs [out].
        shift: Added to its outputs after that [out].
        input_scale: Of its inputs [in].
    """

    module: nn.Module
    dim: int
    scale: Tensor | None = None
    shift: Tensor | None = None
    input_scale: float = 1.0

    @property
    def parameter(self) -> Tensor:
        """The module's own weight."""
        return cast(Tensor, self.module.weight)

    @property
    def groups(self) -> int:
        return int(getattr(self.module, "groups", 1))

    @property
    def fan_in(self) -> int:
        """Multiply-adds for a number of its output."""
        return self.parameter.numel() // self.channels

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, nn.modules.conv._ConvTransposeNd)

    @property
    def pads(self) -> bool:
        """Zeros stand among its inputs, or its outputs differ at the edges."""
        module = self.module
        if isinstance(module, nn.Linear):
            return False
        if self.transposed:
            return True
        zeros = type(module).__name__ in NAMED_LAYERS or module.padding_mode == "zeros"
        none = module.padding == "valid" or module.padding in ((0,), (0, 0), (0, 0, 0))
        alone = set(module.kernel_size) == {1}  # type: ignore[arg-type]
        return zeros and not (alone if type(module).__name__ in NAMED_LAYERS else none)

    @property
    def has_bias(self) -> bool:
        return self.module.bias is not None or self.shift is not None

    def weight(self, groups: Tensor | None = None, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """Weights [groups, out / groups, in / groups, ...] with all that is folded in.

        Args:
            groups: Some of the groups, with `rows` and `columns` of each: indices [groups, ...] within the group.
        Returns:
            In float64 if anything is folded in, which is then to be rounded once.
        """
        weight = self.parameter.detach()
        weight = weight.reshape(self.groups, -1, *weight.shape[1:])
        weight = weight.transpose(1, 2) if self.transposed else weight
        scale = None if self.scale is None else self.scale.reshape(self.groups, -1)
        if groups is not None and rows is not None and columns is not None:
            at = groups[:, None].to(weight.device)
            rows, columns = rows.to(weight.device), columns.to(weight.device)
            weight = weight[at[..., None], rows[:, :, None], columns[:, None, :]]
            scale = None if scale is None else scale[at, rows]
        if self.input_scale != 1:
            weight = weight.double() * self.input_scale
        if scale is not None:
            weight = weight.double() * scale.reshape(*scale.shape, *[1] * (weight.dim() - 2))
        return weight

    def bias(self) -> Tensor | None:
        """[out], with all that is folded in."""
        own = cast("Tensor | None", self.module.bias)
        bias = None if own is None else own.detach().double()
        if bias is not None and self.scale is not None:
            bias = bias * self.scale
        if self.shift is not None:
            bias = self.shift if bias is None else bias + self.shift
        return bias

    def follow(self, affine: Affine) -> None:
        """Fold in what is done to the outputs."""
        size = self.channels
        scale = torch.as_tensor(affine.scale, dtype=torch.float64, device=self.parameter.device)
        scale = scale.expand(size)
        self.scale = scale if self.scale is None else self.scale * scale
        self.shift = None if self.shift is None else self.shift * scale
        if affine.shift is not None:
            shift = affine.shift.expand(size)
            self.shift = shift if self.shift is None else self.shift + shift

    @property
    def channels(self) -> int:
        module = self.module
        return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)  # type: ignore[arg-type]


def is_plain_layer(module: nn.Module) -> bool:
    """A convolution or Linear that computes with its `weight` and `bias` as they are."""
    named = type(module).__name__ in NAMED_LAYERS and type(module).__module__.startswith("timm.layers")
    known = type(module) in LAYERS or (named and is_layer(module))
    return known and not (is_parametrized(module) or module._forward_hooks or module._forward_pre_hooks)

"""The small modules of a packed graph: channels chosen, put back, added and scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


class Select(nn.Module):
    """Some of the channels of x, in order."""

    index: Tensor

    def __init__(self, dim: int, index: Tensor) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.index)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, channels={len(self.index)}"


class Place(nn.Module):
    """The channels of x at their places among others, which are constant.

    Args:
        dim: Of the channels.
        index: Where the channels of x go.
        fill: What stands elsewhere [size], along `dim`.
    """

    index: Tensor
    fill: Tensor

    def __init__(self, dim: int, index: Tensor, fill: Tensor) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", index)
        self.register_buffer("fill", fill)

    def forward(self, x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[self.dim] = len(self.fill)
        own = [1] * x.dim()
        own[self.dim] = -1
        return self.fill.to(x.dtype).reshape(own).expand(shape).index_copy(self.dim, self.index, x)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, channels={len(self.index)} of {len(self.fill)}"


class IndexAdd(nn.Module):
    """x with a branch added to some of its channels; with `inplace`, x itself is changed."""

    index: Tensor

    def __init__(self, dim: int, index: Tensor) -> None:
        super().__init__()
        self.dim, self.inplace = dim, False
        self.register_buffer("index", index)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        x, branch, owned = _promote(x, branch)
        if self.inplace or owned:
            return x.index_add_(self.dim, self.index, branch)
        return x.index_add(self.dim, self.index, branch)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, channels={len(self.index)}"


class SliceAdd(nn.Module):
    """x with a branch added to the first of its channels; with `inplace`, x itself is changed."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.dim, self.channels, self.inplace = dim, channels, False

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        x, branch, owned = _promote(x, branch)
        x = x if self.inplace or owned else x.clone()
        x.narrow(self.dim, 0, self.channels).add_(branch)
        return x

    def extra_repr(self) -> str:
        return f"dim={self.dim}, channels={self.channels}"


def add_into(x: Tensor, other: Tensor) -> Tensor:
    """x + other, written into x if it can hold the sum: under autocast they may differ in dtype."""
    return x.add_(other) if torch.promote_types(x.dtype, other.dtype) == x.dtype else x + other


def _promote(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Both in the dtype of their sum; whether x is a copy now."""
    dtype = torch.promote_types(x.dtype, branch.dtype)
    return x.to(dtype), branch.to(dtype), x.dtype != dtype


class ChannelAffine(nn.Module):
    """x * scale + shift, one number for each channel along a dimension."""

    scale: Tensor
    shift: Tensor | None

    def __init__(self, dim: int, scale: Tensor, shift: Tensor | None) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        shape[self.dim] = -1
        scale = self.scale.reshape(shape)
        return x * scale if self.shift is None else torch.addcmul(self.shift.reshape(shape), x, scale)


class Collect(nn.Module):
    """The outputs of the members as the head takes them: [n*b, ...], member after member.

    Args:
        batch_dims: The batch dimension of each leaf of an output; None where it has none. A number that is computed
            over a batch becomes its mean over the members, anything else is that of the first member.
    """

    def __init__(self, batch_dims: Sequence[int | None]) -> None:
        super().__init__()
        self.batch_dims = tuple(batch_dims)

    def forward(self, *outputs: Any) -> Any:
        leaves = [tree_flatten(output) for output in outputs]
        found = [_collect([flat[k] for flat, _ in leaves], batch_dim) for k, batch_dim in enumerate(self.batch_dims)]
        return tree_unflatten(found, leaves[0][1])


def _collect(parts: Sequence[Any], batch_dim: int | None) -> Any:
    first = parts[0]
    if batch_dim is not None and isinstance(first, Tensor):
        return torch.cat(list(parts), batch_dim)
    if isinstance(first, Tensor) and first.is_floating_point() and not first.dim():
        return torch.stack(list(parts)).mean()
    return first


def widened(shape: Sequence[int], sizes: Sequence[tuple[int, int]]) -> torch.Size:
    """A shape with (dimension, size) as they would be if no channel had been cut."""
    full = list(shape)
    for dim, size in sizes:
        full[dim] = size
    return torch.Size(full)

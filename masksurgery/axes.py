"""Axes of tensors: what a dimension is made of, and what becomes of that when tensors are reshaped or combined.

A dimension of a tensor is a product of axes, outermost first, so that merged dimensions (windows folded into the batch,
a flattened image) still know what they are made of. A dimension of length 1 has no axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(eq=False)
class Axis:
    """One axis of a tensor; identity is what counts.

    Attributes:
        size: Its length.
        batch: It counts the samples.
        channel: It counts the output channels of a layer.
        sources: The axes of the enclosing node's inputs that it is index by index.
        parents: The same, for the output of a node that has run: axes of the nodes before it.
    """

    size: int
    batch: bool = False
    channel: bool = False
    sources: frozenset[Axis] = frozenset()
    parents: frozenset[Axis] = frozenset()


Dim = tuple[Axis, ...]
Dims = tuple[Dim, ...]
_ATTRIBUTE = "_masksurgery_dims"


def anonymous(size: int) -> Dim:
    return () if size == 1 else (Axis(size),)


def get_dims(x: Tensor) -> Dims:
    """The dimensions of a tensor; anonymous axes where nothing is known of it."""
    dims = getattr(x, _ATTRIBUTE, None)
    if dims is None or len(dims) != x.dim():
        dims = tuple(anonymous(size) for size in x.shape)
    return cast(Dims, dims)


def set_dims(x: Tensor, dims: Dims) -> None:
    if tuple(math.prod(axis.size for axis in dim) for dim in dims) != tuple(x.shape):
        raise AssertionError(f"axes {dims} do not make up the shape {tuple(x.shape)}")
    setattr(x, _ATTRIBUTE, dims)


@dataclass
class Call:
    """One call of an operator.

    Attributes:
        name: Of the operator.
        arguments: By name.
        outputs: Its tensors.
        split: Axes of its inputs that end in it, cut up.
        constant: It turned out to read no value of its inputs, only their sizes.
    """

    name: str
    arguments: dict[str, Any]
    outputs: list[Tensor]
    split: set[Axis] = field(default_factory=set)
    constant: bool = False

    def tensor(self, name: str) -> Tensor:
        return cast(Tensor, self.arguments[name])

    def first(self) -> Tensor:
        return next(x for x in tree_leaves(tuple(self.arguments.values())) if isinstance(x, Tensor))

    def mark_split(self, axes: Sequence[Axis]) -> None:
        for axis in axes:
            self.split |= axis.sources


def union(axes: Sequence[Axis]) -> Axis:
    return Axis(
        axes[0].size,
        any(axis.batch for axis in axes),
        any(axis.channel for axis in axes),
        frozenset().union(*(axis.sources for axis in axes)),
    )


def merge(dims: Sequence[Dim]) -> Dim:
    """One dimension that several tensors share elementwise."""
    dims = [dim for dim in dims if dim]
    if not dims:
        return ()
    finest = max(dims, key=lambda dim: (len(dim), sum(len(axis.sources) for axis in dim)))
    alike = [dim for dim in dims if [axis.size for axis in dim] == [axis.size for axis in finest]]
    return tuple(union(axes) for axes in zip(*alike, strict=True))


def derived(dim: Dim, size: int) -> Dim:
    """The dimension itself, or of a new length one axis made of all of it."""
    if size == math.prod(axis.size for axis in dim):
        return dim
    sources = frozenset().union(*(axis.sources for axis in dim))
    return (Axis(size, False, len(dim) == 1 and dim[0].channel, sources),) if size > 1 else ()


def broadcast(tensors: Sequence[Tensor], shape: Sequence[int]) -> Dims:
    columns: list[list[Dim]] = [[] for _ in shape]
    for x in tensors:
        for dim, column in zip(reversed(get_dims(x)), reversed(columns), strict=False):
            column.append(dim)
    return tuple(
        merged if (merged := merge(column)) or size == 1 else anonymous(size)
        for column, size in zip(columns, shape, strict=True)
    )


def reshape(call: Call, dims: Dims, shape: Sequence[int]) -> Dims:
    """Deal the axes out to the new shape, in order; an axis that has to be cut in two is lost."""
    left = [axis for dim in dims for axis in dim]
    result = []
    for size in shape:
        parts: list[Axis] = []
        while size > 1 and left:
            axis = left.pop(0)
            common = math.gcd(size, axis.size)
            if common == axis.size:
                parts.append(axis)
            else:
                call.mark_split([axis])
                if common == 1:  # nothing fits any more
                    call.mark_split(left)
                    left = []
                    break
                parts.append(Axis(common))
                left.insert(0, Axis(axis.size // common))
            size //= common
        if size > 1:
            parts = [Axis(size * math.prod(part.size for part in parts))]
        result.append(tuple(parts))
    return tuple(result)

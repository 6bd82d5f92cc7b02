"""What one forward takes, at two batch sizes and with its axes: all that the passes know of a model's inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from masksurgery.axes import Axis, Dims
from masksurgery.inputs import placeholder_values

# Odd and prime, so that a batch is not taken for a window, a group or a pair.
BATCH_SIZES = (13, 11)


@dataclass(frozen=True)
class Example:
    """What one forward takes.

    Attributes:
        bound: Its arguments, as they were given.
        values: Those that are inputs, by the name of the placeholder, at each of BATCH_SIZES.
        dims: The axes of the tensors in each of the first values.
        integers: Integers are inputs too, and no constants.
    """

    bound: inspect.BoundArguments
    values: tuple[Mapping[str, Any], Mapping[str, Any]]
    dims: Mapping[str, Sequence[Dims]]
    integers: bool = False

    @classmethod
    def of(cls, bound: inspect.BoundArguments, unbatched: Sequence[str] = ()) -> Example:
        """Samples repeated to both sizes; dimension 0 of every tensor is the batch.

        Args:
            bound: The arguments of one forward.
            unbatched: Names of the placeholders without a batch dimension.
        """
        inputs = placeholder_values(bound)
        one, other = (
            {name: value if name in unbatched else resize_batch(value, size) for name, value in inputs.items()}
            for size in BATCH_SIZES
        )
        dims = {name: [_dims(x, name not in unbatched) for x in tensors_in(value)] for name, value in one.items()}
        return cls(bound, (one, other), dims)

    def light(self) -> Example:
        """The same without its values, to be kept."""

        def empty(x: Any) -> Any:
            return x.new_zeros(()).expand(x.shape) if isinstance(x, Tensor) else x

        bound = inspect.BoundArguments(self.bound.signature, tree_map(empty, dict(self.bound.arguments)))  # type: ignore[arg-type]
        one, other = (tree_map(empty, dict(values)) for values in self.values)
        return replace(self, bound=bound, values=(one, other))

    def without_data(self, device: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
        """The same shapes; under a mode of fake tensors these."""

        def empty(x: Any) -> Any:
            return torch.empty(x.shape, dtype=x.dtype, device=device or x.device) if isinstance(x, Tensor) else x

        one, other = ({name: tree_map(empty, value) for name, value in values.items()} for values in self.values)
        return one, other


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def resize_batch(value: Any, size: int) -> Any:
    """The samples again and again, until there are so many; of a tree of tensors."""

    def resize(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dim() == 0:
            return x
        return x.detach()[torch.arange(size, device=x.device) % max(len(x), 1)]

    return tree_map(resize, value)


def _dims(x: Tensor, batched: bool) -> Dims:
    axes = [() if size == 1 else (Axis(size),) for size in x.shape]
    if batched and axes:
        axes[0] = (Axis(BATCH_SIZES[0], batch=True),)
    return tuple(axes)

"""What a packed model has to give: the converted model's predictions, and each member the base model's output."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from masksurgery.copying import copy_module
from masksurgery.model import ConvertedModel
from masksurgery.oracle import Oracle

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


@torch.no_grad()
def run(model: nn.Module, inputs: tuple) -> Any:
    return model(*inputs)


def members_of(model: Any, inputs: tuple) -> list[Tensor]:
    """The members [b, n, ...] of every output, in eval."""
    before, model.output = model.output, "members"
    try:
        return [x for x in tree_leaves(run(model, inputs)) if isinstance(x, Tensor)]
    finally:
        model.output = before


def assert_same(ours: Any, theirs: Any, size: float, tolerance: float) -> None:
    """The same structure, types and values; of floating-point numbers to a share of `size`."""
    (found, spec), (expected, other) = tree_flatten(ours), tree_flatten(theirs)
    assert spec == other
    for a, b in zip(found, expected, strict=True):
        if not isinstance(b, Tensor):
            assert a == b
        elif b.is_floating_point():
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            assert (a - b).abs().max() <= tolerance * size
        else:
            assert torch.equal(a, b)


def largest(tensors: Any) -> float:
    """The largest absolute value among the floating-point tensors of a tree."""
    leaves = [x for x in tree_leaves(tensors) if isinstance(x, Tensor) and x.is_floating_point()]
    return max(float(x.abs().max()) for x in leaves)


def assert_packed(packed: Any, model: ConvertedModel, inputs: tuple, tolerance: float | None = None) -> None:
    """Packed equals converted, relative to the largest output of a member, which is not what the base model returns.

    Args:
        packed: Of `model`, or of one with the same weights and masks.
        model: In eval.
        inputs: In its dtype.
        tolerance: By default that of the dtype.
    """
    theirs = members_of(model, inputs)
    size = largest(theirs)
    limit = tolerance or TOLERANCE[next(x.dtype for x in theirs if x.is_floating_point())]
    assert_same(members_of(packed, inputs), theirs, size, limit)
    assert_same(run(packed, inputs), run(model, inputs), max(size, 1), 10 * limit)  # exp and log stand in between


def assert_members(packed: Any, model: ConvertedModel, base: nn.Module, inputs: tuple) -> None:
    """Each member alone equals the base model with its masks multiplied in."""
    oracle = Oracle(copy_module(base), model, (inputs, {}))
    for i in range(model.surgery.n):
        with torch.no_grad():
            expected = oracle.run((inputs, {}), {name: rows[i] for name, rows in oracle.masks.items()})
        assert_same(run(packed.member(i), inputs), expected, largest(expected), TOLERANCE[torch.float64])


def as_dtype(inputs: tuple, dtype: torch.dtype) -> tuple:
    return tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)


def in_dtype(model: ConvertedModel, dtype: torch.dtype) -> ConvertedModel:
    """A copy in another dtype."""
    return copy.deepcopy(model).to(dtype)

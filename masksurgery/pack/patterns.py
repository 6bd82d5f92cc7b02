"""Patterns: which channels of a tensor, as boolean tensors of its rank; and what is known of a tensor beforehand.

A pattern has length 1 along the dimensions where all entries are alike. None depends on the values of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def compress(pattern: Tensor) -> Tensor:
    """The same pattern, of length 1 along the dimensions where it does not vary."""
    for d, size in enumerate(pattern.shape):
        if size > 1 and bool((pattern == pattern.narrow(d, 0, 1)).all()):
            pattern = pattern.narrow(d, 0, 1)
    return pattern


def reduce_any(pattern: Tensor, shape: Sequence[int]) -> Tensor:
    """To a shape that was broadcast to the pattern's: what any of the copies needs."""
    while pattern.dim() > len(shape):
        pattern = pattern.any(0)
    for d, size in enumerate(shape):
        if size == 1 and pattern.shape[d] > 1:
            pattern = pattern.any(d, keepdim=True)
    return pattern


def numbers(x: Tensor | float) -> Tensor:
    """Values in float64 on the CPU; zeros for a tensor without data, as no pattern depends on them."""
    x = torch.as_tensor(x)
    return torch.zeros(x.shape, dtype=torch.float64) if x.is_meta else x.detach().cpu().double()


def along(vector: Tensor, rank: int, dim: int) -> Tensor:
    """A vector as a pattern along one dimension."""
    shape = [1] * rank
    shape[dim] = -1
    return compress(vector.reshape(shape))


def vector_of(pattern: Tensor, dim: int, size: int, every: bool) -> Tensor:
    """What holds for all (or for any) of the places of each channel [size]."""
    others = [d for d in range(pattern.dim()) if d != dim]
    reduced = pattern.all if every else pattern.any
    flat = reduced(others) if others else pattern
    return flat.reshape(-1).expand(size)


@dataclass(frozen=True)
class Known:
    """What is known of a tensor before the model runs.

    Attributes:
        zero: Where it is zero.
        constant: Where it is the same whatever the input is; zeros are among that.
        value: Which number [broadcasts with `constant`], in float64.
    """

    zero: Tensor
    constant: Tensor
    value: Tensor

    @classmethod
    def nothing(cls, rank: int) -> Known:
        none = torch.zeros([1] * rank, dtype=torch.bool)
        return cls(none, none, torch.zeros([1] * rank, dtype=torch.float64))

    @classmethod
    def zeros(cls, zero: Tensor) -> Known:
        zero = compress(zero)
        return cls(zero, zero, torch.zeros([1] * zero.dim(), dtype=torch.float64))

    @property
    def restorable(self) -> Tensor:
        """Where it can be left out: zeros, and constants that differ along one dimension alone."""
        varying = {d for x in (self.constant, self.value) for d, size in enumerate(x.shape) if size > 1}
        return self.constant if len(varying) <= 1 else self.zero

    @property
    def anything(self) -> bool:
        return bool(self.constant.any())


def align(known: Known, rank: int) -> Known:
    """With dimensions of length 1 in front, as broadcasting adds them."""
    missing = [1] * (rank - known.zero.dim())
    return Known(*(x.reshape(*missing, *x.shape) for x in (known.zero, known.constant, known.value)))

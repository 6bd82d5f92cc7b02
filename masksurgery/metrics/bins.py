"""Fine bins for scores of any size: a ranking of any number of items in memory of fixed size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MANTISSA = 10
_SHIFT = 52 - _MANTISSA
_FIRST = (1023 - 64) << _MANTISSA
BINS = 128 << _MANTISSA
"""Powers of two from 2^-64 to 2^64, each in 1024 steps: 131,072 bins, at most 0.1% wide."""


def bin_index(u: Tensor) -> Tensor:
    """The bin of each score u >= 0, int64 like u: the leading bits of a float64 are in the order of the numbers.

    The first bin takes all below 2^-64, the last one all from 2^64 on.
    """
    return ((u.double().view(torch.int64) >> _SHIFT) - _FIRST).clamp(0, BINS - 1)


def bin_edges() -> np.ndarray:
    """Where the bins begin, float64 [BINS + 1]: bin i holds the scores from edges[i] to below edges[i + 1]."""
    edges = ((np.arange(BINS + 1, dtype=np.int64) + _FIRST) << _SHIFT).view(np.float64)
    edges[0] = 0.0
    return edges


def tally(counts: Tensor, index: Tensor) -> None:
    """Add 1 to counts[index], in place; an index may occur many times."""
    counts.index_add_(0, index, torch.ones_like(index))

"""States that do not grow: sums and counts, which processes add."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Sums(Metric):
    """A metric whose state is float64 sums and int64 counts of fixed size."""

    full_state_update = False

    def add_sum(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def add_count(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def update_called(self) -> bool:
        """Said to be so: torchmetrics warns otherwise, and a process may be left without a batch."""
        return True


class Mean(Sums):
    """The mean of all values.

    torchmetrics' MeanMetric casts what it is given to float32, even after set_dtype, and adds up each batch in that: of
    the losses of a million pixels some six digits stay.
    """

    total: Tensor
    items: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_sum("total")
        self.add_count("items")

    def update(self, values: Tensor) -> None:
        """Add values of any shape."""
        self.total += values.sum(dtype=torch.float64)
        self.items += values.numel()

    def compute(self) -> Tensor:
        return self.total / self.items

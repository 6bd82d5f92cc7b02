"""A mean over any number of items that loses none of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(Metric):
    """The mean of all values, float64.

    torchmetrics' MeanMetric casts what it is given to float32, even after set_dtype, and adds up each batch in that: of
    the losses of a million pixels some six digits stay.
    """

    full_state_update = False
    total: Tensor
    items: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("items", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add values of any shape."""
        self.total += values.sum(dtype=torch.float64)
        self.items += values.numel()

    def compute(self) -> Tensor:
        return self.total / self.items

"""How well a normal distribution, or the members, foretell a number."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from masksurgery.evaluation import Reliability
from masksurgery.metrics.sums import Sums

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Of the central intervals of the normal distribution."""


class NormalFit(Sums):
    """Sums over numbers of what the normal distribution with their mean and variance says of the truth.

    compute() returns the number of items, the mean variance, the negative log-likelihood in nats, and the share of
    truths in the central interval of each of `LEVELS`. A variance of 0 has no density: the likelihood of a data set
    with such an item is 0, its nll infinite.
    """

    items: Tensor
    variance: Tensor
    nll: Tensor
    inside: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_count("items")
        self.add_sum("variance")
        self.add_sum("nll")
        self.add_count("inside", len(LEVELS))

    def update(self, mean: Tensor, variance: Tensor, y: Tensor) -> None:
        """Add m numbers, float64 [m] each."""
        off = (mean - y).abs()
        nll = 0.5 * (torch.log(2 * math.pi * variance) + off.square() / variance)
        self.items += len(y)
        self.variance += variance.sum()
        self.nll += torch.where(variance > 0, nll, torch.inf).sum()
        z = torch.special.ndtri((1 + torch.tensor(LEVELS, dtype=torch.float64, device=y.device)) / 2)
        for i in range(len(LEVELS)):
            self.inside[i] += (off <= z[i] * variance.sqrt()).sum()

    def compute(self) -> tuple[int, float, float, tuple[float, ...]]:
        items = int(self.items)
        inside = tuple(x / items for x in self.inside.tolist())
        return items, self.variance.item() / items, self.nll.item() / items, inside


def interval_reliability(inside: tuple[float, ...]) -> Reliability:
    """The share of truths inside of each interval over its level."""
    return Reliability(LEVELS, inside, (1 / len(LEVELS),) * len(LEVELS))


def crps_of_normal(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
    """Continuous ranked probability score of a normal distribution, in the unit of y.

    Where it has no variance, that is the absolute error.

    Shape:
        All three and the result [m].
    Source:
        Gneiting and Raftery 2007, Journal of the American Statistical Association 102, section 4.2.
    """
    deviation = variance.sqrt()
    z = (y - mean) / deviation
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    score = deviation * (z * (2 * torch.special.ndtr(z) - 1) + 2 * density - 1 / math.sqrt(math.pi))
    return torch.where(variance > 0, score, (y - mean).abs())


def crps_of_members(members: Tensor, y: Tensor) -> Tensor:
    """Continuous ranked probability score of the members' empirical distribution, in the unit of y.

    E|X - y| - E|X - X'| / 2; of one member the absolute error.

    torchmetrics has it only from 1.7 on, refuses a single member, and compares all pairs; sorted, each member counts
    once: sum_ij |x_i - x_j| = 2 sum_i (2i - n - 1) x_i.

    Shape:
        members [m, n]; y and the result [m].
    Source:
        Gneiting and Raftery 2007, section 4.2.
    """
    n = members.shape[1]
    x = members.sort(1).values
    weight = 2 * torch.arange(1, n + 1, dtype=x.dtype, device=x.device) - n - 1
    return (x - y.unsqueeze(1)).abs().mean(1) - (x * weight).sum(1) / n**2

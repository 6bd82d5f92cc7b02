"""What is fitted to held-out data: the temperature of a model, and the threshold below which it says nothing."""

from __future__ import annotations

import logging
import math
from types import EllipsisType
from typing import cast

import numpy as np
import torch
from torch import Tensor

from masksurgery.losses import match_targets
from masksurgery.metrics import RankedScores
from masksurgery.metrics.bins import bin_edges
from masksurgery.metrics.items import check_numbers, known_classes, known_labels, to_device
from masksurgery.metrics.sums import Sums
from masksurgery.prediction import Prediction, RegressionPrediction
from masksurgery.scores import Score, Threshold
from masksurgery.types import ConfigError, EvaluationError, Task

_GRID = np.linspace(math.log(0.05), math.log(20), 121)  # its middle is the temperature 1
_PIXELS = 256  # of an image

logger = logging.getLogger(__name__)


class TemperatureFit(Sums):
    """The temperature that makes held-out data most likely, see `Head.temperature`.

    Classes and labels: what divides the members' logits. The negative log-likelihood of the members' mixture is summed
    up for 121 temperatures from 0.05 to 20; the lowest point of the parabola through the three lowest is taken. Where
    one end is the best, as with predictions that are all right, the data determine none, and it stays 1.
    Regression: what multiplies the standard deviation; of a normal distribution the best is known,
    T^2 = mean((y - mean)^2 / variance).

    Of a segmentation some 256 pixels of each image are looked at, on a fixed grid: neighbours say much the same, and so
    the temperature depends neither on chance nor on how images are put into batches.

    Args:
        task: The model's.
        class_dim: Where the classes stand in the base model's output.
        segmentation: The items are pixels.
        device: Of the sums. It needs float64.
    Source:
        Guo et al. 2017, arXiv:1706.04599; of an ensemble's mixture Rahaman and Thiery 2021, arXiv:2007.08792.
    """

    sums: Tensor
    items: Tensor
    blind: Tensor

    def __init__(
        self, task: Task, *, class_dim: int = 1, segmentation: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.task, self.class_dim, self.segmentation = task, class_dim, segmentation
        size = 1 if task == "regression" else len(_GRID)
        self.add_sum("sums", size)
        self.add_count("items")
        self.add_count("blind")
        self.to(device)

    def update(self, p: Prediction | RegressionPrediction, y: Tensor) -> None:
        """Count a batch, predicted at temperature 1. Arguments and errors as for `Suite.update`."""
        p, y = to_device(p, self.sums.device), y.to(self.sums.device)
        check_numbers(p, y)
        if isinstance(p, RegressionPrediction):
            variance = p.variance.double()
            mean = p.mean.double()
            ratio = (match_targets(y, mean) - mean).square() / variance
            self.sums += ratio[variance > 0].sum()
            self.blind += (variance == 0).sum()
            self.items += ratio.numel()
        else:
            logits, truth = self._logits(p, y)
            own = logits.gather(2, truth[:, None, None].expand(-1, logits.shape[1], 1)).squeeze(2)
            for i, t in enumerate(np.exp(_GRID).tolist()):
                log_p = own / t - torch.logsumexp(logits / t, 2)
                self.sums[i] += (math.log(logits.shape[1]) - torch.logsumexp(log_p, 1)).sum()
            self.items += len(truth)

    def _logits(self, p: Prediction, y: Tensor) -> tuple[Tensor, Tensor]:
        """The members' logits of m items, float64 [m, n, k] (of a label 0 for no), and their classes [m]."""
        x = p.members
        if self.task == "multilabel":
            y, known = known_labels(p, y, self.segmentation)
        else:
            dim = self.class_dim % p.logits.dim()
            known, x = known_classes(p, y, dim, self.segmentation), x.movedim(dim + 1, 2)
        if self.segmentation:
            grid = _thin_out(x.shape[3:])
            x, y, known = x[grid], y[grid], known[grid]
        x = torch.stack([torch.zeros_like(x), x], -1) if self.task == "multilabel" else x.movedim(2, -1)
        return x.movedim(1, -2)[known].double(), y[known].long()

    def compute(self) -> tuple[Tensor, int, int]:
        """Sums, number of items and of those without a variance, of all processes."""
        return self.sums.cpu(), int(self.items), int(self.blind)

    def compute_temperature(self, called: str = "the model") -> float:
        """The temperature, by the data of all processes: each of them has to call it.

        Args:
            called: The model's name, for a warning.
        Raises:
            EvaluationError: There are no items, the truth is impossible at every temperature, or a regression has no
                variance somewhere or is exactly right everywhere.
        """
        sums, items, blind = self.compute()
        if not items:
            raise EvaluationError("There is nothing to fit a temperature to: no images were held out, or none counts.")
        if self.task != "regression":
            return _lowest(sums.numpy() / items, called)
        if blind:
            raise EvaluationError(
                f"{blind} of {items} predictions have a variance of 0, which no temperature makes wider. Fit it to a "
                f"model with several members that differ, or with heteroscedastic=True."
            )
        if not sums.item():
            raise EvaluationError(f"All {items} predictions are exactly right: no variance is small enough for them.")
        return math.sqrt(sums.item() / items)


def _thin_out(shape: torch.Size) -> tuple[slice | EllipsisType, ...]:
    """An index of every k-th row and column, which leaves about `_PIXELS` of them."""
    step = math.ceil((shape.numel() / _PIXELS) ** (1 / len(shape)))
    return ..., *(slice(min(step // 2, (size - 1) // 2), None, step) for size in shape)


def _lowest(nll: np.ndarray, called: str) -> float:
    """The temperature at the minimum of these, for those of `_GRID`."""
    if not np.isfinite(nll).all():
        raise EvaluationError(
            "The model gives a truth the probability 0 at every temperature: its logits are infinite. Nothing can be "
            "fitted to that."
        )
    i, last = int(nll.argmin()), len(nll) - 1
    lowest = nll <= nll[i] * (1 + 1e-14)  # more than one where the temperature changes nothing, but for rounding
    if lowest[last // 2] and lowest.sum() > 1:
        return 1.0
    if lowest[0] or lowest[last]:
        logger.warning(
            "%s: the held-out images determine no temperature, and it stays 1: predictions are %s. Hold out more.",
            called,
            "all right, however confident" if lowest[0] else "no better than chance",
        )
        return 1.0
    before, at, after = nll[i - 1 : i + 2].tolist()
    bend = before - 2 * at + after
    shift = (before - after) / (2 * bend) if bend > 0 else 0.0
    return math.exp(_GRID[i] + shift * (_GRID[1] - _GRID[0]))


def fit_threshold(
    ranked: RankedScores, score: Score, *, coverage: float | None = None, risk: float | None = None
) -> Threshold:
    """The threshold that answers a share of the images, or as many as an error allows.

    Args:
        ranked: The scores of held-out images; for `risk` with their losses.
        score: To refuse by.
        coverage: The smallest threshold that answers at least this share, in (0, 1].
        risk: The largest share that has at most this mean loss. Images whose scores are in one bin of 0.025% are
            answered together.
    Raises:
        ConfigError: Not one of the two is given, or it is out of range.
        EvaluationError: There are no images or, for `risk`, no losses; the score is not kept; even the surest images
            have a larger error.
    """
    if (coverage is None) == (risk is None):
        raise ConfigError("Pass coverage= or risk=, one of the two: either decides the threshold.")
    if coverage is not None:
        if not 0 < coverage <= 1:
            raise ConfigError(f"coverage={coverage!r} is no share of the images. Pass a number in (0, 1], such as 0.9.")
        up_to = ranked.counted(score).cumsum()
        last = int(np.argmax(up_to / up_to[-1] >= coverage))
    else:
        last = _largest(ranked, score, cast(float, risk))
    limit = math.nextafter(bin_edges()[last + 1], 0)  # the largest number of the bin
    if score != "max_probability":
        return Threshold(score, limit)
    value = 1 - limit
    if 1 - value < limit:  # by rounding
        value = math.nextafter(value, 0)
    return Threshold(score, max(value, 0.0))


def _largest(ranked: RankedScores, score: Score, risk: float) -> int:
    """The last bin up to which the mean loss is at most `risk`."""
    if not risk >= 0:
        raise ConfigError(f"risk={risk!r} is no error. Pass a number from 0 on, such as 0.01.")
    occupied, up_to, total = ranked.cumulated(score)
    loss = total / up_to
    allowed = np.flatnonzero(loss <= risk)
    if not len(allowed):
        best = int(loss.argmin())
        raise EvaluationError(
            f"No threshold on {score!r} has an error of at most {risk:g}: the smallest that can be had is "
            f"{loss[best]:.4g}, of the surest {up_to[best] / up_to[-1]:.1%} of the images. Allow more, or another "
            f"score."
        )
    return int(occupied[allowed[-1]])

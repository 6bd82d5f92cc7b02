"""How unsure a prediction is, as one number: the scores by which images are ranked, detected and refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from masksurgery.prediction import Prediction, RegressionPrediction
from masksurgery.types import ConfigError, Task

Score = Literal["max_probability", "entropy", "mutual_information", "variance"]
SCORES: tuple[Score, ...] = get_args(Score)


def item_scores(p: Prediction | RegressionPrediction, task: Task, class_dim: int = 1) -> dict[Score, Tensor]:
    """The uncertainty of each item (image, pixel or label), larger being less sure.

    Args:
        p: The prediction for b images.
        task: The model's.
        class_dim: Where the classes stand in the base model's output.
    Returns:
        In float64, [b, ...]: "max_probability" as 1 less the largest mean probability (which keeps its digits near 0),
        the total "entropy" and the "mutual_information" in nats, the "variance" summed over the classes. Of a
        regression the variance alone.
    """
    if isinstance(p, RegressionPrediction):
        return {"variance": p.variance.double()}
    if task == "multilabel":
        logits, variance = p.logits.double(), 2 * p.variance.double()  # that of yes and that of no
        unsure = torch.sigmoid(-logits.abs())
    else:
        unsure = -torch.expm1(p.logits.amax(class_dim).double())
        variance = p.variance.sum(class_dim, dtype=torch.float64)
    return {
        "max_probability": unsure.clamp_min(0),
        "entropy": p.entropy.double(),
        "mutual_information": p.mutual_information.double(),
        "variance": variance,
    }


def image_scores(p: Prediction | RegressionPrediction, task: Task, class_dim: int = 1) -> dict[Score, Tensor]:
    """The uncertainty of each image [b]: the mean over its items, see `item_scores`."""
    scores = item_scores(p, task, class_dim)
    return {name: x.flatten(1).mean(1) if x.dim() > 1 else x for name, x in scores.items()}


@dataclass(frozen=True)
class Threshold:
    """When to say "I don't know".

    Attributes:
        score: What is looked at.
        value: Of "max_probability" the smallest, of the others the largest that still gets an answer.
    Raises:
        ConfigError: There is no such score, or the value is not a finite number.
    """

    score: Score
    value: float

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ConfigError(f"score={self.score!r} is not one of {', '.join(map(repr, SCORES))}.")
        if not isinstance(self.value, Real) or not math.isfinite(self.value):
            raise ConfigError(f"value={self.value!r} of a threshold is not a finite number.")
        object.__setattr__(self, "value", float(self.value))  # numpy's is none of JSON

    @property
    def limit(self) -> float:
        """The largest uncertainty, as `image_scores` gives it, that still gets an answer."""
        return 1 - self.value if self.score == "max_probability" else self.value

    def check_task(self, task: Task) -> None:
        """Raise a ConfigError if a model of this task does not have the score."""
        if task == "regression" and self.score != "variance":
            raise ConfigError(f"score={self.score!r} is none of a regression, which has 'variance'.")

    def unsure(self, p: Prediction | RegressionPrediction, task: Task, class_dim: int = 1) -> Tensor:
        """Which images get no answer, bool [b].

        Raises:
            ConfigError: The score is none of a regression.
        """
        self.check_task("regression" if isinstance(p, RegressionPrediction) else task)
        return ~(image_scores(p, task, class_dim)[self.score] <= self.limit)  # what is no number is unsure too

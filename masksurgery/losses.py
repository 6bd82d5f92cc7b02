"""What a task minimises in training, and the scores by which the best model is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from masksurgery.data import IGNORED
from masksurgery.prediction import CLASS_KEYS, Prediction, RegressionPrediction, first_prediction
from masksurgery.types import ConfigError, Task

Loss = Literal["cross-entropy", "bce", "mse", "gaussian-nll"]
LOSSES: tuple[Loss, ...] = get_args(Loss)

AUXILIARY = 0.4
"""What the loss of an auxiliary output counts (Inception v3's own; GoogLeNet 0.3, FCN in torchvision 0.5)."""

SUITS: Mapping[Task, tuple[Loss, ...]] = {
    "classification": ("cross-entropy", "bce"),
    "probabilities": ("cross-entropy",),
    "multilabel": ("bce",),
    "regression": ("mse",),
}


def choose_loss(task: Task, heteroscedastic: bool, wanted: Loss | None = None) -> Loss:
    """The loss of a task; a ConfigError if `wanted` does not suit it."""
    suits = ("gaussian-nll",) if heteroscedastic else SUITS[task]
    if wanted is not None and wanted not in suits:
        kind = "a mean and a log-variance" if heteroscedastic else f"task={task!r}"
        raise ConfigError(f"loss={wanted!r} does not suit {kind}. Pass {' or '.join(map(repr, suits))}.")
    return wanted or suits[0]


@dataclass(frozen=True)
class Objective:
    """The loss of a task, and its scores in validation.

    Args:
        task: The model's.
        loss: One that suits the task.
        class_dim: Where the classes stand in the base model's output.
        label_smoothing: Share of the target that goes to all classes alike.
    """

    task: Task
    loss: Loss
    class_dim: int = 1
    label_smoothing: float = 0.0

    @property
    def criterion(self) -> str:
        """The score in validation that chooses the best model, smaller being better."""
        return "mse" if self.loss == "mse" else "nll"

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of what `score` returns."""
        if self.loss == "mse":
            return ("mse",)
        return ("nll", "mse") if self.loss == "gaussian-nll" else ("nll", "accuracy")

    # --- training ----------------------------------------------------------------------------------------------------

    def __call__(self, outputs: Any, y: Tensor) -> Tensor:
        """The mean loss of what the model returned in training.

        Args:
            outputs: A tensor, or several: the first one (of a mapping "logits" or "out") is the model's answer, others
                that are as long as it in the batch and class dimensions are auxiliary and count `AUXILIARY`.
            y: Classes [b, ...], their shares [b, k, ...] (mixed ones, which are smoothed already), or numbers like the
                output.
        Raises:
            ConfigError: y does not suit the outputs.
        """
        if self.loss == "gaussian-nll":
            mean, log_variance = (leaf.float() for leaf in tree_leaves(outputs)[:2])
            return F.gaussian_nll_loss(mean, match_targets(y, mean), log_variance.exp())
        main, others = answer(outputs)
        total = self._loss(main, y)
        for other in others:
            total = total + AUXILIARY * self._loss(other, y)
        return total

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        x = x.float()
        if self.loss == "mse":
            return F.mse_loss(x, match_targets(y, x))
        if self.task == "multilabel":
            return F.binary_cross_entropy_with_logits(x, self._smooth(match_targets(y, x), 2))
        x = x.movedim(self.class_dim, 1)
        if self.task == "probabilities":
            x = x.clamp_min(torch.finfo(x.dtype).tiny).log()
        if self.loss == "bce":
            k = x.shape[1]
            mixed = y.is_floating_point()
            shares = y if mixed else self._smooth(F.one_hot(y, k).movedim(-1, 1).to(x.dtype), k)
            return F.binary_cross_entropy_with_logits(x, shares)
        if y.is_floating_point():
            return F.cross_entropy(x, y)
        if y.dim() == 1:
            return F.cross_entropy(x, y, label_smoothing=self.label_smoothing)
        total = F.cross_entropy(x, y, ignore_index=IGNORED, label_smoothing=self.label_smoothing, reduction="sum")
        return total / (y != IGNORED).sum().clamp_min(1)  # there may be no pixel of a class

    def _smooth(self, shares: Tensor, k: int) -> Tensor:
        return shares * (1 - self.label_smoothing) + self.label_smoothing / k

    def count_known(self, ys: Sequence[Tensor]) -> Tensor | None:
        """How many targets each of these has [len(ys)], where some may belong to no class; None where all count."""
        if self.loss != "cross-entropy" or ys[0].is_floating_point() or ys[0].dim() == 1:
            return None
        return torch.stack([(y != IGNORED).sum() for y in ys]).float()

    def correct(self, outputs: Any, y: Tensor) -> Tensor | None:
        """Share of right answers; None where that means nothing (numbers, mixed targets)."""
        if self.loss in ("mse", "gaussian-nll") or (y.is_floating_point() and self.task != "multilabel"):
            return None
        main, _ = answer(outputs)
        with torch.no_grad():
            right, count = self._right(main.detach(), y)
            return right / count.clamp_min(1)

    def _right(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        if self.task == "multilabel":
            hits = (x > 0) == (match_targets(y, x) > 0.5)
            return hits.sum(), torch.tensor(hits.numel(), device=x.device)
        known = y != _ignored(y)
        return ((x.argmax(self.class_dim) == y) & known).sum(), known.sum()

    # --- validation --------------------------------------------------------------------------------------------------

    def score(self, outputs: Any, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Sum and count of each score of what the model returned in eval; a base model's outputs are taken as they are.

        Negative log-likelihoods are in nats: of the members' mixture for classes, of the normal distribution with its
        mean and variance for numbers that have one.
        """
        found = answered_prediction(outputs)
        if self.loss in ("mse", "gaussian-nll"):
            return self._score_numbers(outputs, found, y)
        x = (found.logits if isinstance(found, Prediction) else answer(outputs)[0]).float()
        if self.task == "multilabel":
            shares = match_targets(y, x)
            nll = F.binary_cross_entropy_with_logits(x, shares, reduction="sum")
            count = torch.tensor(x.numel(), device=x.device)
        else:
            classes = x.movedim(self.class_dim, 1)
            if self.task == "probabilities" and found is None:
                classes = classes.clamp_min(torch.finfo(classes.dtype).tiny).log()
            log_p = F.log_softmax(classes, 1)
            nll = F.nll_loss(log_p, y, ignore_index=_ignored(y), reduction="sum")
            count = (y != _ignored(y)).sum()
        return {"nll": (nll, count), "accuracy": self._right(x, y)}

    def _score_numbers(self, outputs: Any, found: Any, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        if isinstance(found, RegressionPrediction):
            mean, variance = found.mean, found.variance
        else:
            leaves = [leaf.float() for leaf in tree_leaves(outputs)]
            mean = leaves[0]
            variance = leaves[1].exp() if self.loss == "gaussian-nll" else torch.ones_like(mean)
        y = match_targets(y, mean)
        count = torch.tensor(mean.numel(), device=mean.device)
        scores = {"mse": ((mean - y).square().sum(), count)}
        if self.loss == "gaussian-nll":
            nll = F.gaussian_nll_loss(mean, y, variance, reduction="sum") + count * math.log(2 * math.pi) / 2
            scores["nll"] = (nll, count)
        return scores


def answer(outputs: Any) -> tuple[Tensor, list[Tensor]]:
    """The tensor that is the model's answer, and the auxiliary ones of its number of dimensions."""
    if isinstance(outputs, Tensor):
        return outputs, []
    if isinstance(outputs, Mapping):
        names = [name for name in CLASS_KEYS if isinstance(outputs.get(name), Tensor)]
        tensors = [outputs[name] for name in names] or _tensors(outputs)[:1]
    else:
        tensors = _tensors(outputs)
    if not tensors:
        raise ConfigError(f"The model returned {type(outputs).__name__} without a floating-point tensor.")
    main, *others = tensors
    return main, [other for other in others if other.shape[:2] == main.shape[:2] and other.dim() == main.dim()]


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def answered_prediction(outputs: Any) -> Prediction | RegressionPrediction | None:
    """The prediction that is a converted model's answer; None if the outputs are a base model's."""
    if isinstance(outputs, Mapping):
        for name in CLASS_KEYS:
            if isinstance(outputs.get(name), (Prediction, RegressionPrediction)):
                return outputs[name]
    return first_prediction(outputs)


def _ignored(y: Tensor) -> int:
    """Only masks of pixels have ignored ones: class 255 of an image is a class."""
    return IGNORED if y.dim() > 1 else -100


def match_targets(y: Tensor, x: Tensor) -> Tensor:
    """Targets in the shape and the dtype of the output; a ConfigError if they have another number of values."""
    if y.numel() != x.numel() or y.shape[:1] != x.shape[:1]:
        raise ConfigError(
            f"The targets are {tuple(y.shape)}, the model's output is {tuple(x.shape)}. They need as many numbers for "
            f"each sample: change the data, or convert a model with as many outputs (--num-classes)."
        )
    return y.reshape(x.shape).to(x.dtype)

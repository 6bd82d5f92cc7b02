"""What is judged: images, pixels or labels, each with what was predicted and what was true. Bad numbers are refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from masksurgery.data import IGNORED
from masksurgery.losses import match_targets
from masksurgery.prediction import Prediction, RegressionPrediction
from masksurgery.types import EvaluationError

P = TypeVar("P", Prediction, RegressionPrediction, Prediction | RegressionPrediction)


@dataclass(frozen=True)
class Items:
    """The m items of b images.

    Attributes:
        truth: Classes; of labels 0 or 1 [m].
        predicted: The most probable class, or the more probable answer [m].
        nll: Negative log-likelihood of the members' mixture in nats, float64 [m].
        unsure: 1 less the probability of what was predicted, float64 [m].
        loss: Share of wrong items of each image, float64 [b].
        brier: Squared distance of the probabilities from the truth, summed over classes, float64 [m]; None if not
            asked for.
        members: What each member predicts alone [n, m]; None if not asked for.
    """

    truth: Tensor
    predicted: Tensor
    nll: Tensor
    unsure: Tensor
    loss: Tensor
    brier: Tensor | None = None
    members: Tensor | None = None

    @property
    def right(self) -> Tensor:
        return self.predicted == self.truth


def class_items(p: Prediction, y: Tensor, class_dim: int, segmentation: bool, detail: bool) -> Items:
    """The items of a classification: each image or each of its positions, of a segmentation without ignored ones.

    Args:
        p: For b images, classes in dimension `class_dim`.
        y: Classes [b, ...].
        class_dim: Where the classes are in p.mean.
        segmentation: IGNORED is no class.
        detail: With `brier` and `members`.
    Raises:
        EvaluationError: As `known_classes`.
    """
    dim = class_dim % p.logits.dim()
    known = known_classes(p, y, dim, segmentation)
    truth = torch.where(known, y, 0).long()
    predicted = p.logits.argmax(dim)

    def of_truth(x: Tensor) -> Tensor:
        return x.gather(dim, truth.unsqueeze(dim)).squeeze(dim).double()

    brier = members = None
    if detail:
        squares = p.mean.square().sum(dim, dtype=torch.float64)
        brier = (squares - 2 * of_truth(p.mean) + 1).clamp_min(0)[known]
        members = p.members.argmax(dim + 1).movedim(1, 0)[:, known]
    unsure = -torch.expm1(p.logits.amax(dim).double())
    loss = _share((predicted != truth) & known, known)
    return Items(
        truth[known], predicted[known], -of_truth(p.logits)[known], unsure.clamp_min(0)[known], loss, brier, members
    )


def label_items(p: Prediction, y: Tensor, segmentation: bool, detail: bool) -> Items:
    """The items of a multi-label task: each label of each image, a yes or a no. Arguments as for `class_items`.

    Raises:
        EvaluationError, ConfigError: As `known_labels`.
    """
    y, known = known_labels(p, y, segmentation)
    truth, predicted = y == 1, p.logits > 0
    logits = p.logits.double()
    nll = -F.logsigmoid(torch.where(truth, logits, -logits))
    unsure = torch.sigmoid(-logits.abs())
    brier = members = None
    if detail:
        brier = (p.mean.double() - y).square()[known]
        members = (p.members > 0).long().movedim(1, 0)[:, known]
    loss = _share((predicted != truth) & known, known)
    return Items(truth[known].long(), predicted[known].long(), nll[known], unsure[known], loss, brier, members)


def _share(hit: Tensor, of: Tensor) -> Tensor:
    """For each image, float64 [b]."""
    hits, total = (x.flatten(1).sum(1) if x.dim() > 1 else x for x in (hit, of))
    return hits.double() / total.double()


# --- what comes in ---------------------------------------------------------------------------------------------------


def to_device(p: P, device: torch.device) -> P:
    return type(p)(*(x.to(device) for x in p))


def check_numbers(p: Prediction | RegressionPrediction, y: Tensor) -> None:
    """Raise an EvaluationError if predictions or targets are NaN, or, of a regression, infinite."""
    regression = isinstance(p, RegressionPrediction)
    what = "NaN or infinite" if regression else "NaN"
    fields = (p.mean, p.variance) if isinstance(p, RegressionPrediction) else (p.mean, p.logits, p.variance)
    broken = torch.stack([_bad(x, regression) for x in fields]).any(0)
    if bad := int(broken.sum()):
        raise EvaluationError(
            f"The predictions of {bad} of {len(broken)} images in a batch are {what}. Look at these images, or "
            f"evaluate in full precision; a model whose training diverged says nothing else."
        )
    if bad := int(_bad(y, regression).sum()):
        raise EvaluationError(f"The targets of {bad} of {len(y)} images in a batch are {what}. Leave these images out.")


def known_classes(p: Prediction, y: Tensor, dim: int, segmentation: bool) -> Tensor:
    """Which targets count, bool [b, ...]: all, of a segmentation those that are not IGNORED.

    Args:
        p: With k classes in dimension `dim`, at least 0.
        y: Classes [b, ...].
    Raises:
        EvaluationError: y is not of the shape of p without its classes, or holds what is no class.
    """
    k = p.logits.shape[dim]
    shape = p.logits.shape[:dim] + p.logits.shape[dim + 1 :]
    if y.shape != shape or y.is_floating_point():
        raise EvaluationError(
            f"The targets are {str(y.dtype).removeprefix('torch.')} {tuple(y.shape)}, the predictions "
            f"{tuple(p.logits.shape)} with {k} classes in dimension {dim}. Targets have to be the indices of classes "
            f"{tuple(shape)}."
        )
    known = y != IGNORED if segmentation else torch.ones_like(y, dtype=torch.bool)
    if bad := int((((y < 0) | (y >= k)) & known).sum()):
        raise EvaluationError(
            f"{bad} of {y.numel()} targets are no class: they go from {int(y[known].min())} to {int(y[known].max())}, "
            f"the model has the classes 0 to {k - 1}. Evaluate it on the data it was trained for."
        )
    return known


def known_labels(p: Prediction, y: Tensor, segmentation: bool) -> tuple[Tensor, Tensor]:
    """The labels in the shape of p.logits, and which of them count, see `known_classes`.

    Raises:
        EvaluationError: y holds something other than 0 and 1.
        ConfigError: y has another number of labels.
    """
    y = match_targets(y, p.logits)
    known = y != IGNORED if segmentation else torch.ones_like(y, dtype=torch.bool)
    if bad := int((((y != 0) & (y != 1)) & known).sum()):
        raise EvaluationError(f"{bad} of {y.numel()} targets are neither 0 nor 1, as each label has to be.")
    return y, known


def _bad(x: Tensor, infinite: bool) -> Tensor:
    """Which images have a number that cannot be judged [b]."""
    found = ~x.isfinite() if infinite else x.isnan()
    return found.flatten(1).any(1) if x.dim() > 1 else found

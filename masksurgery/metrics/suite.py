"""All the figures of one model on one set of data, in memory that does not grow with the data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from masksurgery.data import IGNORED
from masksurgery.evaluation import METRICS, Curve, Reliability
from masksurgery.metrics.figures import ClassFigures, NumberFigures
from masksurgery.metrics.items import check_numbers, to_device
from masksurgery.metrics.ranking import RankedScores
from masksurgery.metrics.sums import Sums
from masksurgery.prediction import Prediction, RegressionPrediction
from masksurgery.scores import Score, Threshold
from masksurgery.types import EvaluationError, Task


@dataclass(frozen=True)
class Found:
    """What a suite found.

    Attributes:
        figures: By their names in `METRICS`, in its order; those that mean nothing are absent.
        members: The accuracy of each member alone (of a regression the RMSE) [n]; empty for n = 1.
        disagreement: Share of items in which members i and j differ [n][n]; empty for n = 1 and regressions.
        reliability: None where there is nothing to show.
        risk_coverage: By score; empty without `detail`.
        images: How many were evaluated.
    """

    figures: dict[str, float]
    members: tuple[float, ...] = ()
    disagreement: tuple[tuple[float, ...], ...] = ()
    reliability: Reliability | None = None
    risk_coverage: dict[Score, Curve] = field(default_factory=dict)
    images: int = 0


class Suite:
    """The figures of one model, batch by batch.

    An item is an image, in a segmentation a pixel that is not IGNORED, in a multi-label task each label of each image
    (a yes or a no). Over the items:

    - accuracy; nll in nats, of the members' mixture (`Prediction.logits`); brier (Brier 1950), the squared distance of
      the probabilities from the truth summed over the classes, 0 to 2, of a label the one of yes, 0 to 1;
    - top5, of images with more than 5 classes; miou of a segmentation, the mean over the classes that occur in the
      predictions or in the targets: torchmetrics leaves the others out;
    - ece (Guo et al. 2017, arXiv:1706.04599) and adaptive_ece (Nixon et al. 2019, arXiv:1904.01685): the confidence is
      the probability of what is predicted, of a label that of the likelier answer;
    - with several members agreement, disagreement and diversity (Fort et al. 2019, arXiv:1912.02757), which is absent
      where nothing is wrong.

    Of a regression: rmse; nll and coverage90 of the normal distribution with the mean and the variance; crps (Gneiting
    and Raftery 2007), of the members' empirical distribution or, if heteroscedastic, of that normal distribution;
    spread, the root of the mean variance. A variance of 0 somewhere makes the nll infinite. One member without any
    variance has only rmse and crps, which then is the mean absolute error.

    Over images, whose loss is the share of their items that are wrong (of a regression the mean squared error): aurc
    (Geifman et al. 2019, arXiv:1805.08206), ranked by max_probability (of a regression by variance), and with a
    threshold answered and answered_risk (answered_mse). An image whose pixels are all IGNORED is left out.

    Sums are float64, counts int64, and none grows with the data. `compute` adds those of all processes.

    Args:
        task: The model's.
        class_dim: Where the classes stand in the base model's output.
        n: Number of members.
        outputs: Number of classes, labels or numbers.
        segmentation: The items are pixels.
        threshold: To refuse by.
        detail: Else only accuracy, nll, ece and miou, of a regression rmse and nll.
        heteroscedastic: The variance of a regression is not that of the members alone.
        device: Of the sums; predictions and targets are moved there. It needs float64.
    Attributes:
        ranked: The scores of the images, with their losses; only with `detail`, for it is large.
    """

    ranked: RankedScores

    def __init__(
        self,
        task: Task,
        *,
        class_dim: int = 1,
        n: int,
        outputs: int,
        segmentation: bool = False,
        threshold: Threshold | None = None,
        detail: bool = True,
        heteroscedastic: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.task, self.class_dim, self.n, self.segmentation = task, class_dim, n, segmentation
        self.threshold, self.detail, self.device = threshold, detail, torch.device(device)
        self._images = _Images().to(self.device)
        if detail:
            self.ranked = RankedScores(task, n=n, class_dim=class_dim, device=device)
        self._figures: ClassFigures | NumberFigures
        if task == "regression":
            self._figures = NumberFigures(n, heteroscedastic, detail, self.device)
        else:
            self._figures = ClassFigures(task, class_dim, n, outputs, segmentation, detail, self.device)

    @torch.no_grad()
    def update(self, p: Prediction | RegressionPrediction, y: Tensor) -> None:
        """Count a batch.

        Args:
            p: The prediction for b images.
            y: Classes [b, ...] (of a segmentation [b, h, w]), or labels or numbers like p.mean in any shape.
        Raises:
            EvaluationError: Predictions or targets are NaN (of a regression infinite), targets are no classes, or the
                predictions are of another number of members.
            ConfigError: The targets have another number of labels or numbers, or the threshold's score is none of a
                regression.
        """
        p, y = to_device(p, self.device), y.to(self.device)
        if p.members.shape[1] != self.n:
            raise EvaluationError(f"The predictions are of {p.members.shape[1]} members, n={self.n} was said.")
        check_numbers(p, y)
        if self.segmentation:
            some = (y != IGNORED).flatten(1).any(1)
            if not some.all():
                p, y = type(p)(*(x[some] for x in p)), y[some]
        if not len(y):
            return
        unsure = self.threshold.unsure(p, self.task, self.class_dim) if self.threshold and self.detail else None
        loss = self._figures.update(p, y)  # type: ignore[arg-type]
        self._images.update(loss, unsure)
        if self.detail:
            self.ranked.update(p, loss)

    def compute(self) -> Found:
        """What was found, in all processes together: each of them has to call it.

        Raises:
            EvaluationError: There are no images.
        """
        with warnings.catch_warnings():  # of torchmetrics' own: a process may be left without a batch
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            images, refused, lost = self._images.compute()
            if not images:
                raise EvaluationError("There are no images: nothing was evaluated. Give it data.")
            summary = self._figures.compute()
            figures, curves = dict(summary.figures), {}
            if self.detail:
                self.ranked.compute()
                if summary.ranked:
                    figures["aurc"] = self.ranked.aurc(self.ranked.scores[0])
                    curves = {score: self.ranked.curve(score) for score in self.ranked.scores}
        if self.threshold and self.detail:
            figures["answered"] = 1 - refused / images
            if refused < images:
                figures["answered_mse" if self.task == "regression" else "answered_risk"] = lost / (images - refused)
        ordered = {name: figures[name] for name in METRICS if name in figures}
        return Found(ordered, summary.members, summary.disagreement, summary.reliability, curves, images)


class _Images(Sums):
    """Counts images and those that a threshold refuses, and adds the losses of the others."""

    images: Tensor
    refused: Tensor
    loss: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_count("images")
        self.add_count("refused")
        self.add_sum("loss")

    def update(self, loss: Tensor, unsure: Tensor | None = None) -> None:
        """Count b images with their losses [b] and, with a threshold, which of them are refused, bool [b]."""
        self.images += len(loss)
        if unsure is not None:
            self.refused += unsure.sum()
            self.loss += loss[~unsure].sum()

    def compute(self) -> tuple[int, int, float]:
        return int(self.images), int(self.refused), self.loss.item()

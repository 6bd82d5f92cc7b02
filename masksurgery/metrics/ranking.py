"""The images of a data set ranked by how unsure their predictions are, and the error among the surest."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from masksurgery.evaluation import Curve
from masksurgery.metrics.bins import BINS, bin_edges, bin_index, tally
from masksurgery.metrics.items import to_device
from masksurgery.metrics.sums import Sums
from masksurgery.prediction import Prediction, RegressionPrediction
from masksurgery.scores import SCORES, Score, image_scores
from masksurgery.types import EvaluationError, Task


class RankedScores(Sums):
    """How many images have which score, and the sum of their losses, in bins of 0.025%.

    Every figure is made of what `compute` returns, which adds the states of all processes once and remembers them
    until the next update. So all processes ask for a figure, or call `compute` first.

    Args:
        task: The model's.
        n: Number of members. One member cannot disagree: a classification then has neither "mutual_information" nor
            "variance".
        class_dim: Where the classes stand in the base model's output.
        device: Of the sums.
    Attributes:
        scores: Those that are kept.
    """

    counts: Tensor
    losses: Tensor
    judged: Tensor

    def __init__(self, task: Task, *, n: int, class_dim: int = 1, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.task, self.class_dim = task, class_dim
        self.scores: tuple[Score, ...] = ("variance",) if task == "regression" else SCORES if n > 1 else SCORES[:2]
        self.add_count("counts", len(self.scores), BINS)
        self.add_sum("losses", len(self.scores), BINS)
        self.add_count("judged")
        self.to(device)

    def update(self, p: Prediction | RegressionPrediction, loss: Tensor | None = None) -> None:
        """Count the images of a batch.

        Args:
            p: The prediction for b images.
            loss: Of each image [b]; None where there are no targets.
        Raises:
            EvaluationError: Scores are NaN.
        """
        scores = image_scores(to_device(p, self.counts.device), self.task, self.class_dim)
        u = torch.stack([scores[name] for name in self.scores])
        if bad := int(u.isnan().any(0).sum()):
            raise EvaluationError(
                f"The scores of {bad} of {u.shape[1]} images are NaN: the model returned NaN for them. Look at these "
                f"images, or evaluate in full precision."
            )
        for row, index in enumerate(bin_index(u)):
            tally(self.counts[row], index)
            if loss is not None:
                self.losses[row].index_add_(0, index, loss.to(self.losses))
        if loss is not None:
            self.judged += len(loss)

    def compute(self) -> tuple[Tensor, Tensor, int]:
        """Counts and sums of losses [scores, BINS] of all processes, on the CPU; how many images had a loss."""
        return self.counts.cpu(), self.losses.cpu(), int(self.judged)

    # --- what was counted --------------------------------------------------------------------------------------------

    def counted(self, score: Score) -> np.ndarray:
        """Number of images in each bin, int64 [BINS].

        Raises:
            EvaluationError: The score is not kept, or there are no images.
        """
        if score not in self.scores:
            raise EvaluationError(
                f"The score {score!r} means nothing here, where there are {', '.join(map(repr, self.scores))}."
            )
        counts = self.compute()[0][self.scores.index(score)].numpy()
        if not counts.any():
            raise EvaluationError("There are no images: nothing was evaluated. Give it data.")
        return counts

    def cumulated(self, score: Score) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Counts and losses from the surest on.

        Returns:
            Of the bins that hold any: their indices, how many images there are up to and with each, and the sum of the
            losses of these.
        Raises:
            EvaluationError: The score is not kept, there are no images, or some came without a loss.
        """
        counts = self.counted(score)
        _, losses, judged = self.compute()
        if judged != counts.sum():
            raise EvaluationError(f"{counts.sum() - judged} images have no loss: the error needs targets.")
        occupied = counts.nonzero()[0]
        loss = losses[self.scores.index(score)].numpy()[occupied]
        return occupied, counts[occupied].cumsum(), loss.cumsum()

    def quantile(self, score: Score, share: float) -> float:
        """The upper edge of the first bin with at least this share of the images in it or below."""
        up_to = self.counted(score).cumsum()
        return float(bin_edges()[int(np.argmax(up_to / up_to[-1] >= share)) + 1])

    # --- risk and coverage -------------------------------------------------------------------------------------------

    def aurc(self, score: Score) -> float:
        """Area under the risk-coverage curve: the mean over k = 1..N of the mean loss of the k surest images.

        Within a bin, where the order is not known, the expectation over all orders: c images with the summed loss L
        after C images with the sum S add sum_{k=C+1}^{C+c} (S + (k - C) L/c) / k to N times the figure, which is
        L + (S - C L/c) (H(C + c) - H(C)) with the harmonic numbers H.

        Source:
            Geifman, Uziel, El-Yaniv 2019, arXiv:1805.08206.
        """
        _, up_to, total = self.cumulated(score)
        count, loss = np.diff(up_to, prepend=0), np.diff(total, prepend=0.0)
        before, sum_before = up_to - count, total - loss
        harmonic = torch.digamma(torch.from_numpy(np.stack([up_to, before]) + 1.0)).numpy()
        parts = loss + (sum_before - before * loss / count) * (harmonic[0] - harmonic[1])
        return float(parts.sum() / up_to[-1])

    def curve(self, score: Score, points: int = 200) -> Curve:
        """The mean loss of the surest images over their share of all; within a bin the expectation."""
        _, up_to, total = self.cumulated(score)
        k = np.unique(np.linspace(1, up_to[-1], points).round())
        loss = np.interp(k, np.append(0, up_to), np.append(0.0, total)) / k
        return Curve(tuple((k / up_to[-1]).tolist()), tuple(loss.tolist()))

"""Images to look at: the surest, the most uncertain and the wrong ones of a data set, in memory that does not grow."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from masksurgery.data import IGNORED
from masksurgery.evaluation import Sample, Vote
from masksurgery.prediction import Prediction, RegressionPrediction
from masksurgery.scores import SCORES, Score, Threshold, image_scores, item_scores
from masksurgery.subjects import Subject
from masksurgery.thumbnails import encode, encode_classes, encode_grey, to_classes, to_grey, to_picture
from masksurgery.types import check_choice

NAMED = 5
"""Labels or numbers of one image that are written out."""

LARGE = 3
"""Classes of a segmentation that are written out."""


@dataclass(frozen=True, order=True)
class _Candidate:
    """An image that may stay in a gallery; the smallest come first.

    Attributes:
        key: The score, or less the score.
        position: In the data set; of two with one key the first comes first.
        gallery: Which.
        sample: All of it but the pictures.
        picture: uint8 [c, h, w].
        classes: Further pictures by their titles, of the classes of pixels, uint8 [h, w].
        variance: Of each pixel, uint8 [h, w].
    """

    key: float
    position: int
    gallery: str = field(compare=False)
    sample: Sample = field(compare=False)
    picture: Tensor = field(compare=False)
    classes: tuple[tuple[str, Tensor], ...] = field(default=(), compare=False)
    variance: Tensor | None = field(default=None, compare=False)

    def encoded(self) -> Sample:
        maps = [(title, encode_classes(classes)) for title, classes in self.classes]
        if self.variance is not None:
            maps.append(("variance", encode_grey(self.variance)))
        return replace(self.sample, image=encode(self.picture), maps=tuple(maps))


class Galleries:
    """The galleries of one model and one set of images; at most `size` candidates of each are kept.

    Of known images these are "surest", "uncertain" and, if they have one answer, "wrong": the surest of the wrong ones.
    Of unknown images it is "unknown": the surest ones.

    Args:
        subject: The model.
        size: Images in a gallery.
        score: By which they are ranked, the mean over an image; of a regression always the variance.
        called: The name of the image at a position.
        labels: Names of the classes; where their number does not fit the classes are numbered.
        known: The images have targets.
        threshold: Says which images get no answer.
    Raises:
        ConfigError: There is no such score.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        size: int = 8,
        score: Score = "entropy",
        called: Callable[[int], str],
        labels: Sequence[str] | None,
        known: bool = True,
        threshold: Threshold | None = None,
    ) -> None:
        check_choice("score", score, SCORES)
        self.subject, self.size, self.called, self.known, self.threshold = subject, size, called, known, threshold
        self.score: Score = "variance" if subject.task == "regression" else score
        fits = labels is not None and len(labels) == subject.outputs
        self.labels = list(labels) if labels and fits else [f"class {k}" for k in range(subject.outputs)]
        self.judged = known and subject.task != "regression" and not subject.segmentation
        names = ("surest", "uncertain", *(("wrong",) if self.judged else ())) if known else ("unknown",)
        self._found: dict[str, list[_Candidate]] = {name: [] for name in names}

    def update(self, x: Tensor, p: Prediction | RegressionPrediction, y: Tensor, positions: Tensor) -> None:
        """Look at a batch.

        Args:
            x: Normalised images [b, c, h, w].
            p: What the model predicts for them.
            y: Their targets; of unknown images not looked at.
            positions: In the data set [b].
        """
        scores = image_scores(p, self.subject.task, self.subject.class_dim)[self.score].cpu().numpy()
        places = positions.cpu().numpy()
        usable = ~np.isnan(scores)
        wrong = ~self._right(p, y).cpu().numpy() if self.judged else usable
        for gallery, found in self._found.items():
            keys = -scores if gallery == "uncertain" else scores
            order = np.lexsort((places, keys))
            allowed = usable & wrong if gallery == "wrong" else usable
            for i in order[allowed[order]][: self.size].tolist():
                rank = (float(keys[i]), int(places[i]))
                if len(found) == self.size and rank > (found[-1].key, found[-1].position):
                    break
                one = type(p)(*(part[i : i + 1] for part in p))
                insort(found, self._candidate(*rank, gallery, x[i], one, y[i : i + 1]))
                del found[self.size :]

    def collect(self, gather: Callable[[list[Any]], list[Any]]) -> dict[str, tuple[Sample, ...]]:
        """The galleries that are not empty, by their names; the same for any number of processes.

        Args:
            gather: Joins the lists of all processes, as `accelerate.utils.gather_object` does. It is called once.
        """
        everything = gather([candidate for found in self._found.values() for candidate in found])
        chosen = {name: sorted(c for c in everything if c.gallery == name)[: self.size] for name in self._found}
        return {name: tuple(c.encoded() for c in candidates) for name, candidates in chosen.items() if candidates}

    # --- one image, as a batch of one --------------------------------------------------------------------------------

    def _candidate(
        self, key: float, position: int, gallery: str, x: Tensor, p: Prediction | RegressionPrediction, y: Tensor
    ) -> _Candidate:
        subject, config = self.subject, self.subject.preprocessing.config
        picture = to_picture(x, config["mean"], config["std"])
        scores = image_scores(p, subject.task, subject.class_dim)
        sample = Sample(
            name=self.called(position),
            image=b"",
            truth=self._describe(y) if self.known else None,
            predicted=self._describe(self._answer(p.mean)),
            right=bool(self._right(p, y)) if self.judged else None,
            scores={name: float(score) for name, score in scores.items()},
            votes=() if subject.segmentation else tuple(self._votes(p)),
            unsure=None if self.threshold is None else bool(self.threshold.unsure(p, subject.task, subject.class_dim)),
        )
        if not subject.segmentation:
            return _Candidate(key, position, gallery, sample, picture)
        classes = [("prediction", to_classes(self._answer(p.mean)[0], picture))]
        if self.known:
            classes.append(("truth", to_classes(y[0], picture)))
        of_pixels = item_scores(p, subject.task, subject.class_dim)["variance"][0]
        variance = to_grey(of_pixels, picture) if subject.n > 1 else None
        return _Candidate(key, position, gallery, sample, picture, tuple(classes), variance)

    def _answer(self, mean: Tensor) -> Tensor:
        """What a mean says, in the form of the targets: classes, labels that are there, or numbers."""
        if self.subject.task in ("classification", "probabilities"):
            return mean.argmax(self.subject.class_dim)
        return mean > 0.5 if self.subject.task == "multilabel" else mean

    def _right(self, p: Prediction | RegressionPrediction, y: Tensor) -> Tensor:
        """Which images are answered rightly, of "multilabel" in all labels [b]."""
        answers = self._answer(p.mean)
        same = answers == (y.reshape(answers.shape) > 0.5 if self.subject.task == "multilabel" else y)
        return same.flatten(1).all(1) if same.dim() > 1 else same

    def _describe(self, target: Tensor) -> str:
        """A target, or an answer, of one image."""
        values = target.flatten().cpu()
        if self.subject.task == "regression":
            return _listed([f"{value:.4g}" for value in values.tolist()])
        if self.subject.task == "multilabel":
            return _listed([self.labels[k] for k in (values > 0.5).nonzero().flatten().tolist()]) or "none"
        if not self.subject.segmentation:
            return self.labels[int(values)]
        counts = values[values != IGNORED].bincount(minlength=1)
        largest = counts.argsort(descending=True, stable=True)[:LARGE].tolist()
        total = int(counts.sum())
        return ", ".join(f"{self.labels[k]} {counts[k] / total:.0%}" for k in largest if counts[k]) or "none"

    def _votes(self, p: Prediction | RegressionPrediction) -> list[Vote]:
        members = p.members[0]
        if isinstance(p, RegressionPrediction):
            return [Vote(self._describe(member)) for member in members]
        if self.subject.task == "multilabel":
            return [Vote(self._describe(member.sigmoid())) for member in members]
        best = members.flatten(1).softmax(1).max(1)
        return [Vote(self.labels[k], p) for p, k in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:NAMED]) + (" ..." if len(parts) > NAMED else "")

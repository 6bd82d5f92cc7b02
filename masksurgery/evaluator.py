"""One model over all sets of an evaluation, batch by batch; nothing that is kept grows with the number of images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from masksurgery.calibration import TemperatureFit, fit_threshold
from masksurgery.corruptions import SEVERITIES, corrupt
from masksurgery.data import EvaluationData, Source, Stream, eval_batches, name_of
from masksurgery.evaluation import ModelEvaluation, Sample
from masksurgery.evaluation_config import EvaluateConfig
from masksurgery.evaluation_data import Sets, match_classes
from masksurgery.galleries import Galleries
from masksurgery.images import readable
from masksurgery.metrics import Found, RankedScores, Suite, detect, histograms, roc
from masksurgery.metrics.items import to_device
from masksurgery.prediction import Prediction, RegressionPrediction
from masksurgery.scores import Score, Threshold
from masksurgery.subjects import Subject
from masksurgery.training_data import tell_broken

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

Observer: TypeAlias = "Callable[[str, int, int | None], None]"
"""Is told what is being done, and how many of how many images are done (None where that is not known)."""

Batch: TypeAlias = "tuple[Tensor, Tensor, Tensor]"


class Evaluator:
    """Evaluates one model.

    Args:
        subject: It. The temperature that is fitted is set on it.
        sets: The data.
        config: What is measured, and what is fitted.
        accelerator: Accelerate's.
        seed: Of what corruption draws.
        observer: Is told what is going on, on the main process.
        tell: Name the broken images of streams; once is enough for all models.
    Raises:
        ConfigError, DataError: The classes of the data are not the model's, see `match_classes`.
    Attributes:
        images: How many were evaluated.
        ood_images: How many of each set.
    """

    def __init__(
        self,
        subject: Subject,
        sets: Sets,
        config: EvaluateConfig,
        accelerator: Accelerator,
        seed: int = 0,
        observer: Observer | None = None,
        tell: bool = True,
    ) -> None:
        self.tell = tell and accelerator.is_main_process
        self.subject, self.sets, self.config, self.seed = subject, sets, config, seed
        self.accelerator, self.observer = accelerator, observer if accelerator.is_main_process else None
        # Sums in float64, which not every device has: on the CPU, unless several devices have to add theirs up.
        self.device = accelerator.device if accelerator.num_processes > 1 else torch.device("cpu")
        self.classes = match_classes(subject, sets.known.classes)
        self.images, self.ood_images = 0, dict.fromkeys(sets.ood, 0)
        self.make_suite = partial(
            Suite,
            subject.task,
            class_dim=subject.class_dim,
            n=subject.n,
            outputs=subject.outputs,
            segmentation=subject.segmentation,
            heteroscedastic=subject.heteroscedastic,
            device=self.device,
        )

    def run(self) -> ModelEvaluation:
        """Fit what is to be fitted, then evaluate on all sets.

        Raises:
            DataError: An image cannot be read.
            EvaluationError: A prediction is no number, or nothing can be fitted.
        """
        subject = self.subject
        subject.model.to(self.accelerator.device).eval()
        threshold = self._fit()
        suite = self.make_suite(threshold=threshold)
        corrupted = {
            (kind, severity): self.make_suite(detail=False)
            for kind in self.config.kinds
            for severity in range(1, SEVERITIES + 1)
        }
        galleries = self._galleries(self.sets.known, threshold)
        for x, y, positions in self._batches(self.sets.known.source, "evaluating"):
            p = self._predict(x)
            suite.update(p, y)
            galleries.update(x, p, y, positions)
            for (kind, severity), one in corrupted.items():
                one.update(*self._corrupted(x, y, positions, kind, severity))
        found = suite.compute()
        self.images = found.images
        unknown, shown = self._detect(threshold)
        subject.model.cpu()  # the next one needs the room
        return ModelEvaluation(
            name=subject.name,
            kind=subject.kind,
            n=subject.n,
            figures=found.figures,
            temperature=None if subject.temperature == 1 else subject.temperature,
            threshold=threshold,
            members=found.members,
            disagreement=found.disagreement,
            reliability=found.reliability,
            risk_coverage=found.risk_coverage,
            histograms=histograms({"": suite.ranked, **unknown}),
            detection={name: detect(suite.ranked, ranked) for name, ranked in unknown.items()},
            roc={name: roc(suite.ranked, ranked) for name, ranked in unknown.items()},
            corruption=_by_kind({key: one.compute() for key, one in corrupted.items()}),
            galleries={**galleries.collect(self._gather), **({"unknown": shown} if shown else {})},
        )

    # --- fitting -----------------------------------------------------------------------------------------------------

    def _fit(self) -> Threshold | None:
        """Fit the temperature, then the threshold under it; returns the threshold that holds."""
        subject, config = self.subject, self.config
        threshold: Threshold | None = subject.threshold
        if config.fits and subject.task == "regression" and subject.n == 1 and not subject.heteroscedastic:
            logger.warning("%s: says no variance, so that nothing can be fitted to it.", subject.name)
            return None
        if config.temperature:
            assert self.sets.held is not None
            subject.temperature = 1.0
            fit = TemperatureFit(
                subject.task, class_dim=subject.class_dim, segmentation=subject.segmentation, device=self.device
            )
            for x, y, _ in self._batches(self.sets.held, "fitting the temperature"):
                fit.update(self._predict(x), y.to(self.device))
            subject.temperature = fit.compute_temperature(subject.name)
            if threshold is not None and not config.fits_threshold:
                logger.warning(
                    "%s: the threshold was fitted under another temperature, and is dropped. Fit it again with "
                    "coverage or risk.",
                    subject.name,
                )
                threshold = None
        if config.fits_threshold:
            assert self.sets.held is not None
            suite = self.make_suite()
            for x, y, _ in self._batches(self.sets.held, "fitting the threshold"):
                suite.update(self._predict(x), y)
            score: Score = config.score or suite.ranked.scores[0]
            if score not in suite.ranked.scores:
                logger.warning("%s: one member has no %s, so that no threshold is fitted to it.", subject.name, score)
                return None
            threshold = fit_threshold(suite.ranked, score, coverage=config.coverage, risk=config.risk)
        return threshold

    # --- out-of-distribution data ------------------------------------------------------------------------------------

    def _detect(self, threshold: Threshold | None) -> tuple[dict[str, RankedScores], tuple[Sample, ...]]:
        """The scores of each set, and the images of all of them that the model is surest of."""
        subject, scores = self.subject, {}
        shown: list[Sample] = []
        for name, data in self.sets.ood.items():
            ranked = RankedScores(subject.task, n=subject.n, class_dim=subject.class_dim, device=self.device)
            galleries = self._galleries(data, threshold, known=False)
            for x, y, positions in self._batches(data.source, f"out of distribution: {name}", known=False):
                p = self._predict(x)
                ranked.update(p)
                galleries.update(x, p, y, positions)
            scores[name] = ranked
            counts, *_ = ranked.compute()
            self.ood_images[name] = int(counts[0].sum())
            shown += galleries.collect(self._gather).get("unknown", ())
        shown.sort(key=lambda sample: sample.scores[galleries.score])
        return scores, tuple(shown[: self.config.gallery])

    # --- batches -----------------------------------------------------------------------------------------------------

    def _batches(self, source: Source | Stream, text: str, known: bool = True) -> Iterator[Batch]:
        """Images on the device with their targets, and the position of each in the set."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        transform = self.subject.preprocessing.evaluation(masks=self.sets.known.masks)
        source = replace(source, channels=self.subject.preprocessing.channels)  # type: ignore[type-var]
        size, workers = self.config.batch_size, self.config.workers
        pinned = torch.cuda.is_available()
        batches = eval_batches(
            source, transform, batch_size=size, rank=rank, world=world, workers=workers, pin_memory=pinned
        )
        total = len(source) if isinstance(source, Source) else None
        done = 0
        for x, y in batches:
            if self.observer is not None:
                self.observer(f"{self.subject.name}: {text}", min(done * world, total or done * world), total)
            positions = rank + world * torch.arange(done, done + len(x))
            if self.classes is not None and known:
                y = self.classes[y]
            yield x.to(self.accelerator.device, non_blocking=True), y.to(self.device), positions
            done += len(x)
        if self.tell:
            tell_broken(batches.bad)

    def _predict(self, x: Tensor) -> Prediction | RegressionPrediction:
        with torch.inference_mode(), self.accelerator.autocast():
            p = self.subject.model(x)
        return to_device(p, self.device)

    def _corrupted(
        self, x: Tensor, y: Tensor, positions: Tensor, kind: str, severity: int
    ) -> tuple[Prediction | RegressionPrediction, Tensor]:
        mean, std = (self.subject.preprocessing.config[name] for name in ("mean", "std"))
        x, y = corrupt(x, y, kind, severity, mean=mean, std=std, positions=positions, seed=self.seed)
        return self._predict(x), y

    # --- pictures ----------------------------------------------------------------------------------------------------

    def _galleries(self, data: EvaluationData, threshold: Threshold | None, known: bool = True) -> Galleries:
        return Galleries(
            self.subject,
            size=self.config.gallery,
            called=partial(_short_name, data.source),
            labels=self.subject.display_names or self.sets.known.classes,
            known=known,
            threshold=threshold,
        )

    def _gather(self, parts: list[Any]) -> list[Any]:
        if self.accelerator.num_processes == 1:
            return parts
        from accelerate.utils import gather_object

        return gather_object(parts)


def _short_name(source: Source | Stream, position: int) -> str:
    """What an image is called: of a file the path inside of the folder of the set, with the name of that."""
    name = name_of(source, position)
    place = source.items.place if isinstance(source, Source) else None
    if place is None or not place.is_dir():
        return name
    return name.removeprefix(readable(place.parent)).lstrip("/\\")


def _by_kind(found: Mapping[tuple[str, int], Found]) -> dict[str, tuple[Mapping[str, float], ...]]:
    """The figures of the severities, which come in order."""
    kinds = dict.fromkeys(kind for kind, _ in found)
    return {kind: tuple(one.figures for (other, _), one in found.items() if other == kind) for kind in kinds}

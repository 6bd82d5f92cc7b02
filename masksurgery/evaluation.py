"""What an evaluation found: figures, curves and pictures as plain data, which JSON, CSV, tables and reports show."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from masksurgery.scores import Score, Threshold
from masksurgery.types import Task
from masksurgery.weights import replace_file


@dataclass(frozen=True)
class Metric:
    """How a figure is shown.

    Attributes:
        title: In tables.
        better: Which way is better; None where neither is.
        text: What it is, in a sentence.
        percent: It is a share.
    """

    title: str
    better: Literal["higher", "lower"] | None
    text: str
    percent: bool = False


METRICS: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy", "higher", "Share of right answers.", True),
    "top5": Metric("top-5", "higher", "Share of answers with the right class among the five most probable.", True),
    "miou": Metric("mIoU", "higher", "Intersection over union, the mean over classes.", True),
    "nll": Metric("NLL", "lower", "Negative log-likelihood in nats."),
    "brier": Metric("Brier", "lower", "Squared distance of the probabilities from the truth, summed over classes."),
    "ece": Metric("ECE", "lower", "Expected calibration error over 15 bins of equal width."),
    "adaptive_ece": Metric("adaptive ECE", "lower", "Expected calibration error over 15 bins of equal count."),
    "aurc": Metric("AURC", "lower", "Mean error over all coverages, the surest images first."),
    "agreement": Metric("agreement", None, "Share of answers in which all members agree.", True),
    "disagreement": Metric(
        "disagreement", None, "Share of answers in which two members differ, mean over pairs.", True
    ),
    "diversity": Metric("diversity", None, "Disagreement relative to the error rate of the mean."),
    "rmse": Metric("RMSE", "lower", "Root of the mean squared error."),
    "coverage90": Metric("90% interval", None, "Share of truths inside of the central 90% interval.", True),
    "crps": Metric("CRPS", "lower", "Continuous ranked probability score."),
    "spread": Metric("spread", None, "Root of the mean variance of the predictions."),
    "answered": Metric("answered", None, "Share of images that the threshold lets answer.", True),
    "answered_risk": Metric("their error", "lower", "Error among the answered ones.", True),
    "answered_mse": Metric("their squared error", "lower", "Mean squared error among the answered ones."),
}
"""All figures of a model, in the order of tables. Which a model has depends on its task and its number of members."""

DETECTION: Mapping[str, Metric] = {
    "auroc": Metric("AUROC", "higher", "Probability that an unknown image is less sure than a known one.", True),
    "aupr": Metric("AUPR", "higher", "Average precision, the unknown images being what is to be found.", True),
    "fpr95": Metric("FPR95", "lower", "Share of unknown images accepted where 95% of the known ones are.", True),
}
"""The figures of a score against out-of-distribution data."""


SCORE_TITLES: Mapping[Score, str] = {
    "max_probability": "max probability",
    "entropy": "entropy",
    "mutual_information": "mutual information",
    "variance": "variance",
}


def find_best(metric: Metric, values: Sequence[float | None], texts: Sequence[str]) -> list[bool]:
    """Which figures are the best, unless all are equal. What cannot be told apart in the text is equal."""
    ranked = sorted(
        (value, text) for value, text in zip(values, texts, strict=True) if value is not None and math.isfinite(value)
    )
    if metric.better is None or len({text for _, text in ranked}) < 2:
        return [False] * len(texts)
    best = ranked[-1 if metric.better == "higher" else 0][1]
    return [text == best for text in texts]


def write_limit(threshold: Threshold) -> str:
    """The value of a threshold; of a probability near 1 the digits that tell it from 1."""
    value = threshold.value
    if threshold.score != "max_probability" or not 0.99 < value < 1:
        return f"{value:#.3g}".removesuffix(".")
    return f"{value:.{min(math.ceil(-math.log10(1 - value)) + 1, 16)}f}"


@dataclass(frozen=True)
class Curve:
    """Points of a line."""

    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True)
class Histogram:
    """Shares of a distribution between edges [k + 1]: shares [k] sum to 1."""

    edges: tuple[float, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Reliability:
    """Bins of equal width by confidence; of a bin without items confidence and accuracy are None.

    Of a regression: for each level (`confidence`) of a central interval the share inside (`accuracy`).
    """

    confidence: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Vote:
    """What one member says: a class (or a number as text), and its probability (None of a regression)."""

    label: str
    probability: float | None = None


@dataclass(frozen=True)
class Sample:
    """An image of a gallery.

    Attributes:
        name: Of the file.
        image: PNG or JPEG.
        truth: Its label, or number as text; None where it has none.
        predicted: Likewise.
        right: The two agree; None where that means nothing.
        scores: By name, as `image_scores` gives them.
        votes: Of each member; of segmentation none.
        maps: Further pictures with their titles: the prediction and the variance of a segmentation.
        unsure: The threshold refuses it; None without one.
    """

    name: str
    image: bytes = field(repr=False)
    truth: str | None
    predicted: str
    right: bool | None
    scores: Mapping[str, float]
    votes: tuple[Vote, ...] = ()
    maps: tuple[tuple[str, bytes], ...] = field(default=(), repr=False)
    unsure: bool | None = None


GALLERIES: Mapping[str, str] = {
    "surest": "The surest",
    "uncertain": "The most uncertain",
    "wrong": "Wrong but sure",
    "unknown": "Unknown but sure",
}
"""The galleries of a model, with their titles."""


@dataclass(frozen=True)
class ModelEvaluation:
    """What was found for one model.

    Attributes:
        name: The folder, or timm's name.
        kind: "base" or "converted".
        n: Number of members; 1 for a base model.
        figures: By their names in `METRICS`.
        temperature: That the figures were taken with; None if there is none.
        threshold: To refuse by; None if there is none.
        members: The accuracy of each member alone (of a regression the RMSE) [n].
        disagreement: Share of answers in which members i and j differ [n][n]; empty for n = 1 and regressions.
        reliability: None where there is nothing to show.
        risk_coverage: The error (of a regression the squared error) over the coverage, by score.
        histograms: Of each image's scores: by score, then by set; "" is the set that is evaluated.
        detection: By set of out-of-distribution data, then by score, the figures in `DETECTION`.
        roc: By set, then by score: the share of unknown images that is refused (y) over that of the known ones (x).
        corruption: By kind, for the severities 1 to 5, some of `METRICS`.
        galleries: By their names in `GALLERIES`; empty ones are left out.
    """

    name: str
    kind: Literal["base", "converted"]
    n: int
    figures: Mapping[str, float]
    temperature: float | None = None
    threshold: Threshold | None = None
    members: tuple[float, ...] = ()
    disagreement: tuple[tuple[float, ...], ...] = ()
    reliability: Reliability | None = None
    risk_coverage: Mapping[Score, Curve] = field(default_factory=dict)
    histograms: Mapping[Score, Mapping[str, Histogram]] = field(default_factory=dict)
    detection: Mapping[str, Mapping[Score, Mapping[str, float]]] = field(default_factory=dict)
    roc: Mapping[str, Mapping[Score, Curve]] = field(default_factory=dict)
    corruption: Mapping[str, tuple[Mapping[str, float], ...]] = field(default_factory=dict)
    galleries: Mapping[str, tuple[Sample, ...]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Evaluation:
    """Several models on one set of data.

    Attributes:
        data: What it was.
        images: How many were evaluated.
        fitted_on: How many of the set were held out to fit temperature or threshold on.
        task: Of all models.
        segmentation: The items are pixels.
        ood: Sets of out-of-distribution data, with the number of their images.
        models: In the order that they were given.
        classes: Their names; None where they are not known.
        versions: Of the packages.
    """

    data: str
    images: int
    task: Task
    models: tuple[ModelEvaluation, ...]
    fitted_on: int = 0
    segmentation: bool = False
    ood: Mapping[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, without the galleries' pictures; what is not finite becomes None."""
        record = {f.name: getattr(self, f.name) for f in fields(self)}
        return _plain({**record, "models": [_of_model(model) for model in self.models]})

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as text; figures that are no number are null."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    def rows(self) -> Iterator[tuple[str, str, str, str, int | None, str, float]]:
        """Every figure as (model, set, score, corruption, severity, metric, value)."""
        for m in self.models:
            for name, value in m.figures.items():
                yield m.name, self.data, "", "", None, name, value
            for data, scores in m.detection.items():
                for score, found in scores.items():
                    for name, value in found.items():
                        yield m.name, data, score, "", None, name, value
            for kind, severities in m.corruption.items():
                for severity, found in enumerate(severities, 1):
                    for name, value in found.items():
                        yield m.name, self.data, "", kind, severity, name, value

    def write_json(self, file: Path) -> None:
        """Write `to_json`; a CheckpointError if that fails."""
        replace_file(file, lambda draft: draft.write_text(self.to_json() + "\n", encoding="utf-8"))

    def write_csv(self, file: Path) -> None:
        """Write `rows` with a heading; a CheckpointError if that fails."""

        def write(draft: Path) -> None:
            with draft.open("w", encoding="utf-8", newline="") as stream:
                writer = csv.writer(stream)
                writer.writerow(("model", "set", "score", "corruption", "severity", "metric", "value"))
                writer.writerows(self.rows())

        replace_file(file, write)


def _of_model(model: ModelEvaluation) -> dict[str, Any]:
    record = {f.name: getattr(model, f.name) for f in fields(model)}
    record["galleries"] = {
        name: [{f.name: getattr(s, f.name) for f in fields(s) if f.name not in ("image", "maps")} for s in samples]
        for name, samples in model.galleries.items()
    }
    return record


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

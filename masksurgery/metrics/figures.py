"""The figures of a task, each an accumulator of fixed size; they are fed batch by batch and read once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy, MulticlassJaccardIndex

from masksurgery.evaluation import Reliability
from masksurgery.losses import match_targets
from masksurgery.metrics.confidence import EqualCount, EqualWidth, calibration_error, reliability
from masksurgery.metrics.items import class_items, label_items
from masksurgery.metrics.members import Agreement, diversity, mean_disagreement
from masksurgery.metrics.normal import LEVELS, NormalFit, crps_of_members, crps_of_normal, interval_reliability
from masksurgery.metrics.sums import Mean
from masksurgery.prediction import Prediction, RegressionPrediction
from masksurgery.types import Task

M = TypeVar("M", bound=Metric)


@dataclass(frozen=True)
class Summary:
    """What the accumulators say, see `masksurgery.metrics.Found`; `ranked` where scores have a meaning."""

    figures: Mapping[str, float]
    members: tuple[float, ...] = ()
    disagreement: tuple[tuple[float, ...], ...] = ()
    reliability: Reliability | None = None
    ranked: bool = True


def precise(metric: M) -> M:
    """With its sums and counts in float64: in float32 those of more than 2^24 items stand still."""
    return metric.set_dtype(torch.float64)  # type: ignore[return-value]


@dataclass
class ClassFigures:
    """Of classes or labels. `outputs` is their number; the rest as for `Suite`."""

    task: Task
    class_dim: int
    n: int
    outputs: int
    segmentation: bool
    detail: bool
    device: torch.device
    parts: dict[str, Metric] = field(init=False)

    def __post_init__(self) -> None:
        labels = self.task == "multilabel"
        parts: dict[str, Metric] = {"accuracy": self._accuracy(1), "nll": Mean(), "ece": EqualWidth()}
        if self.segmentation and not labels:
            parts["miou"] = MulticlassJaccardIndex(self.outputs, average="macro", validate_args=False)
        if self.detail:
            parts |= {"brier": Mean(), "adaptive_ece": EqualCount()}
            if self.n > 1:
                parts["agreement"] = Agreement(self.n)
            if self.outputs > 5 and not labels and not self.segmentation:
                parts["top5"] = self._accuracy(5)
        self.parts = {name: part.to(self.device) for name, part in parts.items()}

    def _accuracy(self, top_k: int) -> Metric:
        if self.task == "multilabel":
            return precise(BinaryAccuracy(validate_args=False))
        return precise(MulticlassAccuracy(self.outputs, top_k=top_k, average="micro", validate_args=False))

    def update(self, p: Prediction, y: Tensor) -> Tensor:
        """Count a batch of b images, and return the share of wrong items of each [b]."""
        if self.task == "multilabel":
            items = label_items(p, y, self.segmentation, self.detail)
        else:
            items = class_items(p, y, self.class_dim, self.segmentation, self.detail)
        seen = {
            "accuracy": (items.predicted, items.truth),
            "miou": (items.predicted, items.truth),
            "nll": (items.nll,),
            "brier": (items.brier,),
            "ece": (items.unsure, items.right),
            "adaptive_ece": (items.unsure, items.right),
            "agreement": (items.members, items.truth),
        }
        if "top5" in self.parts:
            seen["top5"] = (p.logits.movedim(self.class_dim, 1), y)
        for name, part in self.parts.items():
            part.update(*seen[name])
        return items.loss

    def compute(self) -> Summary:
        found = {name: part.compute() for name, part in self.parts.items()}
        tables = {name: found.pop(name) for name in ("ece", "adaptive_ece") if name in found}
        alike, members, differ = found.pop("agreement", (None, (), ()))
        figures = {name: value.item() for name, value in found.items()}
        figures |= {name: calibration_error(table) for name, table in tables.items()}
        if alike is not None:
            figures |= {"agreement": alike, "disagreement": mean_disagreement(differ)}
            if (ratio := diversity(figures["disagreement"], figures["accuracy"])) is not None:
                figures["diversity"] = ratio
        return Summary(figures, members, differ, reliability(tables["ece"]))


@dataclass
class NumberFigures:
    """Of a regression."""

    n: int
    heteroscedastic: bool
    detail: bool
    device: torch.device
    parts: dict[str, Metric] = field(init=False)

    def __post_init__(self) -> None:
        parts: dict[str, Metric] = {"rmse": self._rmse(1), "normal": NormalFit()}
        if self.detail:
            parts["crps"] = Mean()
            if self.n > 1:
                parts["members"] = self._rmse(self.n)
        self.parts = {name: part.to(self.device) for name, part in parts.items()}

    def _rmse(self, outputs: int) -> Metric:
        return precise(MeanSquaredError(squared=False, num_outputs=outputs))

    def update(self, p: RegressionPrediction, y: Tensor) -> Tensor:
        """Count a batch of b images, and return the mean squared error of each [b]."""
        mean, variance = p.mean.double(), p.variance.double()
        y = match_targets(y, mean)
        loss = (mean - y).square().reshape(len(y), -1).mean(1)
        members = p.members.double().movedim(1, -1).reshape(-1, self.n)
        mean, variance, y = mean.reshape(-1), variance.reshape(-1), y.reshape(-1)
        seen: dict[str, tuple[Tensor, ...]] = {"rmse": (mean, y), "normal": (mean, variance, y)}
        if self.detail:
            crps = crps_of_normal(mean, variance, y) if self.heteroscedastic else crps_of_members(members, y)
            seen |= {"crps": (crps,), "members": (members, y.unsqueeze(1).expand_as(members).contiguous())}
        for name, part in self.parts.items():
            part.update(*seen[name])
        return loss

    def compute(self) -> Summary:
        found = {name: part.compute() for name, part in self.parts.items()}
        _, variance, nll, inside = found.pop("normal")
        members = tuple(found.pop("members").tolist()) if "members" in found else ()
        figures = {name: value.item() for name, value in found.items()}
        if self.n == 1 and variance == 0:  # a point, which says nothing of its error
            return Summary(figures, ranked=False)
        figures["nll"] = nll
        if self.detail:
            figures |= {"coverage90": inside[LEVELS.index(0.9)], "spread": math.sqrt(variance)}
        return Summary(figures, members, reliability=interval_reliability(inside))

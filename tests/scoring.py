"""Random predictions for the tests of figures, and the same figures worked out by hand in numpy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax
from torch import Tensor
from torchmetrics import Metric

from masksurgery.metrics import Suite
from masksurgery.prediction import Prediction, classification


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def draw_classes(seed: int, b: int, n: int, k: int, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits of n members that agree more or less [b, n, k], and classes that they often know [b]."""
    generator = np.random.default_rng(seed)
    members = draw(seed, b, 1, k, scale=scale) + draw(seed + 1000, b, n, k)
    p = softmax(members.numpy(), -1).mean(1)
    return members, torch.tensor([generator.choice(k, p=row) for row in p])


def cut(length: int, seed: int) -> Iterator[slice]:
    """Batches of unequal sizes."""
    start, generator = 0, np.random.default_rng(seed)
    while start < length:
        stop = min(start + int(generator.integers(1, max(length // 3, 2))), length)
        yield slice(start, stop)
        start = stop


def feed(metric: Any, p: Any, y: Tensor, seed: int = 0) -> Any:
    for batch in cut(len(y), seed):
        metric.update(type(p)(*(x[batch] for x in p)), y[batch])
    return metric


def classes(members: Tensor) -> Prediction:
    return classification(members, 2, "classification")


def metrics_of(suite: Suite) -> list[Metric]:
    return [suite.ranked, suite._images, *suite._figures.parts.values()]


# --- by hand ---------------------------------------------------------------------------------------------------------


def ece_by_hand(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Bin i holds what is in (i / bins, (i + 1) / bins]."""
    total = 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    return total


def adaptive_ece_by_hand(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return sum(len(part) / len(order) * abs(confidence[part].mean() - right[part].mean()) for part in parts)


def aurc_by_hand(unsure: np.ndarray, loss: np.ndarray) -> float:
    order = np.argsort(unsure, kind="stable")
    return float(np.mean(np.cumsum(loss[order]) / np.arange(1, len(order) + 1)))


def figures_by_hand(members: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Of a classification [m, n, k] with the classes [m]."""
    each = softmax(members, -1)
    p = each.mean(1)
    answers, own = p.argmax(1), each.argmax(2)
    n = own.shape[1]
    figures = {
        "accuracy": np.mean(answers == y),
        "nll": -np.mean(np.log(p[np.arange(len(y)), y])),
        "brier": np.mean(np.sum((p - np.eye(p.shape[1])[y]) ** 2, 1)),
        "ece": ece_by_hand(p.max(1), answers == y),
    }
    if n > 1:
        pairs = [np.mean(own[:, i] != own[:, j]) for i in range(n) for j in range(i)]
        figures |= {"agreement": np.mean((own == own[:, :1]).all(1)), "disagreement": np.mean(pairs)}
        if figures["accuracy"] < 1:
            figures["diversity"] = np.mean(pairs) / np.mean(answers != y)
    return {name: float(value) for name, value in figures.items()}


def figures_of_labels_by_hand(members: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Of labels [b, n, k] with the truths [b, k]."""
    each = expit(members)
    p = each.mean(1)
    answers = p > 0.5
    confidence, right = np.maximum(p, 1 - p).ravel(), (answers == y).ravel()
    return {
        "accuracy": float(np.mean(right)),
        "nll": float(-np.mean(np.where(y == 1, np.log(p), np.log1p(-p)))),
        "brier": float(np.mean((p - y) ** 2)),
        "ece": ece_by_hand(confidence, right),
        "agreement": float(np.mean((each > 0.5).all(1) | (each <= 0.5).all(1))),
    }

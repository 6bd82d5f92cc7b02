"""The figures of an evaluation as tables for a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from masksurgery.evaluation import (
    DETECTION,
    METRICS,
    SCORE_TITLES,
    Evaluation,
    Metric,
    ModelEvaluation,
    find_best,
    write_limit,
)
from masksurgery.scores import SCORES, Threshold

SIDE_BY_SIDE = 4
"""Models in one table; further ones get another one."""


def evaluation_tables(evaluation: Evaluation) -> RenderableType:
    """All figures: of the models side by side, of each set of unknown data, and under corruption."""
    fitted = f", {evaluation.fitted_on} more to fit on" if evaluation.fitted_on else ""
    parts: list[RenderableType] = [Text(f"{evaluation.data}: {evaluation.images} images{fitted}", style="bold")]
    parts += map(figures_table, _chunks(evaluation.models, SIDE_BY_SIDE))
    for name, images in evaluation.ood.items():
        parts += [
            Text(f"\nOut of distribution: {name}, {images} images", style="bold"),
            detection_table(evaluation, name),
        ]
    if any(model.corruption for model in evaluation.models):
        key = next(name for name in ("accuracy", "miou", "rmse") if name in evaluation.models[0].figures)
        key = "miou" if evaluation.segmentation else key
        parts += [Text(f"\n{METRICS[key].title} under corruption, by severity", style="bold")]
        parts.append(corruption_table(evaluation.models, key))
    parts += [Text(f"\n{line}") for line in _thresholds(evaluation.models)]
    return Group(*parts)


def figures_table(models: Sequence[ModelEvaluation]) -> Table:
    """A line for each figure; the better one is bold."""
    table = _table("", *(model.name for model in models))
    table.add_row("members", *(str(model.n) for model in models))
    if any(model.temperature for model in models):
        table.add_row("temperature", *("" if m.temperature is None else f"{m.temperature:.3f}" for m in models))
    for key, metric in METRICS.items():
        values = [model.figures.get(key) for model in models]
        if any(value is not None for value in values):
            table.add_row(metric.title, *_cells(values, metric))
    return table


def detection_table(evaluation: Evaluation, name: str) -> Table:
    """For each score, how well the models tell the unknown images from the others."""
    table = _table("score", "model", *(metric.title for metric in DETECTION.values()))
    for score in SCORES:
        scores = [(model, model.detection.get(name, {}).get(score)) for model in evaluation.models]
        found = [(model, figures) for model, figures in scores if figures]
        columns = [_cells([figures.get(key) for _, figures in found], metric) for key, metric in DETECTION.items()]
        for k, (model, _) in enumerate(found):
            table.add_row(SCORE_TITLES[score] if k == 0 else "", model.name, *(column[k] for column in columns))
    return table


def corruption_table(models: Sequence[ModelEvaluation], key: str) -> Table:
    """For each kind and model the figure over the severities."""
    severities = max(len(found) for model in models for found in model.corruption.values())
    table = _table("corruption", "model", "none", *(str(severity) for severity in range(1, severities + 1)))
    for kind in dict.fromkeys(kind for model in models for kind in model.corruption):
        found = [model for model in models if kind in model.corruption]
        rows = [[m.figures.get(key), *(one.get(key) for one in m.corruption[kind])] for m in found]
        columns = [_cells(list(values), METRICS[key]) for values in zip(*rows, strict=True)]
        for k, model in enumerate(found):
            table.add_row(kind if k == 0 else "", model.name, *(column[k] for column in columns))
    return table


def number(value: float | None, metric: Metric) -> str:
    """A figure as text; a dash for what is no number."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.3f}" if metric.percent or 1e-3 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def rule(threshold: Threshold) -> str:
    """When an image gets an answer, in words."""
    where = "at least" if threshold.score == "max_probability" else "at most"
    return f"{SCORE_TITLES[threshold.score]} is {where} {write_limit(threshold)}"


def _thresholds(models: Sequence[ModelEvaluation]) -> Iterator[str]:
    for model in models:
        if model.threshold is not None:
            keys = [key for key in ("answered_risk", "answered_mse") if key in model.figures]
            error = "".join(f", {METRICS[key].title} {number(model.figures[key], METRICS[key])}" for key in keys)
            stored = "" if model.kind == "converted" else " (A base model's folder has no place to store that.)"
            share = model.figures["answered"]
            yield f"{model.name} answers where its {rule(model.threshold)}: {share:.1%} of the images{error}.{stored}"


def _cells(values: Sequence[float | None], metric: Metric) -> list[Text]:
    texts = [number(value, metric) for value in values]
    best = find_best(metric, values, texts)
    return [Text(text, style="bold" if marked else "") for text, marked in zip(texts, best, strict=True)]


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="underline")
    for title in titles:
        text = title in ("", "score", "corruption", "model")
        table.add_column(title, justify="left" if text else "right", overflow="fold")
    return table


def _chunks(models: Sequence[ModelEvaluation], size: int) -> Iterator[Sequence[ModelEvaluation]]:
    for start in range(0, len(models), size):
        yield models[start : start + size]

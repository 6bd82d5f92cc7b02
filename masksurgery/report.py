"""An evaluation as one HTML file that needs nothing beside itself: no network, no script, no other file."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from masksurgery import panels, plots
from masksurgery.evaluation import (
    DETECTION,
    GALLERIES,
    METRICS,
    SCORE_TITLES,
    Evaluation,
    Metric,
    ModelEvaluation,
    Vote,
    find_best,
    write_limit,
)
from masksurgery.scores import Score, Threshold
from masksurgery.types import ConfigError, EvaluationError
from masksurgery.weights import replace_file

if TYPE_CHECKING:
    from jinja2 import Environment

HEADLINES = ("accuracy", "miou", "rmse", "nll", "ece", "aurc", "crps")
"""The metrics that the page begins with, as far as the models have them."""

VOTES = 8
"""Votes of more members than that are counted, not listed."""

_PICTURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


def write_report(evaluation: Evaluation, file: str | Path) -> Path:
    """Write an evaluation as a page that a browser opens.

    Args:
        evaluation: What was found.
        file: Of the page; what was there is replaced once the new one is whole.
    Returns:
        The file.
    Raises:
        CheckpointError: It cannot be written.
        ConfigError: matplotlib or Jinja2 is missing.
        EvaluationError: There is no model, or a picture is neither PNG nor JPEG.
    """
    page, path = render_report(evaluation), Path(file)
    # A name of a file that is not UTF-8 has surrogates, which no file can hold.
    replace_file(path, lambda draft: draft.write_text(page, encoding="utf-8", errors="backslashreplace"))
    return path


def render_report(evaluation: Evaluation) -> str:
    """The page as text; see `write_report`."""
    if not evaluation.models:
        raise EvaluationError(f"{evaluation.data}: there is no model to report. Evaluate one first.")
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            evaluation=evaluation,
            compared=_compared(evaluation),
            cards=_cards(evaluation),
            rows=_rows(evaluation),
            reliability=panels.reliability_panels(evaluation),
            risk=panels.risk_panels(evaluation),
            sets=[
                (s, _detection_rows(evaluation, s), panels.detection_groups(evaluation, s))
                for s in panels.detection_sets(evaluation)
            ],
            corruption=panels.corruption_groups(evaluation),
        )
    )


def _environment() -> Environment:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ConfigError(
            f'A report needs Jinja2 ({error}). Install it: pip install "masksurgery[evaluate]".'
        ) from error
    environment = Environment(
        loader=PackageLoader("masksurgery"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "DETECTION": DETECTION,
        "GALLERIES": GALLERIES,
        "METRICS": METRICS,
        "SCORES": SCORE_TITLES,
        "VOTES": VOTES,
        "series": plots.series,
    }
    filters = (count_votes, embed_picture, find_largest, share_of, write_threshold, write_verdicts)
    environment.filters |= {f.__name__: f for f in filters} | {"number": panels.write_number}
    return environment


# --- headline --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Card:
    """A figure of the base model and of the converted one, and whether it got "better", "worse" or is "equal"."""

    title: str
    text: str
    before: str | None
    after: str
    verdict: str | None = None
    change: str = ""


def _compared(evaluation: Evaluation) -> tuple[ModelEvaluation | None, ModelEvaluation]:
    """The first base model and the first converted one; of a single kind the first two models; or one alone."""
    base = next((m for m in evaluation.models if m.kind == "base"), evaluation.models[0])
    others = [m for m in evaluation.models if m is not base]
    after = next((m for m in others if m.kind == "converted"), others[0] if others else None)
    return (base, after) if after is not None else (None, base)


def _cards(evaluation: Evaluation) -> tuple[Card, ...]:
    before, after = _compared(evaluation)
    cards = [
        _card(METRICS[name], METRICS[name].title, before.figures.get(name) if before else None, after.figures[name])
        for name in HEADLINES
        if name in after.figures and (before is None or name in before.figures)
    ]
    score: Score = "variance" if evaluation.task == "regression" else "entropy"
    auroc = DETECTION["auroc"]
    for data in panels.detection_sets(evaluation):
        found = [None if m is None else m.detection.get(data, {}).get(score, {}).get("auroc") for m in (before, after)]
        if found[1] is not None and (before is None or found[0] is not None):
            cards.append(_card(auroc, f"AUROC, {data}", *found))
    return tuple(cards)


def _card(metric: Metric, title: str, before: float | None, after: float | None) -> Card:
    texts = [panels.write_metric(metric, value) for value in (before, after)]
    if before is None or after is None:
        return Card(title, metric.text, None, texts[1])
    if not (math.isfinite(before) and math.isfinite(after)) or metric.better is None:
        return Card(title, metric.text, texts[0], texts[1])
    if texts[0] == texts[1]:
        return Card(title, metric.text, texts[0], texts[1], "equal")
    verdict = "better" if (after > before) == (metric.better == "higher") else "worse"
    if metric.percent:
        change = f"by {panels.write_number(100 * abs(after - before))} points"
    else:
        change = f"by {panels.write_number(abs((after - before) / before), percent=True)}" if before else ""
    return Card(title, metric.text, texts[0], texts[1], verdict, change)


def write_verdicts(cards: Sequence[Card]) -> str:
    """Such as "4 got better and 1 stayed the same"."""
    texts = {"better": "got better", "worse": "got worse", "equal": "stayed the same", None: "cannot be compared"}
    counts = Counter(card.verdict for card in cards)
    *others, last = [f"{counts[verdict]} {text}" for verdict, text in texts.items() if counts[verdict]]
    return f"{', '.join(others)} and {last}" if others else last


# --- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


def _rows(evaluation: Evaluation) -> Iterator[tuple[Metric, list[Cell]]]:
    """Each metric that any model has, with a cell for each model."""
    for name, metric in METRICS.items():
        if any(name in model.figures for model in evaluation.models):
            yield metric, _cells(metric, [model.figures.get(name) for model in evaluation.models])


def _detection_rows(evaluation: Evaluation, data: str) -> list[tuple[str, list[tuple[str, list[Cell]]]]]:
    """For each score the models that have it, each with a cell for each figure of `DETECTION`."""
    tables = []
    for score, title in SCORE_TITLES.items():
        found = [(model.name, model.detection.get(data, {}).get(score)) for model in evaluation.models]
        names = [name for name, figures in found if figures]
        columns = [
            _cells(metric, [figures.get(key) for _, figures in found if figures]) for key, metric in DETECTION.items()
        ]
        if names:
            tables.append((title, [(name, [column[k] for column in columns]) for k, name in enumerate(names)]))
    return tables


def _cells(metric: Metric, values: Sequence[float | None]) -> list[Cell]:
    """The best are marked."""
    texts = ["" if value is None else panels.write_metric(metric, value) for value in values]
    return [Cell(text, best) for text, best in zip(texts, find_best(metric, values, texts), strict=True)]


# --- filters ---------------------------------------------------------------------------------------------------------


def embed_picture(image: bytes, name: str) -> str:
    """A picture as the address that holds it; an EvaluationError unless it is PNG or JPEG."""
    for start, kind in _PICTURES.items():
        if image.startswith(start):
            return f"data:{kind};base64,{base64.b64encode(image).decode()}"
    raise EvaluationError(
        f"{name!r}: the picture begins with {image[:8]!r}, and is neither PNG nor JPEG. Encode it as one."
    )


def count_votes(votes: Sequence[Vote]) -> list[tuple[str, int]]:
    """How many members say what, the most frequent first."""
    return Counter(vote.label for vote in votes).most_common()


def write_threshold(threshold: Threshold | None) -> str:
    if threshold is None:
        return ""
    sign = "≥" if threshold.score == "max_probability" else "≤"
    return f"{threshold.score.replace('_', ' ')} {sign} {write_limit(threshold)}"


def find_largest(rows: Sequence[Sequence[float]]) -> float:
    """The largest number of a matrix; 0 if there is none."""
    return max((x for row in rows for x in row if math.isfinite(x)), default=0.0)


def share_of(value: float | None, whole: float) -> str:
    """A length in percent, from 0 to 100, for a style; what is no number has none."""
    if value is None or not math.isfinite(value) or not math.isfinite(whole) or whole <= 0:
        return "0%"
    return f"{100 * min(max(value / whole, 0.0), 1.0):.1f}%"

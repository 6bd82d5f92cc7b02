"""The figures of a report: each drawing with its title, its legend, and what to see in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from masksurgery import plots
from masksurgery.evaluation import (
    DETECTION,
    METRICS,
    SCORE_TITLES,
    Curve,
    Evaluation,
    Metric,
    ModelEvaluation,
    Reliability,
)
from masksurgery.scores import Score

MINUS = "\N{MINUS SIGN}"

AXES: Mapping[Score, str] = {
    **SCORE_TITLES,
    "max_probability": f"1 {MINUS} max probability",
    "entropy": "entropy (nats)",
    "mutual_information": "mutual information (nats)",
}
"""What is drawn of them: larger is less sure."""


@dataclass(frozen=True)
class Key:
    """A line of a legend: what is drawn so, and a figure beside it. `mark` is the number of a model, or a set."""

    mark: int | str
    label: str
    value: str = ""


@dataclass(frozen=True)
class Panel:
    """A drawing: `svg` with a title, a sentence and a legend."""

    title: str
    svg: str
    text: str
    legend: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Group:
    """Panels that belong together."""

    title: str
    panels: tuple[Panel, ...]


def write_number(value: float | None, percent: bool = False) -> str:
    """Three significant digits; a dash for what is not finite."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    if value == 0:
        return "0%" if percent else "0"
    value = 100 * value if percent else value
    if not 1e-4 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{mantissa}·10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    elif abs(value) >= 999.5:
        text = f"{value:,.0f}"
    else:
        text = f"{value:#.3g}".removesuffix(".")
    return (text + "%" if percent else text).replace("-", MINUS)


def write_metric(metric: Metric, value: float | None) -> str:
    return write_number(value, metric.percent)


# --- calibration and refusal -----------------------------------------------------------------------------------------


def reliability_panels(evaluation: Evaluation) -> tuple[Panel, ...]:
    """How often each model is right where it is so and so sure."""
    found = [(k, model, model.reliability) for k, model in enumerate(evaluation.models)]
    return tuple(
        _reliability(k, model, reliability, evaluation.task == "regression")
        for k, model, reliability in found
        if reliability is not None and any(map(_is_number, reliability.accuracy))
    )


def _reliability(k: int, model: ModelEvaluation, found: Reliability, levels: bool) -> Panel:
    if levels:
        text = _sentence_of_levels(found)
    else:
        bins = zip(found.shares, found.confidence, found.accuracy, strict=True)
        kept = [(share, x, y) for share, x, y in bins if x is not None and y is not None and _is_number(share * x * y)]
        whole = sum(share for share, _, _ in kept) or math.nan
        sure = sum(share * x for share, x, _ in kept) / whole
        right = sum(share * y for share, _, y in kept) / whole
        verdict = "surer than right" if sure > right else "less sure than right"
        texts = write_number(sure, True), write_number(right, True)
        text = f"{texts[0]} sure on average, {texts[1]} right: {verdict if len({*texts}) == 2 else 'as it should be'}."
    svg = plots.draw_reliability(
        f"reliability-{k}", f"Reliability diagram of {model.name}. {text}", found, levels=levels
    )
    ece = model.figures.get("ece")
    return Panel(model.name, svg, text, () if ece is None else (Key("", "ECE", write_number(ece)),))


def _sentence_of_levels(found: Reliability) -> str:
    level, inside = min(
        ((x, y) for x, y in zip(found.confidence, found.accuracy, strict=True) if x is not None and y is not None),
        key=lambda pair: abs(pair[0] - 0.9),
    )
    return f"{write_number(inside, True)} of the truths lie inside of the central {level:.0%} interval."


def risk_panels(evaluation: Evaluation) -> tuple[Panel, ...]:
    """The error among the answers that remain, all models in one drawing."""
    percent = evaluation.task != "regression"
    curves, points, keys = {}, {}, []
    for k, model in enumerate(evaluation.models):
        curve = model.risk_coverage.get("max_probability" if percent else "variance")
        if curve is None or not any(map(_is_number, curve.y)):
            continue
        curves[k] = curve
        keys.append(Key(k, model.name, write_number(_value_at(curve, 0.8), percent)))
        point = (
            model.figures.get("answered", math.nan),
            model.figures.get("answered_risk", model.figures.get("answered_mse", math.nan)),
        )
        if all(map(_is_number, point)):
            points[k] = point
    if not curves:
        return ()
    what = "error" if percent else "squared error"
    label = f"Risk-coverage curves. The {what} of the surest 80%: " + _listed(keys)
    text = f"The figures beside the names are the {what} of the surest 80%." + (
        " A ring is where the model's threshold stands." if points else ""
    )
    svg = plots.draw_risk_coverage("risk", label, curves, points, percent)
    return (Panel("Error over coverage", svg, text, tuple(keys)),)


# --- out of distribution ---------------------------------------------------------------------------------------------


def detection_groups(evaluation: Evaluation, data: str) -> tuple[Group, ...]:
    """For each score what it tells of one set: its histograms in and out, model by model, and the ROC of all."""
    number = list(_sets(evaluation)).index(data)
    groups = []
    for score, title in SCORE_TITLES.items():
        panels = [*_histograms(evaluation, data, score, f"{number}-{score}")]
        panels += _roc(evaluation, data, score, f"{number}-{score}")
        if panels:
            groups.append(Group(title, tuple(panels)))
    return tuple(groups)


def _histograms(evaluation: Evaluation, data: str, score: Score, name: str) -> Iterator[Panel]:
    legend = (Key("known", evaluation.data), Key("unknown", data))
    for k, model in enumerate(evaluation.models):
        sets = model.histograms.get(score, {})
        known, unknown = sets.get(""), sets.get(data)
        if known is None or unknown is None or not all(map(_is_number, (*known.edges, *unknown.edges))):
            continue
        if not any(map(_is_number, known.shares)):
            continue
        overlap = sum(map(min, known.shares, unknown.shares)) if known.edges == unknown.edges else math.nan
        text = f"The two overlap by {write_number(overlap, True)}." if _is_number(overlap) else ""
        label = f"Histograms of the {AXES[score]} of {model.name}, in and out of distribution. {text}"
        svg = plots.draw_histograms(f"histogram-{name}-{k}", label, known, unknown, AXES[score])
        yield Panel(model.name, svg, text, legend)


def _roc(evaluation: Evaluation, data: str, score: Score, name: str) -> Iterator[Panel]:
    curves, keys = {}, []
    for k, model in enumerate(evaluation.models):
        curve = model.roc.get(data, {}).get(score)
        if curve is not None and any(map(_is_number, curve.y)):
            curves[k] = curve
            auroc = model.detection.get(data, {}).get(score, {}).get("auroc")
            keys.append(Key(k, model.name, write_metric(DETECTION["auroc"], auroc)))
    if curves:
        svg = plots.draw_roc(f"roc-{name}", f"ROC by {SCORE_TITLES[score]}. AUROC: {_listed(keys)}", curves)
        yield Panel("ROC", svg, "The figures beside the names are the AUROC.", tuple(keys))


def _sets(evaluation: Evaluation) -> dict[str, None]:
    """The sets of out-of-distribution data, in the order that they were given."""
    return dict.fromkeys(
        [*evaluation.ood, *(data for model in evaluation.models for data in (*model.detection, *model.roc))]
    )


def detection_sets(evaluation: Evaluation) -> tuple[str, ...]:
    """Those sets for which there is anything to show."""
    shown = [{*m.detection, *m.roc, *(s for sets in m.histograms.values() for s in sets)} for m in evaluation.models]
    return tuple(data for data in _sets(evaluation) if any(data in sets for sets in shown))


# --- corruption ------------------------------------------------------------------------------------------------------


def corruption_groups(evaluation: Evaluation) -> tuple[Group, ...]:
    """For each kind of corruption a drawing of each metric; those of a metric have the same axis."""
    kinds = dict.fromkeys(kind for model in evaluation.models for kind in model.corruption)
    groups = []
    for kind in kinds:
        panels = [
            _corruption(evaluation, kind, name, lines, _limits(evaluation, kinds, name))
            for name in METRICS
            if (lines := _severities(evaluation, kind, name))
        ]
        if panels:
            groups.append(Group(kind.capitalize(), tuple(panels)))
    return tuple(groups)


def _limits(evaluation: Evaluation, kinds: Iterable[str], name: str) -> tuple[float, float]:
    lines = [line for kind in kinds for line in _severities(evaluation, kind, name).values()]
    return (0, 1.02) if METRICS[name].percent else plots.limits_of(lines)


def _severities(evaluation: Evaluation, kind: str, name: str) -> dict[int, list[float]]:
    """The figure of each model from severity 0, which is no corruption."""
    lines = {}
    for k, model in enumerate(evaluation.models):
        found = [model.figures, *model.corruption.get(kind, ())]
        line = [figures.get(name, math.nan) for figures in found]
        if any(map(_is_number, line[1:])):
            lines[k] = line
    return lines


def _corruption(
    evaluation: Evaluation, kind: str, name: str, lines: Mapping[int, Sequence[float]], limits: tuple[float, float]
) -> Panel:
    metric = METRICS[name]
    keys = tuple(Key(k, evaluation.models[k].name, write_metric(metric, line[-1])) for k, line in lines.items())
    last = max(map(len, lines.values())) - 1
    label = f"{metric.title} under {kind}. At severity {last}: {_listed(keys)}"
    svg = plots.draw_severities(f"{name}-{kind}", label, lines, metric.title, metric.percent, limits)
    return Panel(metric.title, svg, metric.text, keys)


def _listed(keys: Sequence[Key]) -> str:
    return ", ".join(f"{key.label} {key.value}" for key in keys) + "."


def _value_at(curve: Curve, x: float) -> float:
    """The value at the last point up to x."""
    return next((b for a, b in zip(reversed(curve.x), reversed(curve.y), strict=True) if a <= x), math.nan)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)

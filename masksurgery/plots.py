"""The drawings of a report: matplotlib's, as SVG text that takes colours and font from the page around it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from masksurgery.evaluation import Curve, Histogram, Reliability
from masksurgery.types import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 340
"""Of every drawing, in its own units. A phone shows about as many pixels, so that text keeps its size there."""

FONT_SIZE = 11.5

BOTTOM = 40
"""What is below the axes: their numbers and their name."""

ROLES = ("ink", "muted", "line", "bar", "known", "unknown", *(f"series-{k}" for k in range(6)))
"""The colours of a drawing: custom properties of the page, which has values of them for light and for dark."""

_SENTINELS = {role: f"#fe{k:02x}01" for k, role in enumerate(ROLES)}


@dataclass(frozen=True)
class Series:
    """How a model is drawn. 84 models differ, and 12 in colour and dashes alone.

    Attributes:
        role: Its colour.
        dashes: In widths of the line; empty for a solid one.
        marker: Matplotlib's name of its marker.
        path: The marker as the path of an SVG of 32 by 12, for a legend.
    """

    role: str
    dashes: tuple[float, ...]
    marker: str
    path: str


_DASHES: tuple[tuple[float, ...], ...] = ((), (4.0, 1.6), (1.2, 1.2), (5.0, 1.4, 1.2, 1.4))
_MARKERS = {
    "o": "M12.5 6a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",
    "s": "M13 3h6v6h-6z",
    "^": "M16 2l3.8 7h-7.6z",
    "D": "M16 1.8l4.2 4.2-4.2 4.2-4.2-4.2z",
    "v": "M16 10l3.8-7h-7.6z",
    "P": "M14.8 2h2.4v2.8h2.8v2.4h-2.8v2.8h-2.4v-2.8h-2.8v-2.4h2.8z",
    "X": "M13.6 2l2.4 2.4 2.4-2.4 1.6 1.6-2.4 2.4 2.4 2.4-1.6 1.6-2.4-2.4-2.4 2.4-1.6-1.6 2.4-2.4-2.4-2.4z",
}


def series(k: int) -> Series:
    """How the k-th model is drawn."""
    marker, path = list(_MARKERS.items())[k % len(_MARKERS)]
    return Series(f"series-{k % 6}", _DASHES[k % len(_DASHES)], marker, path)


# --- the drawings ----------------------------------------------------------------------------------------------------
# Each takes a name, from which the ids inside are made and which no other drawing of the page may have, and the text
# that stands for it where it cannot be seen.


def draw_reliability(name: str, label: str, found: Reliability, *, levels: bool = False) -> str:
    """How often answers of a confidence are right, and below it where the answers are.

    Args:
        found: Bins of equal width.
        levels: They are levels of central intervals instead, which have no shares.
    """

    def paint(figure: Figure) -> None:
        upper = _axes(figure, bottom=BOTTOM if levels else 116)
        upper.plot([0, 1], [0, 1], color=_SENTINELS["muted"], dashes=(4, 3), linewidth=1)
        pairs = zip(map(_number, found.confidence), map(_number, found.accuracy), strict=True)
        points = [(x, y) for x, y in pairs if math.isfinite(x + y)]
        if not levels:
            edges = [k / len(found.shares) for k in range(len(found.shares) + 1)]
            heights = [_number(y) for y in found.accuracy]
            upper.bar(edges[:-1], heights, 0.94 / len(heights), align="edge", color=_SENTINELS["bar"])
            lower = _axes(figure, bottom=BOTTOM, height=34)
            lower.bar(edges[:-1], [_number(y) for y in found.shares], 0.94 / len(edges[1:]), align="edge",
                      color=_SENTINELS["muted"])  # fmt: skip
            lower.set(xlim=(0, 1), ylim=(0, 1.02 * max(filter(math.isfinite, found.shares), default=1) or 1))
            _label(lower, "confidence", "share of answers", percent="xy")
            lower.locator_params(axis="y", nbins=2)
            upper.tick_params(labelbottom=False)
        x, y = [x for x, _ in points], [y for _, y in points]
        upper.vlines(x, x, y, color=_SENTINELS["series-0"], linewidth=1.2)
        upper.plot(x, y, color=_SENTINELS["series-0"], linewidth=1.8, marker="o", markersize=4.5)
        upper.set(xlim=(0, 1), ylim=(0, 1.01))
        titles = ("level of the interval", "truths inside") if levels else ("", "right answers")
        _label(upper, *titles, percent="xy")

    return _svg(name, label, 255 if levels else 325, paint)


def draw_risk_coverage(
    name: str, label: str, curves: Mapping[int, Curve], points: Mapping[int, tuple[float, float]], percent: bool
) -> str:
    """The error over the coverage of each model, by its number, and the points where their thresholds stand."""

    def paint(figure: Figure) -> None:
        axes = _axes(figure)
        for k, curve in curves.items():
            _line(axes, k, curve.x, curve.y)
        for k, (coverage, risk) in points.items():
            axes.plot(coverage, risk, "o", markersize=11, markerfacecolor="none", markeredgewidth=1.8,
                      markeredgecolor=_SENTINELS[series(k).role], zorder=4)  # fmt: skip
        axes.set(xlim=(0, 1.01), ylim=limits_of([c.y for c in curves.values()] + [(y,) for _, y in points.values()]))
        _label(axes, "coverage", "error" if percent else "squared error", percent="xy" if percent else "x")

    return _svg(name, label, 260, paint)


def draw_histograms(name: str, label: str, known: Histogram, unknown: Histogram, score: str) -> str:
    """The score of known and of unknown images."""

    def paint(figure: Figure) -> None:
        axes = _axes(figure)
        known_color, unknown_color = _SENTINELS["known"], _SENTINELS["unknown"]
        shares = [[_number(y) for y in x.shares] for x in (known, unknown)]
        first, last = known.edges[0], known.edges[-1]
        axes.stairs(shares[0], known.edges, fill=True, color=known_color, alpha=0.35)
        axes.stairs(shares[0], known.edges, color=known_color, linewidth=1.2)
        axes.stairs(shares[1], unknown.edges, color=unknown_color, linewidth=2, linestyle=(0, (3, 1.2)))
        axes.set(xlim=(first, last if last > first else first + 1), ylim=limits_of(shares))
        _label(axes, score, "share of images", percent="y")

    return _svg(name, label, 240, paint)


def draw_roc(name: str, label: str, curves: Mapping[int, Curve]) -> str:
    """The share of unknown images that is refused, over that of the known ones, of each model by its number."""

    def paint(figure: Figure) -> None:
        axes = _axes(figure)
        axes.plot([0, 1], [0, 1], color=_SENTINELS["muted"], dashes=(4, 3), linewidth=1)
        for k, curve in curves.items():
            _line(axes, k, curve.x, curve.y)
        axes.set(xlim=(-0.01, 1), ylim=(0, 1.02))
        _label(axes, "known images refused", "unknown images refused", percent="xy")

    return _svg(name, label, 240, paint)


def draw_severities(
    name: str, label: str, lines: Mapping[int, Sequence[float]], title: str, percent: bool, limits: tuple[float, float]
) -> str:
    """A figure of each model, by its number, over the severities from 0 of a corruption."""

    def paint(figure: Figure) -> None:
        axes = _axes(figure)
        for k, values in lines.items():
            _line(axes, k, range(len(values)), values, at_points=True)
        last = max(map(len, lines.values())) - 1
        axes.set(xlim=(-0.15, last + 0.15), ylim=limits, xticks=range(last + 1))
        _label(axes, "severity", title, percent="y" if percent else "")

    return _svg(name, label, 220, paint)


# --- what they share -------------------------------------------------------------------------------------------------


def _svg(name: str, label: str, height: int, paint: Callable[[Figure], None]) -> str:
    """Paint a figure of WIDTH by height, and make it a part of a page."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            f'A report needs matplotlib ({error}). Install it: pip install "masksurgery[evaluate]".'
        ) from error
    with style.context(["default", {**_style(), "svg.hashsalt": name}]):  # whatever the user's own settings are
        figure = Figure((WIDTH / 72, height / 72), dpi=72)
        paint(figure)
        text = io.StringIO()
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    return _embed(text.getvalue(), label, height)


def _style() -> dict[str, Any]:
    ink, muted, line = (_SENTINELS[role] for role in ("ink", "muted", "line"))
    return {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.size": FONT_SIZE,
        "text.color": ink,
        "axes.titlesize": FONT_SIZE,
        "axes.titlecolor": ink,
        "axes.titlelocation": "left",
        "axes.labelcolor": ink,
        "axes.edgecolor": line,
        "axes.linewidth": 1,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": line,
        "grid.linewidth": 0.7,
        "xtick.labelsize": FONT_SIZE - 0.5,
        "ytick.labelsize": FONT_SIZE - 0.5,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
    }


def _axes(figure: Figure, bottom: float = BOTTOM, height: float | None = None) -> Axes:
    """Axes with the same margins in all figures, so that those of a row are in line; the title stands above them."""
    left, right, top, whole = 46, 20, 30, figure.get_figheight() * 72
    height = whole - bottom - top if height is None else height
    return figure.add_axes((left / WIDTH, bottom / whole, (WIDTH - left - right) / WIDTH, height / whole))


def _label(axes: Axes, below: str, above: str, percent: str) -> None:
    """Name the axes, and write those named in `percent` as percents."""
    from matplotlib.ticker import AutoLocator, MaxNLocator

    axes.set_xlabel(below)
    axes.set_title(above, x=-0.12, pad=9)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.axis_name in percent:
            axis.set_major_formatter(lambda value, _: f"{100 * value:.3g}%")
        if isinstance(axis.get_major_locator(), AutoLocator):
            axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _line(axes: Axes, k: int, x: Iterable[float], y: Iterable[float], at_points: bool = False) -> None:
    """The line of model k. Its markers stand at the points, or shifted, so that equal curves can be told apart."""
    look, values = series(k), [_number(value) for value in y]
    color = _SENTINELS[look.role]
    shift = (0.04 + 0.02 * (k % 8), 0.2) if not at_points and len(values) > 2 else None
    (line,) = axes.plot(
        list(x), values, color=color, linewidth=1.8, marker=look.marker, markersize=5.5, markevery=shift
    )
    line.set(markeredgecolor=color, markerfacecolor=color)
    if look.dashes:
        line.set_dashes(look.dashes)


def _embed(svg: str, label: str, height: int) -> str:
    """An SVG file as an element of a page: colours and font of the page, no address, no id but those that are used."""
    body = svg[svg.index("</defs>") + len("</defs>") : svg.rindex("</svg>")]  # the first ones hold a style for all
    body = re.sub(r"#fe([0-9a-f]{2})01", lambda m: f"var(--{ROLES[int(m[1], 16)]})", body)
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)  # as matplotlib before 3.10 has it
    body = re.sub(r" ?font-family: [^;\"]*;?", "", body)
    body = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", body)
    body = re.sub(r' transform="rotate\(-?0 [^"]*"', "", body).replace("xlink:href", "href")
    body = re.sub(r"\s*\n\s*", " ", body)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _number(value: float | None) -> float:
    """NaN, which matplotlib leaves out, for whatever is not finite."""
    return value if value is not None and math.isfinite(value) else math.nan


def limits_of(lines: Iterable[Iterable[float]]) -> tuple[float, float]:
    """From 0, or a little below the smallest number, to a little above the largest."""
    values = [y for line in lines for y in line if math.isfinite(y)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    return (1.06 * min(low, 0), 1.06 * max(high, 0)) if low < 0 or high > 0 else (0.0, 1.0)

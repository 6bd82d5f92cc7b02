"""The plots of `quality.py`: quality against the multiply-adds of a prediction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quality_settings import Setting, prediction_macs, relative_macs, standard_error

Found = Mapping[str, tuple[int, Mapping[str, Setting]]]
"""By the title of a task the base model's MACs, and settings by what they are called."""
LABELS = {"nll": "NLL (lower is better)", "entropy": "AUROC by entropy (higher is better)"}


def plot_methods(found: Found, file: Path) -> None:
    """NLL, and AUROC where there are unknown images, of each method; Masksembles converted as a ring."""
    panels = [
        (title, *rest, figure)
        for title, rest in found.items()
        for figure in LABELS
        if next(iter(rest[1].values())).values(figure)
    ]
    colors = colors_of(found)
    with _grid(len(panels), file) as (figure, grid):
        for axes, (title, base_macs, settings, what) in zip(grid, panels, strict=False):
            for name, setting in settings.items():
                mean = _point(axes, prediction_macs(setting, base_macs), setting.values(what), colors[name], name)
                macs = relative_macs(setting, base_macs)
                if "packed" in macs:
                    axes.plot(macs["converted"], mean, "o", color=colors[name], fillstyle="none")
            _dress(axes, title, LABELS[what])
        named = [axes.get_legend_handles_labels() for axes in grid]
        handles = {label: handle for pair in named for handle, label in zip(*pair, strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)


def colors_of(found: Found) -> dict[str, str]:
    """By what a setting is called: the same for all tasks, of which some have fewer methods."""
    names = dict.fromkeys(name for _, settings in found.values() for name in settings)
    return {name: f"C{k}" for k, name in enumerate(names)}


def plot_masks(found: Mapping[str, tuple[int, Sequence[Sequence[tuple[Setting, Setting]]]]], file: Path) -> None:
    """Of everything that was tried of Masksembles, packed, how its validation NLL differs from that of n=4, scale 2.

    Args:
        found: By the title of a task the base model's MACs, and for each budget what is compared with it.
        file: Written.
    """
    with _grid(len(found), file) as (figure, grid):
        labels = []
        for axes, (title, (base_macs, budgets)) in zip(grid, found.items(), strict=False):
            for color, pairs in enumerate(budgets):
                name: str | None = f"{pairs[0][0].epochs} epochs"
                for one, other in pairs:
                    at = prediction_macs(one, base_macs)
                    values = zip(one.values("nll", "val"), other.values("nll", "val"), strict=True)
                    mean = _point(axes, at, [a - b for a, b in values], f"C{color}", name)
                    if one.options or not color:  # what it is compared with is at 0 with every budget
                        labels.append((axes, one.label, (at, mean)))
                    name = None
            _dress(axes, title, "validation NLL, to n 4, scale 2 (lower is better)", (0.5, 1, 2, 4, 8))
            axes.legend(fontsize=8)
        figure.draw_without_rendering()  # what is where, the labels need to know
        _write_beside(labels)


def _write_beside(labels: Sequence[tuple[Any, str, tuple[float, float]]]) -> None:
    """Each label at a corner of its point where it covers no other, if there is one."""
    corners = [(x, y, side) for x, side in ((5, "left"), (-5, "right")) for y in (4, -9)]
    taken: list[Any] = []
    for axes, text, point in sorted(labels, key=lambda label: label[2][1], reverse=True):  # the upper one above
        tried = [
            axes.annotate(text, point, xytext=(x, y), textcoords="offset points", ha=side, fontsize=7)
            for x, y, side in corners
        ]
        boxes = [label.get_window_extent() for label in tried]
        free = [k for k, box in enumerate(boxes) if not any(box.overlaps(other) for other in taken)]
        best = free[0] if free else 0
        taken.append(boxes[best])
        for label in (*tried[:best], *tried[best + 1 :]):
            label.remove()


def _point(axes: Any, at: float, values: Sequence[float], color: str, label: str | None = None) -> float:
    """Draw the mean of the seeds with its standard error, if there is one; returns the mean."""
    mean, error = statistics.fmean(values), standard_error(values)
    axes.errorbar(at, mean, None if math.isnan(error) else error, fmt="o", color=color, capsize=3, label=label)
    return mean


@contextmanager
def _grid(panels: int, file: Path) -> Iterator[tuple[Any, list[Any]]]:
    """Two panels in a row; written to the file in the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    down = math.ceil(panels / 2)
    figure, grid = plt.subplots(down, 2, figsize=(10, 3.6 * down), squeeze=False, layout="constrained")
    for axes in grid.flat[panels:]:
        axes.set_axis_off()
    yield figure, list(grid.flat)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _dress(axes: Any, title: str, label: str, ticks: Sequence[float] = (1, 2, 4, 8, 30)) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("multiply-adds of a prediction, the base model as 1")
    axes.set_ylabel(label)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)

"""Which runs `quality.py` does: a sweep of budgets and rates, and then every seed with those that were best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from quality_group import Run
from quality_settings import best, settings_of
from quality_tasks import TASKS

SHORT = ("lenet", "diabetes")
"""The tasks of the short profile, which has the longer budget alone."""
SEEDS = {"short": range(3), "full": range(5)}
"""By profile."""
FIRST: dict[str, dict[str, Any]] = {
    "base": {}, "masksembles": {}, "ensemble": {}, "tuned ensemble": {}, "dropout": {"p": 0.1},
}  # fmt: skip
"""The options of each method that are swept; with others a method is trained as was best with these."""
DROPOUT = (0.25, 0.5)
MASKS: tuple[dict[str, Any], ...] = (
    {"scale": 1.5}, {"scale": 3.0}, {"scale": 1.2}, {"n": 2}, {"n": 8}, {"n": 8, "scale": 1.2}, {"rescale": False},
)  # fmt: skip
"""What is changed of n=4, scale 2, beside sites and train mode; the short profile has the first two."""
RECIPES: tuple[dict[str, Any], ...] = (
    {"shrink": 0.5}, {"core": 0.5}, {"teacher": 0.5}, {"last": 1},
    {"shrink": 0.5, "core": 0.5, "teacher": 0.5, "last": 1},
)  # fmt: skip
"""Other ways to fine-tune, one at a time and together; classifications only, for there is a teacher."""


def sweep(task: str, profile: str) -> list[Run]:
    """Each method with all budgets and learning rates, the same for all of them, on the task's first seeds."""
    found = TASKS[task]
    budgets = found.epochs[1:] if profile == "short" else found.epochs[::-1]
    return [
        Run(task, seed, method, epochs, lr, options)
        for seed in SEEDS[profile][: found.swept]
        for epochs in budgets
        for lr in found.lrs
        for method, options in FIRST.items()
    ]


def rest(task: str, profile: str, seeds: Sequence[int], rows: Iterable[Mapping[str, Any]]) -> list[list[Run]]:
    """All seeds of each method, and all that is tried of it, with the budget and the rate that were best in the sweep.

    Best is the lowest NLL of the validation part. Where something is made of a method's runs in two ways (with a
    temperature, with more passes), each way has its own best.

    Args:
        seeds: Which.
        rows: What the sweep has found; a method that is not among it is left out.
    Returns:
        For each seed the methods, and after these for each seed what else is tried.
    """
    swept = {run.key for run in sweep(task, profile)}
    rows = [row for row in rows if run_of(row).key in swept]
    trained = {method: _best_of([row for row in rows if row["method"] == method]) for method in FIRST}
    return [
        [Run(task, seed, method, *how, options) for method, options in some for how in trained[method]]
        for some in (list(FIRST.items()), list(_variations(task, profile)))
        for seed in seeds
    ]


def _best_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Epochs and learning rate, of each name that there are results of."""
    settings = settings_of(rows)
    winners = [best(s for s in settings if s.name == name) for name in dict.fromkeys(s.name for s in settings)]
    return list(dict.fromkeys((winner.epochs, winner.lr) for winner in winners))


def _variations(name: str, profile: str) -> Iterator[tuple[str, dict[str, Any]]]:
    task, short = TASKS[name], profile == "short"
    for options in MASKS[:2] if short else MASKS:
        yield "masksembles", options
    for sites in ("head",) if short else [sites for sites in task.sites if sites != "all"]:
        yield "masksembles", {"sites": sites}
    if short:
        return
    for p in DROPOUT:
        yield "dropout", {"p": p}
    yield "masksembles", {"train_mode": "repeat"}
    if task.kind == "classification":
        for options in RECIPES:
            yield "masksembles", options


def run_of(row: Mapping[str, Any]) -> Run:
    """The run that a line is of."""
    return Run(*(row[name] for name in ("task", "seed", "method", "epochs", "lr", "options")))

"""Which runs `quality.py` does: a sweep of budgets and rates, and then every seed with those that were best.

Each stage asks what those before it have found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from quality_group import Run
from quality_settings import MASK_OPTIONS, best, collect, is_afforded, settings_of
from quality_tasks import TASKS

SHORT = ("lenet", "diabetes")
"""The tasks of the short profile, which has the longer budget alone."""
SEEDS = {"short": range(3), "full": range(5)}
"""By profile."""
FIRST: dict[str, dict[str, Any]] = {
    "base": {}, "masksembles": {}, "ensemble": {}, "tuned ensemble": {}, "dropout": {"p": 0.1},
}  # fmt: skip
"""The options of each method that are swept; with others a method is trained as was best with these."""
DROPOUT = (0.25,)
MASKS: tuple[dict[str, Any], ...] = (
    {"scale": 1.5}, {"scale": 3.0}, {"scale": 1.2}, {"n": 2}, {"n": 8}, {"n": 8, "scale": 1.2}, {"rescale": False},
)  # fmt: skip
"""What is changed of n=4, scale 2, beside sites and train mode; the short profile has the first two."""
RECIPES: tuple[dict[str, Any], ...] = (
    {"shrink": 0.5}, {"core": 0.5}, {"teacher": 0.5}, {"last": 1},
    {"shrink": 0.5, "core": 0.5, "teacher": 0.5, "last": 1},
)  # fmt: skip
"""Other ways to fine-tune, one at a time and together; classifications only, for there is a teacher."""
RECIPE_SEEDS = 2
"""Of the seeds the first ones, on which these are tried."""
FINALISTS = 3
"""Masks that are trained longest."""


def sweep(task: str, profile: str) -> list[Run]:
    """Each method with all budgets and learning rates, the same for all of them, on the task's first seeds."""
    found = TASKS[task]
    budgets = found.epochs[-1:] if profile == "short" else found.epochs[::-1]
    return [
        Run(task, seed, method, epochs, lr, options)
        for seed in SEEDS[profile][: found.swept]
        for epochs in budgets
        for lr in found.lrs
        for method, options in FIRST.items()
    ]


def longer(task: str, profile: str, rows: Iterable[Mapping[str, Any]]) -> list[Run]:
    """More budgets, each for the methods that were best with the one before it, at the same rate.

    Args:
        rows: What was found so far; a budget follows when those of the one before it are among it.
    """
    found, runs = TASKS[task], sweep(task, profile)
    swept, budget = len(runs), max(found.epochs)
    for more in found.longer if profile == "full" else ():
        best = [run for run in _best(runs, rows) if run.epochs == budget]
        runs += [replace(r, seed=seed, epochs=more) for seed in SEEDS[profile][: found.swept] for r in best]
        budget = more
    return runs[swept:]


def rest(task: str, profile: str, seeds: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> list[Run]:
    """All seeds of each method with the budget and the rate that were best, and what else is tried of it.

    Best is the lowest NLL of the validation part. Where something is made of a method's runs in two ways (with a
    temperature, with more passes), each way has its own best. What else is tried of a method is trained as was best
    with the budgets that it can have, and beside it the method as it was swept.

    Args:
        seeds: Which.
        rows: What was found so far; a method that is not among it is left out.
    Returns:
        For each seed the methods, and after these for each of the task's first seeds what else is tried.
    """
    swept = [*sweep(task, profile), *longer(task, profile, rows)]
    winners = _best(swept, rows)
    best = [replace(run, seed=seed) for seed in seeds for run in winners]
    usual = {run.method: run for run in reversed(_best([r for r in swept if r.epochs <= _tried(task)], rows))}
    more = [
        replace(usual[method], seed=seed, options=options)
        for seed in seeds
        if seed in SEEDS[profile][: TASKS[task].varied]
        for method, options in _variations(task, profile, seed)
        if method in usual
    ]
    return list({run.key: run for run in best + more}.values())


def _tried(task: str) -> int:
    return TASKS[task].tried or max(TASKS[task].epochs)


def finish(task: str, profile: str, seeds: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> list[Run]:
    """The best masks with the longest budget: a few of them on one seed, and then the best of these on all seeds.

    They are among those that cost less than half a deep ensemble. Empty until all that is tried is there.
    """
    found, done = TASKS[task], {run_of(row).key for row in rows}
    runs = [run for run in rest(task, profile, SEEDS[profile], rows) if run.method == "masksembles"]
    tried = {run.key for run in runs if run.epochs <= _tried(task) and run.options.keys() <= MASK_OPTIONS}
    if not tried or tried - done:
        return []
    settings = collect(row for row in rows if run_of(row).key in tried)
    base_macs = next(row["base_macs"] for row in rows if row["task"] == task)
    some = [s for s in settings if s.name == "masksembles" and is_afforded(s, base_macs)]
    longest = max((run for run in runs if not run.options), key=lambda run: run.epochs)
    finalists = [
        replace(longest, seed=seed, options=setting.options)
        for seed in SEEDS[profile][: found.swept]
        for setting in sorted(some, key=lambda setting: setting.val_nll)[:FINALISTS]
    ]
    if {run.key for run in finalists} - done:
        return finalists
    usual = [replace(run, options={}) for run in finalists]
    winners = _best([*finalists, *usual], rows)
    return finalists + [replace(run, seed=seed) for seed in seeds for run in winners]


def _best(runs: Sequence[Run], rows: Iterable[Mapping[str, Any]]) -> list[Run]:
    """The best of these runs, as of one seed: of each method, and of each name that there are results of."""
    keys, found = {run.key for run in runs}, {}
    mine = [row for row in rows if run_of(row).key in keys]
    for method in FIRST:
        settings = settings_of([row for row in mine if row["method"] == method])
        for name in dict.fromkeys(setting.name for setting in settings):
            winner = best(setting for setting in settings if setting.name == name)
            run = replace(runs[0], method=method, epochs=winner.epochs, lr=winner.lr, options=winner.options)
            found[run.key] = run
    return list(found.values())


def _variations(name: str, profile: str, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    task, short = TASKS[name], profile == "short"
    for method in ("masksembles", "dropout"):
        yield method, FIRST[method]
    for options in MASKS[:2] if short else MASKS:
        yield "masksembles", options
    for sites in ("head",) if short else [sites for sites in task.sites if sites != "all"]:
        yield "masksembles", {"sites": sites}
    if short:
        return
    for p in DROPOUT:
        yield "dropout", {"p": p}
    yield "masksembles", {"train_mode": "repeat"}
    if task.kind == "classification" and seed < RECIPE_SEEDS:
        for options in RECIPES:
            yield "masksembles", options


def run_of(row: Mapping[str, Any]) -> Run:
    """The run that a line is of."""
    return Run(*(row[name] for name in ("task", "seed", "method", "epochs", "lr", "options")))

"""Which runs `quality.py` does: what every method tries, and what is tried of Masksembles alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quality_group import Run
from quality_tasks import TASKS

SHORT = ("lenet", "diabetes")
"""The tasks of the short profile, which has the longer budget alone."""
SEEDS = {"short": range(3), "full": range(5)}
"""By profile."""
DROPOUT = (0.1, 0.25, 0.5)
SINGLE: tuple[dict[str, Any], ...] = ({"scale": 1.5}, {"scale": 3.0}, {"n": 2}, {"n": 8}, {"rescale": False})
"""What is changed of n=4, scale 2, one thing at a time, beside sites and train mode."""
RECIPES: tuple[dict[str, Any], ...] = (
    {"shrink": 0.5}, {"core": 0.5}, {"teacher": 0.5}, {"last": 1},
    {"shrink": 0.5, "core": 0.5, "teacher": 0.5, "last": 1},
)  # fmt: skip
"""Other ways to fine-tune, one at a time and together; classifications only, for there is a teacher."""


def plan(profile: str, tasks: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Run]:
    """The runs, those of one task and one seed together; None: the tasks and the seeds of the profile."""
    chosen = tasks or (SHORT if profile == "short" else tuple(TASKS))
    some = SEEDS[profile] if seeds is None else seeds
    return [Run(task, seed, *rest) for task in chosen for seed in some for rest in _of_task(task, profile)]


def _of_task(name: str, profile: str) -> Iterator[tuple[str, int, float, dict[str, Any]]]:
    """Method, epochs, learning rate and options: with all of these the same budgets and rates are tried."""
    task = TASKS[name]
    short = profile == "short"
    methods: list[tuple[str, dict[str, Any]]] = [
        ("base", {}),
        ("masksembles", {}),
        ("ensemble", {}),
        ("tuned ensemble", {}),
        *(("dropout", {"p": p}) for p in (DROPOUT[:1] if short else DROPOUT)),
        *(("masksembles", options) for options in (SINGLE[:2] if short else SINGLE)),
        *(("masksembles", {"sites": sites}) for sites in (("head",) if short else task.sites) if sites != "all"),
    ]
    if not short:
        methods += [("masksembles", {"train_mode": "repeat"})]
        if task.kind == "classification":
            methods += [("masksembles", options) for options in RECIPES]
    for epochs in task.epochs[1:] if short else reversed(task.epochs):
        for lr in task.lrs:
            for method, options in methods:
                yield method, epochs, lr, options

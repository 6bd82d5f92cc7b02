"""Which runs `quality.py` does: what every method tries, and what is tried of Masksembles alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from quality_group import Run
from quality_tasks import TASKS

PROFILES = ("short", "full")
SHORT = ("lenet", "diabetes")
"""The tasks of the short profile."""
DROPOUT = (0.1, 0.25)
SINGLE: tuple[dict[str, Any], ...] = ({"scale": 1.5}, {"scale": 3.0}, {"n": 2}, {"n": 8}, {"rescale": False})
"""What is changed of n=4, scale 2, one thing at a time, beside sites and train mode."""
RECIPES: tuple[dict[str, Any], ...] = (
    {"grow": 0.5}, {"core": 0.5}, {"teacher": 0.5}, {"last": 1}, {"grow": 0.5, "core": 0.5, "teacher": 0.5, "last": 1},
)  # fmt: skip
"""Other ways to fine-tune, one at a time and together; classifications only, for there is a teacher."""


def plan(profile: str, tasks: Sequence[str] | None, seeds: Sequence[int]) -> list[Run]:
    """The runs, those of one task and one seed together."""
    chosen = tasks or (SHORT if profile == "short" else tuple(TASKS))
    return [Run(task, seed, *rest) for task in chosen for seed in seeds for rest in _of_task(task, profile)]


def _of_task(name: str, profile: str) -> Iterator[tuple[str, int, float, dict[str, Any]]]:
    """Method, epochs, learning rate and options."""
    task = TASKS[name]
    short, long = task.epochs
    for epochs in (long, short):
        for lr in task.lrs:
            yield "base", epochs, lr, {}
            yield "masksembles", epochs, lr, {}
            yield "tuned ensemble", epochs, lr, {}
            yield "ensemble", epochs, lr, {}
            for p in DROPOUT if profile == "full" and epochs == long else DROPOUT[:1]:
                yield "dropout", epochs, lr, {"p": p}
    for lr in task.lrs:
        for options in SINGLE[:2] if profile == "short" else SINGLE:
            yield "masksembles", long, lr, options
        for sites in ("head",) if profile == "short" else [name for name in task.sites if name != "all"]:
            yield "masksembles", long, lr, {"sites": sites}
        if profile == "full":
            for options in RECIPES if task.kind == "classification" else ():
                yield "masksembles", long, lr, options
            yield "masksembles", long, lr, {"train_mode": "repeat"}

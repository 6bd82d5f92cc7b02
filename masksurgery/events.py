"""What a training run tells of itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from masksurgery.types import TrainingError


@dataclass(frozen=True)
class Begun:
    """The run begins, or goes on, after `step` of `steps` steps, on so many processes."""

    step: int
    steps: int
    steps_per_epoch: int
    processes: int = 1


@dataclass(frozen=True)
class Measured:
    """Means over the last steps; after an epoch over the epoch, with the figures of the validation.

    Attributes:
        lr: The largest learning rate of the last step.
        val: Mean of each score; None between the epochs.
        best: The model is the best one so far.
        images_per_second: Of training, over all processes.
        seconds: Since the run was begun, without the time that it stood still.
    """

    epoch: int
    step: int
    lr: float
    train_loss: float
    train_accuracy: float | None
    images_per_second: float
    seconds: float
    val: Mapping[str, float] | None = None
    best: bool = False

    def row(self) -> dict[str, Any]:
        names = ("epoch", "step", "lr", "train_loss", "train_accuracy", "images_per_second", "seconds")
        row = {name: getattr(self, name) for name in names}
        row["images_per_second"], row["seconds"] = round(row["images_per_second"], 1), round(row["seconds"], 2)
        return row | {f"val_{name}": value for name, value in (self.val or {}).items()}


Observer: TypeAlias = "Callable[[Begun | Measured], None]"


class Interrupted(TrainingError):
    """A signal has stopped the run, after its state was saved."""

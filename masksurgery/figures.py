"""How far a run is, and its figures: fetched from devices and processes, written down, and told."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from masksurgery.events import Begun, Measured, Observer
from masksurgery.runs import RunFolder
from masksurgery.training_config import FinetuneConfig
from masksurgery.types import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Progress:
    """How far a run is: what is saved besides the tensors.

    Attributes:
        step: Steps that are done.
        evaluated: The epoch that ends with this step has been evaluated.
        best: The smallest criterion in validation.
        epoch_sums: Sum of the losses, of the accuracies, and number of steps since the epoch began.
        recent: Losses and accuracies since the last row of the metrics.
        seconds: Time that the run has taken.
    """

    step: int = 0
    evaluated: bool = True
    best: float = math.inf
    epoch_sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    recent: list[list[float]] = field(default_factory=list)
    seconds: float = 0.0


class Figures:
    """The losses of a run, read from the device only when they are needed.

    Args:
        config: The settings.
        accelerator: Of the processes.
        folder: Of the run.
        steps_per_epoch: Steps of an epoch.
        observer: Is told on the main process.
    Attributes:
        progress: How far the run is.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        accelerator: Accelerator,
        folder: RunFolder,
        steps_per_epoch: int,
        observer: Observer | None,
    ) -> None:
        self.config, self.accelerator, self.folder = config, accelerator, folder
        self.steps_per_epoch, self.observer = steps_per_epoch, observer
        self.progress = Progress()
        self._pending: list[Tensor] = []
        self._clock = 0.0
        self._since = self._epoch_since = (0.0, 0)

    def begin(self) -> None:
        """Start the clocks, and tell where the run begins."""
        self._clock = time.perf_counter()
        self.restart_epoch()
        steps = self.config.epochs * self.steps_per_epoch
        self._tell(Begun(self.progress.step, steps, self.steps_per_epoch, self.accelerator.num_processes))

    def add(self, found: Tensor) -> None:
        """Note loss and accuracy [2] of a step, which is then done."""
        self._pending.append(found)
        self.progress.step += 1
        self.progress.evaluated = self.progress.step % self.steps_per_epoch > 0

    def collect(self) -> None:
        """Fetch the losses of the last steps from the device and from the other processes.

        Raises:
            TrainingError: One is no number.
        """
        if not self._pending:
            return
        found = self.accelerator.reduce(torch.stack(self._pending), "mean").tolist()
        first = self.progress.step - len(found) + 1
        self._pending.clear()
        for step, (loss, right) in enumerate(found, first):
            if not math.isfinite(loss):
                self.fail(f"the loss of step {step} is {loss}")
            self.progress.recent.append([loss, right])
            for k, value in enumerate((loss, right, 1.0)):
                self.progress.epoch_sums[k] += value

    def fail(self, seen: str) -> NoReturn:
        kept = " What was saved before is kept, but would meet the same again." if self.folder.has_state else ""
        raise TrainingError(
            f"{self.folder.path}: {seen}.{kept} Begin anew with a smaller learning rate (it is {self.config.lr:g}) or "
            f"with --clip-grad, and look for NaN in the data."
        )

    def log(self, lr: float) -> None:
        """Tell the means over the last steps."""
        self.collect()
        recent = self.progress.recent
        loss, right = (sum(column) / len(recent) for column in zip(*recent, strict=True))
        self.progress.recent = []
        self._tell(self._measured(lr, loss, right, self._speed(self._since)))
        self._since = (time.perf_counter(), self.progress.step)

    def epoch_speed(self) -> float:
        """Images per second of training since the epoch began."""
        return self._speed(self._epoch_since)

    def end_epoch(self, lr: float, speed: float, scores: Mapping[str, float], criterion: str) -> bool:
        """Tell the means over the epoch, with the scores of its validation; returns whether it is the best so far."""
        p = self.progress
        if not math.isfinite(scores[criterion]):
            self.fail(f"after step {p.step} the {criterion} of the validation is {scores[criterion]}")
        loss, right, steps = p.epoch_sums
        best = scores[criterion] < p.best
        self._tell(self._measured(lr, loss / steps, right / steps, speed, val=scores, best=best))
        p.best, p.evaluated, p.epoch_sums = min(p.best, scores[criterion]), True, [0.0, 0.0, 0.0]
        return best

    def stop_clock(self) -> None:
        """Count the time until now."""
        now = time.perf_counter()
        self.progress.seconds += now - self._clock
        self._clock = now

    def restart_epoch(self) -> None:
        """The time of the validation and of saving is none of the next epoch."""
        self._since = self._epoch_since = (time.perf_counter(), self.progress.step)

    def _speed(self, since: tuple[float, int]) -> float:
        """Images per second since a time, at which so many steps were done."""
        seconds = time.perf_counter() - since[0]
        return (self.progress.step - since[1]) * self.config.batch_size / max(seconds, 1e-9)

    def _measured(self, lr: float, loss: float, right: float, speed: float, **more: Any) -> Measured:
        self.stop_clock()
        p = self.progress
        epoch = (p.step - 1) // self.steps_per_epoch + 1
        return Measured(epoch, p.step, lr, loss, None if math.isnan(right) else right, speed, p.seconds, **more)

    def _tell(self, event: Begun | Measured) -> None:
        if not self.accelerator.is_main_process:
            return
        if isinstance(event, Measured):
            row = event.row()
            self.folder.add_metrics(row)
            self.accelerator.log({name: x for name, x in row.items() if x is not None and name != "step"}, event.step)
        if self.observer is not None:
            self.observer(event)

"""The loop of fine-tuning: on one CPU or many machines, with a state that is never lost.

Whatever is random in a step is drawn by (seed, step, process), and the batches of a step by (seed, step): so a run that
was killed goes on from its last state as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from masksurgery.events import Interrupted, Observer
from masksurgery.figures import Figures, Progress
from masksurgery.freezing import freeze, keep_frozen
from masksurgery.layers import repeat_targets
from masksurgery.losses import Objective
from masksurgery.model import ConvertedModel
from masksurgery.optimisation import create_ema, create_optimizer
from masksurgery.randomness import forked_random_state, seed_global
from masksurgery.runs import RunFolder
from masksurgery.stopping import StopRequest
from masksurgery.training_config import FinetuneConfig
from masksurgery.validation import Stopped, validate

if TYPE_CHECKING:
    from accelerate import Accelerator


class Batches(Protocol):
    """Batches of images and targets, for this process."""

    def train(self, start: int, stop: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Those of the steps start to stop - 1."""

    def val(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Every validation sample once."""


class Trainer:
    """Trains a model in place.

    Args:
        model: A converted model, or a base model.
        state: Of the folder, to go on from.
        mixup: Mixes the samples of a batch, and their targets.
        trained: Names of the modules that are trained; None for all.
        batches: Of this process.
        steps_per_epoch: Steps of an epoch.
        config: The settings.
        objective: The loss and the scores.
        accelerator: Accelerate's: devices, processes and precision.
        folder: Of the run; it has been begun.
        save: Saves the model to a folder, whole or not.
        prepare: Called once before the first step, on the main process, with the model.
        observer: Is told what is going on, on the main process.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        steps_per_epoch: int,
        config: FinetuneConfig,
        objective: Objective,
        accelerator: Accelerator,
        folder: RunFolder,
        save: Callable[[nn.Module, Any], object],
        state: Mapping[str, Any] | None = None,
        mixup: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        trained: tuple[str, ...] | None = None,
        prepare: Callable[[nn.Module], object] | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.module, self.batches, self.steps_per_epoch = model, batches, steps_per_epoch
        self.config, self.objective, self.accelerator, self.folder = config, objective, accelerator, folder
        self.save, self.state, self.mixup = save, state, mixup
        self.trained, self.prepare = trained, prepare
        self.steps = config.epochs * steps_per_epoch
        self.figures = Figures(config, accelerator, folder, steps_per_epoch, observer)
        self.stop = StopRequest()

    @property
    def progress(self) -> Progress:
        return self.figures.progress

    def run(self) -> Progress:
        """Train from the folder's state, if it has one, to the end.

        Raises:
            Interrupted: SIGINT or SIGTERM has come; the state is saved.
            TrainingError: The loss or a weight is no number.
            CheckpointError: A file cannot be written.
        """
        with forked_random_state(self.accelerator.device), self.stop:
            self._set_up()
            self.figures.begin()
            if not self.progress.evaluated:
                self._end_epoch()
            start = self.progress.step
            for x, y in self.batches.train(start, self.steps) if start < self.steps else ():
                self._step(x, y)
                self._after_step()
        return self.progress

    # --- beginning ---------------------------------------------------------------------------------------------------

    def _set_up(self) -> None:
        state = self.state
        if state is None and self.prepare is not None:
            if self.accelerator.is_main_process:  # the others get its buffers when the model is wrapped
                self.module.to(self.accelerator.device)
                self.prepare(self.module)
            self.accelerator.wait_for_everyone()
        freeze(self.module, self.trained)
        if state is not None:
            self.module.load_state_dict(state["model"])
        self.optimizer, self.scheduler = create_optimizer(self.module, self.config, self.steps_per_epoch)
        self.ema = create_ema(self.module.to(self.accelerator.device), self.config)
        self.model, self.optimizer = self.accelerator.prepare(self.module, self.optimizer)
        if self.ema is not None and self.accelerator.num_processes > 1:
            self.ema.module.load_state_dict(self.module.state_dict())  # what the main process has prepared
        if state is not None:
            self._restore(state)
            self.state = None  # its tensors are not needed twice
        if self.accelerator.is_main_process:
            self.folder.keep_metrics(self.progress.step, self.progress.evaluated)
        self._train_mode()

    def _train_mode(self) -> None:
        self.model.train()
        keep_frozen(self.module, self.trained)

    # --- a step ------------------------------------------------------------------------------------------------------

    def _step(self, x: Tensor, y: Tensor) -> None:
        c, a, step = self.config, self.accelerator, self.progress.step
        seed_global("step", c.seed, step, a.process_index, device=a.device)
        if self.scheduler is not None:
            self.scheduler.step_update(step)
        x, y = x.to(a.device, non_blocking=True), y.to(a.device, non_blocking=True)
        members = self._assign(len(x), step)
        if self.mixup is not None:
            x, y = self.mixup(x, y)
        xs, ys = x.chunk(c.accumulate), y.chunk(c.accumulate)
        parts = zip(xs, ys, members.chunk(c.accumulate), self._shares(ys), strict=True)
        found = torch.stack([self._part(*part) for part in parts]).mean(0)
        self.figures.add(found)
        if self.ema is not None:
            self.ema.update(self.module, step=self.progress.step)

    def _assign(self, count: int, step: int) -> Tensor:
        """Members by the position of a sample among all that the run has seen: near-equal shares of a global batch."""
        n = self.module.members_module.n if isinstance(self.module, ConvertedModel) else 1
        first = step * self.config.batch_size + self.accelerator.process_index * count
        return (torch.arange(count, device=self.accelerator.device) + first) % n

    def _shares(self, ys: Sequence[Tensor]) -> Sequence[Tensor | float]:
        """What the mean of each part counts, where parts differ in how many targets they have: 1 on average."""
        counts = self.objective.count_known(ys)
        if counts is None:
            return [1.0] * len(ys)
        return counts / self.accelerator.reduce(counts.mean(), "mean").clamp_min(1)

    def _part(self, x: Tensor, y: Tensor, members: Tensor, share: Tensor | float) -> Tensor:
        """Forward, backward, and after the last part of a step the update; returns loss and accuracy."""
        a = self.accelerator
        if isinstance(self.module, ConvertedModel):
            self.module.members_module.fixed = members
            if self.module.members_module.train_mode == "repeat":
                y = repeat_targets(y, self.module.members_module.n)
        with a.accumulate(self.model):
            outputs = self.model(x)
            loss = self.objective(outputs, y) * share
            a.backward(loss)
            if a.sync_gradients and self.config.clip_grad:
                a.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad()
        right = self.objective.correct(outputs, y)
        return torch.stack([loss.detach(), torch.full_like(loss, math.nan) if right is None else right.to(loss.dtype)])

    def _after_step(self) -> None:
        p, c = self.progress, self.config
        ends = p.step % self.steps_per_epoch == 0
        if p.step % c.log_every == 0:
            self.figures.log(self._rate())
        if ends:
            self._end_epoch()
        elif c.checkpoint_every and p.step % c.checkpoint_every == 0:
            self._checkpoint()
        if p.step < self.steps and self._asked_to_stop():
            if not ends:
                self._checkpoint()
            raise Interrupted(
                f"{self.stop.asked or 'A signal'}: stopped after step {p.step} of {self.steps}. It is saved."
            )

    # --- validation and saving ---------------------------------------------------------------------------------------

    def _end_epoch(self) -> None:
        speed, processes = self.figures.epoch_speed(), self.accelerator.num_processes
        self._checkpoint()  # should the validation fail, the epoch is not lost
        try:
            scores = validate(
                self._result(), self.batches.val(), self.objective, self.accelerator,
                lambda: self.stop.asked is not None and processes == 1,
            )  # fmt: skip
        except Stopped:
            raise Interrupted(
                f"{self.stop.asked}: stopped in the validation after step {self.progress.step}. It is saved."
            ) from None
        self._train_mode()
        best = self.figures.end_epoch(self._rate(), speed, scores, self.objective.criterion)
        if self.accelerator.is_main_process:
            for folder in (self.folder.path, self.folder.last) if best else (self.folder.last,):
                self.save(self._result(), folder)
        self._checkpoint()
        self.figures.restart_epoch()

    def _rate(self) -> float:
        """The largest learning rate."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def _result(self) -> nn.Module:
        """What is evaluated and saved: the averaged weights where there are any."""
        return self.module if self.ema is None else self.ema.module

    def _check_finite(self) -> None:
        for name, tensor in self.module.state_dict().items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                self.figures.fail(f"'{name}' has values that are no numbers after step {self.progress.step}")

    def _checkpoint(self) -> None:
        self.figures.collect()
        self._check_finite()
        self.figures.stop_clock()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            self.folder.write_state(
                {
                    **vars(self.progress),
                    "model": self.module.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "ema": None if self.ema is None else self.ema.module.state_dict(),
                    "scaler": None if scaler is None else scaler.state_dict(),
                }
            )
        self.accelerator.wait_for_everyone()

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.figures.progress = Progress(**{name: state[name] for name in vars(self.progress)})

    def _asked_to_stop(self) -> bool:
        """Whether to stop now: processes do so after the same step, which they settle when they log."""
        if self.accelerator.num_processes == 1:
            return self.stop.asked is not None
        if self.progress.step % self.config.log_every:
            return False
        if self.stop.asked:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

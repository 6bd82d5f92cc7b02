"""The settings of fine-tuning, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from masksurgery.losses import LOSSES, Loss
from masksurgery.types import ConfigError

Precision = Literal["no", "fp16", "bf16"]
Schedule = Literal["cosine", "tanh", "step", "poly", "none"]

FREE = ("log_every", "log_with", "workers", "checkpoint_every", "find_unused_parameters")
"""The settings that a resumed run may change, because they do not change the model."""

FREE_OF_DATA = ("download", "check", "max_bad")
"""The same of `DataConfig`; what is found with them may not change."""


@dataclass(frozen=True)
class FinetuneConfig:
    """The settings of a run, checked.

    But for BatchNorm, and for what dropout and mixup draw, neither processes nor `accumulate` change what a step does.

    Attributes:
        epochs: How often every training image is seen; an ensemble with masks gains from several times as many as its
            base model does (README, "Quality").
        batch_size: Images of a step, over all processes.
        accumulate: Parts that a process computes its share of a step in, one after another, to save memory.
        opt: One of timm's optimisers.
        lr: Largest learning rate.
        weight_decay: Not for biases and norms, nor for what the model's `no_weight_decay()` names.
        momentum: Of optimisers that have one.
        layer_decay: Factor of the learning rate from each layer to the one before it, such as 0.75.
        sched: One of timm's schedules; "none" keeps `lr`.
        warmup_epochs: Epochs, or a part of one, in which the rate rises.
        min_lr: Where the schedule ends.
        decay_epochs: Epochs between two decays, for "step".
        decay_rate: Factor of a decay for "step", power for "poly".
        clip_grad: Largest norm of the gradients; 0 for no limit.
        ema_decay: Decay of a moving average of the weights, such as 0.999, which is then evaluated and saved.
        mixup: Alpha of timm's mixup; 0 for none.
        cutmix: Alpha of timm's CutMix; 0 for none.
        label_smoothing: Share of the target that goes to all classes alike.
        loss: By default that of the task.
        freeze: Train the output layers only; the others stay as they are in evaluation.
        recalibrate: Re-estimate the statistics of BatchNorm under the masks before the first step.
        mixed_precision: By default what Accelerate is configured with.
        checkpoint_every: Steps between two saved states; the end of an epoch saves one in any case.
        log_every: Steps between two rows of the metrics.
        log_with: Accelerate's trackers: "tensorboard", "wandb", "trackio" ...
        workers: Processes that read images, for each one that trains; by default up to 4.
        find_unused_parameters: For models with parameters that a forward may leave out, on several processes.
        seed: For everything that is drawn.
    Raises:
        ConfigError: A value cannot be.
    """

    epochs: int = 30
    batch_size: int = 32
    accumulate: int = 1
    opt: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    layer_decay: float | None = None
    sched: Schedule = "cosine"
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    decay_epochs: float = 1.0
    decay_rate: float = 0.1
    clip_grad: float = 1.0
    ema_decay: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    loss: Loss | None = None
    freeze: bool = False
    recalibrate: bool = True
    mixed_precision: Precision | None = None
    checkpoint_every: int | None = None
    log_every: int = 10
    log_with: tuple[str, ...] = ()
    workers: int | None = None
    find_unused_parameters: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "log_every", "checkpoint_every"):
            self._check(name, lambda x: _is_whole(x) and x >= 1, "a whole number from 1 on")
        for name in ("seed", "workers"):
            self._check(name, lambda x: _is_whole(x) and x >= 0, "a whole number from 0 on")
        for name in ("lr", "decay_epochs", "decay_rate"):
            self._check(name, lambda x: 0 < x < float("inf"), "a number above 0")
        for name in ("weight_decay", "warmup_epochs", "min_lr", "mixup", "cutmix", "momentum", "clip_grad"):
            self._check(name, lambda x: 0 <= x < float("inf"), "a number from 0 on")
        for name in ("label_smoothing", "ema_decay"):
            self._check(name, lambda x: 0 <= x < 1, "a number from 0 to below 1")
        self._check("layer_decay", lambda x: 0 < x <= 1, "a number above 0, at most 1")
        for name, known in (("sched", get_args(Schedule)), ("loss", LOSSES), ("mixed_precision", get_args(Precision))):
            self._check(name, lambda x, known=known: x in known, f"one of {', '.join(map(repr, known))}")
        if self.sched == "none" and (self.warmup_epochs or self.min_lr):
            raise ConfigError('sched="none" keeps the rate: it takes no warmup_epochs and no min_lr.')
        if self.warmup_epochs > self.epochs:
            raise ConfigError(
                f"warmup_epochs={self.warmup_epochs} is more than epochs={self.epochs}. Warm up for less."
            )

    def _check(self, name: str, holds: Any, what: str) -> None:
        value = getattr(self, name)
        try:
            fine = (value is None and self.__dataclass_fields__[name].default is None) or holds(value)
        except TypeError:
            fine = False
        if not fine:
            raise ConfigError(f"{name}={value!r} is not {what}.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""timm's optimisers, schedules, weight averages and mixup, by the settings of a run."""

from __future__ import annotations

from typing import Any

from torch import nn

from masksurgery.training_config import FinetuneConfig
from masksurgery.types import ConfigError


def create_optimizer(model: nn.Module, config: FinetuneConfig, steps_per_epoch: int) -> tuple[Any, Any]:
    """The optimiser, and a schedule that is a function of the step; None if the rate stays."""
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    optimizer = create_optimizer_v2(
        model,
        config.opt,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        layer_decay=config.layer_decay,
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        config.sched,
        num_epochs=config.epochs,
        decay_epochs=config.decay_epochs,
        decay_rate=config.decay_rate,
        min_lr=config.min_lr,
        warmup_lr=config.lr / 100,
        warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]  # parts of epochs are steps
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return optimizer, scheduler


def check_optimizer(name: str) -> None:
    """Raise a ConfigError unless timm has an optimiser of this name."""
    import difflib

    from timm.optim import list_optimizers

    known = [str(known) for known in list_optimizers()]
    if name.lower() not in known:
        close = difflib.get_close_matches(name.lower(), known) or known[:8]
        raise ConfigError(f"opt={name!r} is no optimiser of timm. Close: {', '.join(close)}.")


def create_ema(model: nn.Module, config: FinetuneConfig) -> Any:
    """A moving average of the weights; None if none is wanted."""
    from timm.utils import ModelEmaV3

    return None if config.ema_decay is None else ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)


def create_mixup(config: FinetuneConfig, classes: int) -> Any:
    """timm's mixup and CutMix; None if neither is wanted."""
    from timm.data import Mixup

    if not (config.mixup or config.cutmix):
        return None
    return Mixup(config.mixup, config.cutmix, label_smoothing=config.label_smoothing, num_classes=classes)

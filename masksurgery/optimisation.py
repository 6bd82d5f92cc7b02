"""timm's optimisers, schedules, weight averages and mixup, by the settings of a run."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from masksurgery.sources import one_line
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


def check_optimizer(config: FinetuneConfig) -> None:
    """Raise a ConfigError unless timm has the optimiser, and makes it with these settings."""
    from timm.optim import list_optimizers

    known = [str(name) for name in list_optimizers()]
    if config.opt.lower() not in known:
        close = difflib.get_close_matches(config.opt.lower(), known) or known[:8]
        raise ConfigError(f"opt={config.opt!r} is no optimiser of timm. Close: {', '.join(close)}.")
    try:
        model = nn.Linear(1, 1)
        optimizer, _ = create_optimizer(model, replace(config, layer_decay=None), 1)
        model(torch.ones(1, 1)).sum().backward()
        optimizer.step()
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"opt={config.opt!r} and sched={config.sched!r} cannot be used: {one_line(error)}") from error


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

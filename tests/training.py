"""A small training run without files: a model, batches that are functions of the step, and a trainer for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import masksurgery
from masksurgery.events import Begun, Measured
from masksurgery.losses import Objective, choose_loss
from masksurgery.runs import RunFolder
from masksurgery.trainer import Trainer
from masksurgery.training_config import FinetuneConfig

CLASSES, SIZE, STEPS = 4, 16, 5


class Small(nn.Module):
    """Two convolutions with BatchNorm, dropout and a classifier; it answers what timm's optimisers ask."""

    def __init__(self, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 24, 3, 2, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.drop = nn.Dropout(drop_rate)
        self.fc = nn.Linear(24, CLASSES)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return {"stem": r"^stem", "blocks": r"^body"}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.body(self.stem(x)).mean((2, 3))))


def make_base(**kwargs: Any) -> nn.Module:
    """The small network, with the same random weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small(**kwargs)


def make_timm(name: str, **kwargs: Any) -> nn.Module:
    """An architecture of timm, with the same random weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return timm.create_model(name, **kwargs)


def make_model(name: str = "", **kwargs: Any) -> masksurgery.ConvertedModel:
    """A converted model."""
    settings = {key: kwargs.pop(key) for key in ("n", "task", "train_mode", "where") if key in kwargs}
    base = make_timm(name, num_classes=CLASSES, **kwargs) if name else make_base(**kwargs)
    return masksurgery.convert(base, example_inputs=(torch.zeros(1, 3, SIZE, SIZE),), **settings)


class Batches:
    """Classes that show in the mean of the image. `at` is called with each step before its batch is given."""

    def __init__(
        self, batch: int = 8, at: Callable[[int], object] = lambda step: None, spoil: int | None = None
    ) -> None:
        self.batch, self.at, self.spoil = batch, at, spoil

    def train(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start, stop):
            self.at(step)
            x, y = self._make(step)
            yield (x * float("nan") if step == self.spoil else x), y

    def val(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from map(self._make, (1000, 1001, 1002))

    def _make(self, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        y = torch.randint(CLASSES, (self.batch,), generator=generator)
        x = torch.randn(self.batch, 3, SIZE, SIZE, generator=generator)
        return x + y[:, None, None, None] / 2, y


class Observed(list[Begun | Measured]):
    """The events of a run."""

    def __call__(self, event: Begun | Measured) -> None:
        self.append(event)

    @property
    def epochs(self) -> list[Measured]:
        return [event for event in self if isinstance(event, Measured) and event.val is not None]

    @property
    def losses(self) -> list[float]:
        return [event.train_loss for event in self if isinstance(event, Measured) and event.val is None]


def make_trainer(
    folder: Path,
    model: nn.Module | None = None,
    batches: Batches | None = None,
    resume: bool = False,
    task: str = "classification",
    **settings: Any,
) -> tuple[Trainer, Observed]:
    """A trainer of two epochs of five steps."""
    extra = {key: settings.pop(key) for key in ("trained", "mixup", "prepare", "save") if key in settings}
    config = FinetuneConfig(**{"epochs": 2, "batch_size": 8, "log_every": 1, **settings})
    objective = Objective(task, choose_loss(task, False), 1, config.label_smoothing)  # type: ignore[arg-type]
    run, observed = RunFolder(folder), Observed()
    run.begin({"seed": config.seed}, resume=resume, force=False)
    accelerator = Accelerator(gradient_accumulation_steps=config.accumulate)
    save = extra.pop("save", partial(masksurgery.save, force=True))
    trainer = Trainer(
        model if model is not None else make_model(),
        batches or Batches(),
        STEPS,
        config,
        objective,
        accelerator,
        run,
        save,
        state=run.read_state(),
        observer=observed,
        **extra,
    )
    return trainer, observed

"""The data of a training run: opened and checked once for all processes, and the batches of each."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from masksurgery import prediction
from masksurgery.data import (
    LISTED,
    Batches,
    Data,
    DataConfig,
    Source,
    eval_batches,
    open_data,
    steps_per_epoch,
    train_batches,
)
from masksurgery.ensemble import whole_output
from masksurgery.images import Broken, image_input, preprocessing_of
from masksurgery.losses import answered_prediction
from masksurgery.model import ConvertedModel
from masksurgery.recalibrate import recalibrate
from masksurgery.training_config import FinetuneConfig
from masksurgery.transforms import Augmentation, Transform
from masksurgery.types import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

RECALIBRATION_IMAGES = 2048
"""Mean and variance over so many images differ from those over all by a few per cent of a standard deviation."""


def open_for_run(
    config: DataConfig, model: ConvertedModel, outputs: int, settings: FinetuneConfig, accelerator: Accelerator
) -> Data:
    """The data, checked by the main process for all of them, for a model with so many outputs."""
    from accelerate.utils import broadcast_object_list

    shape, _ = image_input(model)
    task = model.settings.task
    read = partial(open_data, config, task=task, channels=shape[1], num_classes=outputs, workers=settings.workers)
    if config.masks and (settings.mixup or settings.cutmix or settings.loss == "bce"):
        raise ConfigError("masks of segmentation go with neither mixup, cutmix nor loss='bce'. Leave these out.")
    parts = read() if accelerator.is_main_process else None
    found = [parts.bad if parts else ()]
    broadcast_object_list(found)
    parts = parts or read(bad=found[0])
    if accelerator.is_main_process:
        tell_broken(parts.bad)
    given = len(parts.classes) if parts.classes else outputs
    if isinstance(parts.train, Source) and task in ("regression", "multilabel"):
        given = torch.as_tensor(parts.train.read(0)[1]).numel()
    if given != outputs:
        what = "classes" if task in ("classification", "probabilities") else "targets for each image"
        raise ConfigError(
            f"The model has {outputs} outputs, the data {given} {what}. Convert the base model again with "
            f"--num-classes {given}."
        )
    return parts


def count_outputs(model: ConvertedModel) -> int:
    """The number of classes, or of numbers, that the model returns for a sample."""
    shape, dtype = image_input(model)
    with torch.no_grad(), whole_output(model):
        found = answered_prediction(model.eval()(torch.zeros(2, *shape[1:], dtype=getattr(torch, dtype))))
    assert found is not None  # an output without a batch dimension is refused by convert
    return prediction.count_outputs(found, model.settings.task, model.settings.class_dim)


def tell_broken(images: Sequence[Broken]) -> None:
    for image in images[:LISTED]:
        logger.warning("left out: %s", image.reason)
    if len(images) > LISTED:
        logger.warning("left out: %d more broken images", len(images) - LISTED)


@dataclass(frozen=True)
class Loaders:
    """The batches of one process."""

    parts: Data
    training: Transform
    evaluation: Transform
    config: FinetuneConfig
    rank: int
    world: int

    @classmethod
    def of(
        cls,
        model: ConvertedModel,
        parts: Data,
        config: FinetuneConfig,
        augmentation: Augmentation,
        accelerator: Accelerator,
    ) -> Loaders:
        prepared = preprocessing_of(model)
        share = accelerator.num_processes * config.accumulate
        even = share * (2 if config.mixup or config.cutmix else 1)
        if config.batch_size % even:
            pairs = ", in pairs for mixup" if even > share else ""
            raise ConfigError(
                f"batch_size={config.batch_size} cannot be divided into {accelerator.num_processes} processes times "
                f"accumulate={config.accumulate} parts{pairs}. Pass a multiple of {even}."
            )
        training = prepared.training(augmentation, masks=parts.masks)
        evaluation = prepared.evaluation(masks=parts.masks)
        return cls(parts, training, evaluation, config, accelerator.process_index, accelerator.num_processes)

    def train(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        c = self.config
        steps: dict[str, Any] = {"batch_size": c.batch_size, "steps": (start, stop), "seed": c.seed}
        return _telling(train_batches(self.parts.train, self.training, **steps, **self._of_process()))

    def val(self) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.config.batch_size // self.config.accumulate
        return _telling(eval_batches(self.parts.val, self.evaluation, batch_size=size, **self._of_process()))

    def _of_process(self) -> dict[str, Any]:
        pinned = torch.cuda.is_available()
        return {"rank": self.rank, "world": self.world, "workers": self.config.workers, "pin_memory": pinned}

    def recalibrate(self, model: nn.Module) -> None:
        """Re-estimate statistics over training images as they are in evaluation, on one process."""
        assert isinstance(model, ConvertedModel)
        c, images = self.config, self.parts.train
        size = c.batch_size // (c.accumulate * self.world)  # what fits when it trains
        steps = min(-(-RECALIBRATION_IMAGES // size), steps_per_epoch(images, size))
        recalibrate(
            model,
            train_batches(images, self.evaluation, batch_size=size, steps=(0, steps), seed=c.seed, workers=c.workers),
        )


def _telling(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches; broken samples of a stream, which nobody has read before, are named as they come."""
    told = 0
    for batch in batches:
        tell_broken(batches.bad[told:])
        told = len(batches.bad)
        yield batch
    tell_broken(batches.bad[told:])

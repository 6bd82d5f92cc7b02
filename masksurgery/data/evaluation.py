"""Open the one part of a data set that a model is evaluated on, and images of which nothing else is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from masksurgery.data.check import BrokenImage
from masksurgery.data.config import DataConfig
from masksurgery.data.named import FOLDERS, open_unlabelled_named, root_of
from masksurgery.data.opening import is_table, leave_out_broken, open_parts
from masksurgery.data.source import FileItems, Source, hold_out
from masksurgery.data.streams import STREAMS, Stream, open_unlabelled_stream
from masksurgery.data.table import open_unlabelled_table
from masksurgery.images import ImageError, find_images
from masksurgery.types import DataError


@dataclass(frozen=True)
class EvaluationData:
    """Data to evaluate on.

    Attributes:
        source: Images by index, or a stream.
        classes: Names in the order of their indices, of the labels of "multilabel" too; None where they are not known.
        masks: The model is one of segmentation: `Preprocessing.evaluation` is to be told so. The targets are masks,
            but for unlabelled images.
        bad: Broken images that are left out.
    """

    source: Source | Stream
    classes: tuple[str, ...] | None = None
    masks: bool = False
    bad: tuple[BrokenImage, ...] = ()


def open_evaluation(
    config: DataConfig,
    *,
    task: str = "classification",
    channels: int = 3,
    num_classes: int | None = None,
    everything: bool = False,
    workers: int | None = None,
    bad: Sequence[BrokenImage] | None = None,
) -> EvaluationData:
    """Open the images that a run of `finetune` with the same settings is validated on; no others are read.

    They are those of `config.val_split`, else of the validation part, else the share that the seed holds out.

    Args:
        config: Where they come from; `max_val` of them are drawn by the seed.
        task: See `open_data`.
        channels: 3 for RGB images, 1 for grey ones.
        num_classes: What the model has; more in the data are an error.
        everything: Where there is no validation part, hold nothing out: all images.
        workers: Processes that check the images.
        bad: `EvaluationData.bad` of another process, which has checked all images: here none is read.
    Raises:
        ConfigError: A setting or a package is wrong or missing.
        DataError: Data is missing or not what it should be, more than `config.max_bad` images are broken, or there is
            a validation part where everything was asked for.
    """
    train, val, classes = open_parts(config, task, channels, num_classes, training=False)
    if val is not None and everything:
        raise DataError(
            f"{config.data} has a validation part, so everything is not clear: leave it out to evaluate on that part, "
            f"and pass val_split to choose another one."
        )
    if val is None:
        assert isinstance(train, Source)  # a stream without a validation part is refused
        val = replace(train, called="validation")
        if not everything:
            _, val = hold_out(train, config.val_fraction, config.seed)
    return _checked(config, val, classes, bool(config.masks), workers, bad)


def open_unlabelled(
    data: str,
    config: DataConfig,
    *,
    channels: int = 3,
    masks: bool = False,
    workers: int | None = None,
    bad: Sequence[BrokenImage] | None = None,
) -> EvaluationData:
    """Open images without their targets, such as those of another distribution. The targets are 0.

    Args:
        data: As `DataConfig.data`. Of a folder all images in it and in its folders are taken, of a named set, a
            stream and a table with a column `split` the validation part, else the test part, else all.
        config: Has data_dir, download, max_val (which a stream does not heed), seed, max_bad and check; its splits
            choose no part of it.
        channels: 3 for RGB images, 1 for grey ones.
        masks: They are for a model of segmentation.
        workers: Processes that check the images.
        bad: `EvaluationData.bad` of another process, which has checked all images: here none is read.
    Raises:
        ConfigError, DataError: As `open_evaluation` does.
    """
    own = replace(config, data=data, train_split=None, val_split=None, masks=None, max_train=None)
    if own.prefix in STREAMS:
        own = replace(own, max_val=None)  # it is for the data beside it, of which some number is wanted
    source: Source | Stream
    if is_table(own):
        source = open_unlabelled_table(own, channels)
    elif own.prefix in STREAMS:
        source = open_unlabelled_stream(own, channels)
    elif (not own.prefix or own.name.lower() in FOLDERS) and root_of(own).is_dir():
        source = _open_flat(own, channels)
    else:
        source = open_unlabelled_named(own, channels)
    return _checked(own, source, None, masks, workers, bad)


def name_of(source: Source | Stream, position: int) -> str:
    """What an image is called: its file, or its number where that is not known."""
    return source.name(position) if isinstance(source, Source) else f"image {position}"


def _checked(
    config: DataConfig,
    source: Source | Stream,
    classes: tuple[str, ...] | None,
    masks: bool,
    workers: int | None,
    bad: Sequence[BrokenImage] | None,
) -> EvaluationData:
    """At most `max_val` images, without the broken ones."""
    if not isinstance(source, Source):
        return EvaluationData(source, classes, masks)
    (source,), found = leave_out_broken(config, [source.limit(config.max_val, config.seed)], workers, bad)
    return EvaluationData(source, classes, masks, found)


def _open_flat(config: DataConfig, channels: int) -> Source:
    """All images in a folder and its folders."""
    root = root_of(config)
    try:
        files = find_images([root])
    except ImageError as error:
        raise DataError(str(error)) from error
    return Source(FileItems(files, np.zeros(len(files), int), root), np.arange(len(files)), channels, "unlabelled")

"""Open the training and the validation part of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from masksurgery.data.check import BrokenImage, check_count, drop_broken, find_broken
from masksurgery.data.config import DataConfig
from masksurgery.data.named import open_named
from masksurgery.data.pairs import open_pairs
from masksurgery.data.source import Source, hold_out
from masksurgery.data.streams import STREAMS, Stream, open_streams
from masksurgery.data.table import open_table
from masksurgery.types import ConfigError, DataError


@dataclass(frozen=True)
class Data:
    """Data to train on and to validate on.

    Attributes:
        train: Images by index, or a stream.
        val: The same.
        classes: Names in the order of their indices, of the labels of "multilabel" too; None where they are not known.
        masks: The targets are masks.
        bad: Broken images that are left out.
    """

    train: Source | Stream
    val: Source | Stream
    classes: tuple[str, ...] | None = None
    masks: bool = False
    bad: tuple[BrokenImage, ...] = ()


def open_data(
    config: DataConfig,
    *,
    task: str = "classification",
    channels: int = 3,
    num_classes: int | None = None,
    workers: int | None = None,
    bad: Sequence[BrokenImage] | None = None,
) -> Data:
    """Open data, and read every image once if `config.check` says so.

    Args:
        config: Where it comes from.
        task: "classification", "multilabel", "regression" or "probabilities" (its targets are those of a
            classification). The targets are int64 indices, or float32 rows; for `config.masks` int64 [h, w], with 255
            for pixels to be ignored.
        channels: 3 for RGB images, 1 for grey ones.
        num_classes: What the model has; more in the data are an error.
        workers: Processes that check the images.
        bad: `Data.bad` of another process of the same run, which has checked all images: here none is read.
    Raises:
        ConfigError: A setting or a package is wrong or missing.
        DataError: Data is missing or not what it should be, or more than `config.max_bad` images are broken.
    """
    train, val, classes = _open(config, task, channels, num_classes)
    if classes is not None and num_classes is not None and len(classes) > num_classes:
        raise DataError(f"{config.data} has {len(classes)} classes ({_few(classes)}), the model {num_classes}.")
    if not isinstance(train, Source) or not isinstance(val, Source):
        return Data(train, val, classes)
    train = train.limit(config.max_train, config.seed)
    val = val.limit(config.max_val, config.seed)
    if bad is None:
        bad = [*find_broken(train, workers), *find_broken(val, workers)] if config.check else ()
    check_count(bad, config.max_bad)
    train, val = drop_broken(train, bad), drop_broken(val, bad)
    for source in (train, val):
        if not len(source):
            raise DataError(f"{config.data} has no {source.called} image that can be read.")
    return Data(train, val, classes, bool(config.masks), tuple(bad))


def _open(
    config: DataConfig, task: str, channels: int, num_classes: int | None
) -> tuple[Source, Source, tuple[str, ...] | None] | tuple[Stream, Stream, None]:
    classes: tuple[str, ...] | None
    is_table = not config.prefix and Path(config.data).suffix.lower() == ".csv"
    if config.masks and (task not in ("classification", "probabilities") or is_table or config.prefix):
        raise ConfigError(
            f'masks go with a folder of images and task="classification", not with {config.data} and task="{task}".'
        )
    if config.masks:
        train, val = open_pairs(config, channels, num_classes)
        classes = None
    elif is_table:
        train, val, classes = open_table(config, task, channels, num_classes)
    elif task in ("regression", "multilabel"):
        raise ConfigError(f'task="{task}" reads its targets from a CSV file (file,target,...), not from {config.data}.')
    elif config.prefix in STREAMS:
        return open_streams(config, channels, num_classes)
    else:
        train, val, classes = open_named(config, channels, num_classes)
    if val is None:
        train, val = hold_out(train, config.val_fraction, config.seed)
    return train, val, classes


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")

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
    train, val, classes = open_parts(config, task, channels, num_classes)
    if val is None:
        assert isinstance(train, Source)  # a stream without a validation part is refused
        train, val = hold_out(train, config.val_fraction, config.seed)
    assert train is not None
    if not isinstance(train, Source) or not isinstance(val, Source):
        return Data(train, val, classes)
    sources = [train.limit(config.max_train, config.seed), val.limit(config.max_val, config.seed)]
    (train, val), found = leave_out_broken(config, sources, workers, bad)
    return Data(train, val, classes, bool(config.masks), found)


def leave_out_broken(
    config: DataConfig, sources: Sequence[Source], workers: int | None, bad: Sequence[BrokenImage] | None
) -> tuple[list[Source], tuple[BrokenImage, ...]]:
    """Sources without their broken images, and these; see `open_data`.

    Raises:
        DataError: There are more than `config.max_bad`, or a source has no other image.
    """
    if bad is None:
        bad = [broken for source in sources for broken in find_broken(source, workers)] if config.check else ()
    check_count(bad, config.max_bad)
    whole = [drop_broken(source, bad) for source in sources]
    for source in whole:
        if not len(source):
            raise DataError(f"{config.data} has no {source.called} image that can be read.")
    return whole, tuple(bad)


def open_parts(
    config: DataConfig, task: str, channels: int, num_classes: int | None, training: bool = True
) -> tuple[Source | Stream | None, Source | Stream | None, tuple[str, ...] | None]:
    """The training part, the validation part or None, and the names of the classes or None; see `open_data`.

    Args:
        training: Open the training part where there is a validation part, too.
    """
    train: Source | Stream | None
    val: Source | Stream | None
    classes: tuple[str, ...] | None = None
    if config.masks and (task not in ("classification", "probabilities") or is_table(config) or config.prefix):
        raise ConfigError(
            f'masks go with a folder of images and task="classification", not with {config.data} and task="{task}".'
        )
    if config.masks:
        train, val = open_pairs(config, channels, num_classes, training)
    elif is_table(config):
        train, val, classes = open_table(config, task, channels, num_classes, training)
    elif task in ("regression", "multilabel"):
        raise ConfigError(f'task="{task}" reads its targets from a CSV file (file,target,...), not from {config.data}.')
    elif config.prefix in STREAMS:
        train, val, _ = open_streams(config, channels, num_classes, training)
    else:
        train, val, classes = open_named(config, channels, num_classes, training)
    if classes is not None and num_classes is not None and len(classes) > num_classes:
        raise DataError(f"{config.data} has {len(classes)} classes ({_few(classes)}), the model {num_classes}.")
    return train, val, classes


def is_table(config: DataConfig) -> bool:
    return not config.prefix and Path(config.data).suffix.lower() == ".csv"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")

"""Classification data by way of timm: image folders, torchvision's names, Hugging Face data sets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from masksurgery.data.config import TRAIN_NAMES, VAL_NAMES, DataConfig
from masksurgery.data.source import DatasetItems, ReaderItems, Source
from masksurgery.images import readable
from masksurgery.types import ConfigError, DataError

# torchvision's data sets of a training and a test part: the test part is no validation part.
_TRAIN_AND_TEST = ("cifar10", "cifar100", "fashion_mnist", "kmnist", "mnist", "qmnist")
_OTHERS = ("imagenet", "inaturalist", "places365")
FOLDERS = ("folder", "image_folder")


@dataclass(frozen=True)
class Part:
    """The images of a split, and the names of the classes."""

    items: ReaderItems | DatasetItems
    classes: tuple[str, ...] | None


def open_named(
    config: DataConfig, channels: int, num_classes: int | None, training: bool = True
) -> tuple[Source | None, Source | None, tuple[str, ...] | None]:
    """Open the training part, the validation part or None, and the names of the classes or None.

    Args:
        training: Open the training part where there is a validation part, too.
    Raises:
        ConfigError: The data is of no kind that timm knows, or a package is missing.
        DataError: It cannot be opened, has no class folders, or its two parts have different classes.
    """
    if config.prefix == "hfds":
        train, val = _open_hugging_face(config, training)
    elif config.prefix == "torch" and config.name.lower() not in FOLDERS:
        train, val = _open_torchvision(config, training)
    else:
        train, val = _open_folder(config, root_of(config), training)
    if train is not None and val is not None:
        _compare_classes(config, train, val)
    first = train or val
    assert first is not None  # where there is no validation part the training part is opened
    return (
        _source(train, channels, num_classes, "training"),
        _source(val, channels, num_classes, "validation"),
        first.classes,
    )


def open_unlabelled_named(config: DataConfig, channels: int) -> Source:
    """Open the validation part of a named set, else its test part, else all of it; or a tar of images.

    Raises:
        ConfigError, DataError: As `open_named` does.
    """
    if config.prefix == "hfds":
        part = _find_hugging_face(config, (*VAL_NAMES, "test", *TRAIN_NAMES), labelled=False)
        if part is None:
            raise DataError(f"{config.data} has none of the parts {', '.join((*VAL_NAMES, 'test', *TRAIN_NAMES))}.")
    elif config.prefix == "torch" and config.name.lower() not in FOLDERS:
        name = _torchvision_name(config)
        part = _read_torchvision(config, name, "test" if name in _TRAIN_AND_TEST else "validation")
    else:
        part = _read_folder(config, _existing(root_of(config)), labelled=False)
    items = replace(part.items, labelled=False)
    return Source(items, np.arange(len(items)), channels, "unlabelled")


def _source(part: Part | None, channels: int, num_classes: int | None, called: str) -> Source | None:
    if part is None:
        return None
    items = replace(part.items, num_classes=num_classes)
    return Source(items, np.arange(len(items)), channels, called)


def root_of(config: DataConfig) -> Path:
    """The folder or file of data that has no name of its own."""
    return Path((config.data_dir or "") if config.prefix else config.data)


def _existing(root: Path) -> Path:
    if not root.exists():
        raise DataError(f"'{readable(root)}' does not exist. data is a folder, a CSV file, or a name with a prefix.")
    return root


@contextmanager
def explained(config: DataConfig) -> Iterator[None]:
    """Whatever timm and the libraries behind it raise becomes one clear line."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except ImportError as error:
        package = {"tensorflow_datasets": "tensorflow-datasets"}.get(error.name or "", error.name)
        raise ConfigError(f"{config.data} needs the package {package}: pip install {package}.") from error
    except Exception as error:  # timm asserts, and the hub's client has errors of its own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{config.data} cannot be opened: {lines[0].rstrip('.')}.") from error


def lacks_split(error: DataError) -> bool:
    """The data set has no split of that name: neither timm nor datasets has an error of its own for it."""
    return re.search("Unknown split|not found in info|length is unknown", str(error)) is not None


def _open_folder(config: DataConfig, root: Path, training: bool) -> tuple[Part | None, Part | None]:
    val_root = _find_folder(_existing(root), config.val_split, VAL_NAMES)
    if val_root is not None and not training:
        return None, _read_folder(config, val_root)
    train_root = _find_folder(root, config.train_split, TRAIN_NAMES)
    if train_root is None and val_root is not None and not config.train_split:
        raise DataError(f"'{readable(root)}' has a folder {val_root.name}, and none called train.")
    train = _read_folder(config, train_root or root)
    return train, _read_folder(config, val_root) if val_root else None


def _find_folder(root: Path, asked: str | None, names: Sequence[str]) -> Path | None:
    """The folder that was asked for, else the first of these names that exists."""
    for name in [asked] if asked else names:
        if (root / name).is_dir():
            return root / name
    if asked:
        seen = ", ".join(sorted(path.name for path in root.iterdir() if path.is_dir())[:20]) if root.is_dir() else ""
        raise DataError(f"'{readable(root)}' has no folder '{asked}'. Its folders are: {seen or 'none'}.")
    return None


def _read_folder(config: DataConfig, root: Path, labelled: bool = True) -> Part:
    from timm.data import create_dataset

    # A large tar would be listed in a pickle beside it, by default.
    more: dict[str, Any] = {"cache_tarinfo": False} if root.is_file() else {}
    with explained(config):
        reader = create_dataset("", str(root), search_split=False, **more).reader
    classes = _in_order(reader.class_to_idx if root.is_dir() else reader.class_name_to_idx)
    if labelled and classes == ("",):
        raise DataError(f"'{readable(root)}' has images and no folders of classes, such as cat/1.jpg and dog/2.jpg.")
    return Part(ReaderItems(reader, config.data, root), classes)


def _torchvision_name(config: DataConfig) -> str:
    """The name of a data set of torchvision, once it is known that it can be opened."""
    name = config.name.lower()
    if name not in (*_TRAIN_AND_TEST, *_OTHERS):
        known = ", ".join(f"torch/{known}" for known in (*_TRAIN_AND_TEST, *_OTHERS, *FOLDERS))
        raise ConfigError(f"{config.data} is not known. There are {known}.")
    if not config.data_dir:
        raise ConfigError(f"{config.data} needs data_dir: the folder where it lies, or is to be downloaded to.")
    return name


def _open_torchvision(config: DataConfig, training: bool) -> tuple[Part | None, Part | None]:
    name = _torchvision_name(config)
    train_split, val_split = config.train_split or "train", config.val_split
    if name in _TRAIN_AND_TEST:
        for split in (train_split, val_split):
            if split not in (*TRAIN_NAMES, *VAL_NAMES, "test", None):
                raise ConfigError(f"{config.data} has the splits train and test, not '{split}'.")
    elif not val_split:
        val_split = "validation"
    train = _read_torchvision(config, name, train_split) if training or not val_split else None
    return train, _read_torchvision(config, name, val_split) if val_split else None


def _read_torchvision(config: DataConfig, name: str, split: str) -> Part:
    from timm.data import create_dataset

    with explained(config):
        dataset = create_dataset(f"torch/{name}", config.data_dir, split=split, download=config.download)
    classes = getattr(dataset, "classes", None)
    if classes and isinstance(classes[0], tuple):  # of ImageNet: all names of a class
        classes = [names[0] for names in classes]
    return Part(DatasetItems(dataset, f"{config.data} {split}", Path(config.data_dir or "")), _tuple(classes))


def _open_hugging_face(config: DataConfig, training: bool) -> tuple[Part | None, Part | None]:
    train = _read_hugging_face(config, config.train_split or "train") if training else None
    if config.val_split:
        return train, _read_hugging_face(config, config.val_split)
    val = _find_hugging_face(config, VAL_NAMES)
    if train is None and val is None:
        train = _read_hugging_face(config, config.train_split or "train")
    return train, val


def _find_hugging_face(config: DataConfig, splits: Sequence[str], labelled: bool = True) -> Part | None:
    """The first of these splits that exists."""
    for split in splits:
        try:
            return _read_hugging_face(config, split, labelled)
        except DataError as error:
            if not lacks_split(error):
                raise
    return None


def _read_hugging_face(config: DataConfig, split: str, labelled: bool = True) -> Part:
    with explained(config):
        from timm.data.readers.reader_hfds import ReaderHfds  # create_dataset of timm 1.0.15 lower-cases the name

        reader = ReaderHfds(name=config.name, root=config.data_dir, split=split)
        if not labelled:
            reader.label_key = reader.image_key  # which there is
        if reader.label_key not in reader.dataset.column_names:
            columns = ", ".join(reader.dataset.column_names)
            raise DataError(f"{config.data} has no column '{reader.label_key}' of labels, only {columns}.")
    place = Path(config.name)
    return Part(ReaderItems(reader, f"{config.data} {split}", place if place.is_dir() else None),
                _in_order(reader.class_to_idx))  # fmt: skip


def _in_order(class_to_idx: dict[Any, int]) -> tuple[str, ...] | None:
    return _tuple(sorted(class_to_idx, key=class_to_idx.__getitem__))


def _tuple(classes: Sequence[Any] | None) -> tuple[str, ...] | None:
    return tuple(map(str, classes)) if classes else None


def _compare_classes(config: DataConfig, train: Part, val: Part) -> None:
    """Raise a DataError that names classes of one part only: their indices would mean different things."""
    ours, theirs = set(train.classes or ()), set(val.classes or ())
    only = [
        f"only {part}: {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}"
        for part, names in (("training", ours - theirs), ("validation", theirs - ours))
        if names
    ]
    if only:
        raise DataError(f"The two parts of {config.data} have different classes ({'; '.join(only)}).")

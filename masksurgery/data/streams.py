"""Data that is read from front to back: WebDataset shards, and the iterable data sets of timm.

A worker of a process reads a share of the data of its own: a lane. What a lane gives is a function of the seed, the
epoch, and the numbers of processes and workers.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

from PIL import Image

from masksurgery.data.config import TRAIN_NAMES, VAL_NAMES, DataConfig
from masksurgery.data.named import explained, lacks_split
from masksurgery.data.source import as_index
from masksurgery.images import Broken, ImageError, decode_image, explain, reading, to_channels
from masksurgery.randomness import generator
from masksurgery.types import ConfigError, DataError

STREAMS = ("hfids", "tfds", "wds")
SHUFFLED = 1000  # samples among which the next one is drawn


class Lane(NamedTuple):
    """Which share of a stream: worker of workers in process rank of world."""

    rank: int = 0
    world: int = 1
    worker: int = 0
    workers: int = 1


class Sample(NamedTuple):
    """A sample that is not decoded yet."""

    name: str
    content: Any


Samples: TypeAlias = "Iterator[Sample | Broken]"


class Stream(Protocol):
    """Samples that come one after the other."""

    @property
    def called(self) -> str:
        """What an error calls it: "training" or "validation"."""

    @property
    def max_bad(self) -> int:
        """How many broken samples are left out before they are an error."""

    def __len__(self) -> int:
        """How many samples an epoch has."""

    def train_samples(self, lane: Lane, seed: int, epoch: int, batch_size: int) -> Samples:
        """The shuffled samples of a lane, without end."""

    def eval_samples(self, lane: Lane) -> Samples:
        """Each sample of a lane once, in order."""

    def decode(self, sample: Sample) -> tuple[Image.Image, int]:
        """An image and the index of its class; an ImageError if it cannot be read."""

    def usable_workers(self, workers: int, world: int) -> int:
        """At most so many workers of a process have something to read."""


def open_streams(
    config: DataConfig, channels: int, num_classes: int | None, training: bool = True
) -> tuple[Stream | None, Stream, None]:
    """Open the training part, if it is wanted, and the validation part. The names of the classes are not known.

    Raises:
        ConfigError: A package is missing, or a setting does not go with a stream.
        DataError: It cannot be opened, its size is not known, or there is no validation part.
    """
    _check_unlimited(config)
    open_one = _open_shards if config.prefix == "wds" else _open_iterable
    more: dict[str, Any] = {"channels": channels, "max_bad": config.max_bad, "num_classes": num_classes}
    train = None
    if training:
        train = _first(config, config.train_split, TRAIN_NAMES, lambda split: open_one(config, split, True, more))
    val = _first(config, config.val_split, VAL_NAMES, lambda split: open_one(config, split, False, more))
    return train, val, None


def open_unlabelled_stream(config: DataConfig, channels: int) -> Stream:
    """Open the validation part, else the test part, else the training part. Every target is 0.

    Raises:
        ConfigError, DataError: As `open_streams` does.
    """
    _check_unlimited(config)
    open_one = _open_shards if config.prefix == "wds" else _open_iterable
    more: dict[str, Any] = {"channels": channels, "max_bad": config.max_bad, "labelled": False}
    names = (*VAL_NAMES, "test", *TRAIN_NAMES)
    return _first(config, None, names, lambda split: open_one(config, split, False, more))


def _check_unlimited(config: DataConfig) -> None:
    for name in ("max_train", "max_val"):
        if getattr(config, name) is not None:
            raise ConfigError(f"{name} does not go with a stream such as {config.data}: name fewer shards instead.")


def _first(config: DataConfig, asked: str | None, names: tuple[str, ...], open_one: Callable[[str], Stream]) -> Stream:
    """The split that was asked for, else the first of these names that there is."""
    for name in names if asked is None else ():
        try:
            return open_one(name)
        except DataError as error:
            if not lacks_split(error):
                raise
            problem = error
    if asked is not None:
        return open_one(asked)
    what = "train_split" if names is TRAIN_NAMES else "val_split"
    raise DataError(f"{config.data} has none of the parts {', '.join(names)}. Pass {what}. ({problem})") from problem


# --- WebDataset ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """Shards of WebDataset. timm's reader finds them; they are read here, because it drops broken samples unnamed."""

    files: tuple[str, ...]
    count: int
    label: str = ""
    channels: int = 3
    called: str = "training"
    max_bad: int = 0
    num_classes: int | None = None
    labelled: bool = True
    keys: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")

    def __len__(self) -> int:
        return self.count

    def usable_workers(self, workers: int, world: int) -> int:
        return min(workers, len(self.files) // world)

    def train_samples(self, lane: Lane, seed: int, epoch: int, batch_size: int) -> Samples:
        number, lanes = lane.rank * lane.workers + lane.worker, lane.world * lane.workers
        order = generator("shards", seed, epoch).permutation(len(self.files))[number::lanes]
        if not len(order):
            raise DataError(f"{len(self.files)} shards cannot be divided among {lanes} processes. Write more of them.")
        draws = generator("samples", seed, epoch, number)
        while True:  # shards differ in length: a lane that is through with its own begins again
            buffer: list[Sample] = []
            found = 0
            for sample in self._read(order):
                if isinstance(sample, Broken):
                    yield sample
                    continue
                found += 1
                if len(buffer) < SHUFFLED:
                    buffer.append(sample)
                else:
                    place = int(draws.integers(SHUFFLED))
                    buffer[place], sample = sample, buffer[place]
                    yield sample
            for place in draws.permutation(len(buffer)):
                yield buffer[place]
            if not found:
                raise DataError(f"There is no sample in {', '.join(self.files[k] for k in order)}.")

    def eval_samples(self, lane: Lane) -> Samples:
        number, lanes = lane.rank * lane.workers + lane.worker, lane.world * lane.workers
        return self._read(range(number, len(self.files), lanes))

    def _read(self, order: Any) -> Samples:
        import webdataset

        for file in (self.files[k] for k in order):
            pipeline = webdataset.DataPipeline(webdataset.SimpleShardList([file]), webdataset.tarfile_to_samples())
            try:
                for content in pipeline:
                    yield Sample(f"{file}/{content['__key__']}", content)
            except Exception as error:  # what is left of a truncated tar is lost
                yield Broken(file, f"'{file}' cannot be read to its end: {explain(error)}")

    def decode(self, sample: Sample) -> tuple[Image.Image, int]:
        content: Mapping[str, bytes] = sample.content
        key = next((key for key in self.keys if key in content), None)
        if key is None:
            seen = ", ".join(key for key in content if not key.startswith("__"))
            raise ImageError(f"'{sample.name}' has no image ({', '.join(self.keys)}), only {seen or 'nothing'}.")
        target = self._target(sample) if self.labelled else 0
        with reading(lambda: f"{sample.name}.{key}"):
            return decode_image(io.BytesIO(content[key]), self.channels), target

    def _target(self, sample: Sample) -> int:
        try:
            content = sample.content
            label = json.loads(content["json"])[self.label] if self.label else content["cls"].decode()
        except (KeyError, TypeError, ValueError) as error:
            where = f"'{self.label}' in its .json" if self.label else "its .cls"
            raise ImageError(f"'{sample.name}' has no label: {where} is missing.") from error
        return as_index(label, self.num_classes, lambda: sample.name)


def _open_shards(config: DataConfig, split: str, training: bool, more: dict[str, Any]) -> Shards:
    from timm.data import create_dataset

    root = config.data_dir or config.name
    with explained(config):
        import webdataset  # noqa: F401  # timm's own error names another package

        with _quiet("timm.data.readers.reader_wds"):  # it warns that there is no _info.json, which a pattern replaces
            reader = create_dataset(config.data, root, split=split, is_training=training).reader
    files = _locate(config, root, reader.split_info.filenames)
    called = "training" if training else "validation"
    return Shards(files, reader.num_samples, reader.split_info.alt_label, called=called, **more)


def _locate(config: DataConfig, root: str, names: Iterable[str]) -> tuple[str, ...]:
    """Paths or addresses of the shards, which are there or may be."""
    if "://" in root:
        odd = [name for name in names if not re.fullmatch(r"[\w./=+-]+", name)]
        if odd:  # webdataset writes an address into a command of a shell
            raise DataError(f"{config.data}: {odd[0]!r} is no name of a shard. Letters, digits and ._-/=+ are allowed.")
        return tuple(f"{root.rstrip('/')}/{name}" for name in names)
    files = tuple(str(Path(root) / name) for name in names)
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        raise DataError(f"{config.data}: {len(missing)} of {len(files)} shards are missing, such as '{missing[0]}'.")
    return files


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


# --- whatever else timm can iterate over -----------------------------------------------------------------------------


@dataclass(frozen=True)
class TimmStream:
    """An iterable data set of timm. Its reader shuffles, and divides the data among processes and workers."""

    reader: Any
    name: str
    channels: int = 3
    called: str = "training"
    max_bad: int = 0
    num_classes: int | None = None
    labelled: bool = True

    def __len__(self) -> int:
        return self.reader.num_samples

    def usable_workers(self, workers: int, world: int) -> int:
        return workers

    def train_samples(self, lane: Lane, seed: int, epoch: int, batch_size: int) -> Samples:
        from timm.data.readers.shared_count import SharedCount

        while True:
            reader = self._reader_of(lane)
            reader.common_seed, reader.batch_size = seed, batch_size
            for name in ("epoch", "epoch_count"):  # its own is shared by all workers, who may be in different epochs
                if hasattr(reader, name):
                    setattr(reader, name, SharedCount(epoch))
            yield from self._read(reader, lane)

    def eval_samples(self, lane: Lane) -> Samples:
        return self._read(self._reader_of(lane), lane)

    def _reader_of(self, lane: Lane) -> Any:
        """A reader that has read nothing yet. In which worker it is, it sees for itself."""
        reader = copy.copy(self.reader)
        reader.ds = reader.worker_info = None
        reader.dist_rank, reader.dist_num_replicas = lane.rank, lane.world
        reader.set_loader_cfg(lane.workers)
        return reader

    def _read(self, reader: Any, lane: Lane) -> Samples:
        try:
            for number, content in enumerate(reader):
                yield Sample(f"{self.name}[{number} of worker {lane.worker} of process {lane.rank}]", content)
        except Exception as error:  # it cannot go on after that
            raise DataError(f"{self.name} cannot be read any further: {explain(error)}") from error

    def decode(self, sample: Sample) -> tuple[Image.Image, int]:
        image, target = sample.content
        index = as_index(target, self.num_classes, lambda: sample.name) if self.labelled else 0
        return to_channels(image, self.channels), index


def _open_iterable(config: DataConfig, split: str, training: bool, more: dict[str, Any]) -> TimmStream:
    from timm.data import create_dataset

    with explained(config):
        if config.prefix == "hfids":
            from timm.data.readers.reader_hfids import ReaderHfids  # create_dataset of timm 1.0.15 lower-cases the name

            reader = ReaderHfids(
                config.name, config.data_dir, split, is_training=training, download=config.download, input_img_mode=""
            )
        else:
            reader = create_dataset(
                config.data, config.data_dir, split=split, is_training=training, download=config.download
            ).reader
    return TimmStream(reader, config.data, called="training" if training else "validation", **more)

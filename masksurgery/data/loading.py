"""The batches of a run as a function of the seed and the step alone.

So they are bitwise the same for any number of workers, for any number of processes taken together, and after a restart
at any step. timm's `create_loader` takes neither a sampler nor a generator: its order and its augmentation depend on
the process and on how long it has run. Readers and transforms are timm's.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from masksurgery.data.batching import Batch, Result, augment, collate
from masksurgery.data.check import check_count, default_workers
from masksurgery.data.source import Source
from masksurgery.data.streaming import EvalStream, TrainStream
from masksurgery.data.streams import Stream
from masksurgery.images import Broken, ImageError, readable
from masksurgery.randomness import generator
from masksurgery.sources import one_line
from masksurgery.stopping import held_signals, release_signals
from masksurgery.transforms import Transform
from masksurgery.types import ConfigError, DataError

DEAD_WORKER = "DataLoader worker (pid"
"""What torch's RuntimeError says, which may come anywhere while a process that reads images is dead."""

GRACE = 60
"""Seconds that a worker goes on after SIGTERM, for the step that is not yet done."""


@contextmanager
def explained_death() -> Iterator[None]:
    """That a process that reads images has died becomes a DataError."""
    try:
        yield
    except RuntimeError as error:
        if DEAD_WORKER not in str(error):
            raise
        raise DataError(
            f"A process that reads images has died. If memory is short, use fewer. ({one_line(error)})"
        ) from error


def steps_per_epoch(source: Source | Stream, batch_size: int) -> int:
    """How many whole batches an epoch has; what is left over is not trained on in that epoch.

    Raises:
        DataError: Not even one.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size} is not a number of images. Pass at least 1.")
    if len(source) < batch_size:
        raise DataError(
            f"{len(source)} {source.called} images are less than one batch. Pass batch_size={len(source)} or less, "
            f"not {batch_size}."
        )
    return len(source) // batch_size


def train_batches(
    source: Source | Stream,
    transform: Transform,
    *,
    batch_size: int,
    steps: tuple[int, int],
    seed: int,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    pin_memory: bool = False,
) -> Batches:
    """The batches of the steps start to stop, over the epochs that they lie in.

    Every epoch is a permutation drawn by (seed, epoch), and a step its next `batch_size` images. The augmentation of an
    image is drawn by (seed, epoch, image). The order of a stream depends on `world` and `workers` as well (not whether
    workers is 0 or 1).

    Args:
        source: What to train on.
        transform: Of an image and its target; it may draw from global generators.
        batch_size: Of all processes together.
        steps: From the first to before the last, counted from the beginning of the run.
        seed: Of all that is drawn.
        rank: Which process: it gets its contiguous part of every batch.
        world: How many processes.
        workers: Processes that read images for this one; 0 for none. By default `default_workers()`.
        pin_memory: Copy batches into page-locked memory.
    Raises:
        ConfigError: The batch cannot be divided among the processes.
        DataError: There are fewer images than a batch. Iterating raises it too, see `Batches`.
    """
    epoch_steps = steps_per_epoch(source, batch_size)
    local = _divide(batch_size, rank, world)
    start, stop = steps
    if isinstance(source, Source):
        images = _TrainImages(source, transform, batch_size, epoch_steps, seed, rank * local, local)
        loader = _loader(images, workers, seed, pin_memory, sampler=range(start, stop))
        return Batches(loader, stop - start)
    stream = TrainStream(source, transform, local, (start, stop), epoch_steps, seed, rank, world)
    loader = _loader(stream, stream_workers(source, workers, world), seed, pin_memory)
    return Batches(loader, stop - start, source.max_bad)


def eval_batches(
    source: Source | Stream,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int | None = None,
    pin_memory: bool = False,
) -> Batches:
    """Every image once over all processes, in order: process r has the images r, r + world, ... (of shards: those).

    The last batch is smaller, and processes may differ by one batch. See `train_batches`.
    """
    local = _divide(batch_size, rank, world)
    if isinstance(source, Source):
        positions = np.arange(rank, len(source), world)
        images = _EvalImages(source, transform, positions, local)
        return Batches(_loader(images, workers, 0, pin_memory, sampler=range(len(images))), len(images))
    stream = EvalStream(source, transform, local, rank, world)
    return Batches(_loader(stream, stream_workers(source, workers, world), 0, pin_memory), None, source.max_bad)


class Batches:
    """Batches (x [b, c, h, w], y). Iterating a second time gives the same ones.

    Attributes:
        bad: The broken samples of a stream that were left out until now.

    Iterating raises a DataError if an image cannot be read; of a stream, if more than `max_bad` cannot.
    """

    def __init__(self, loader: DataLoader[Result], count: int | None, max_bad: int = 0) -> None:
        self.loader = loader
        self.count = count
        self.max_bad = max_bad
        self.bad: list[Broken] = []

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError("How many batches a stream has is not known beforehand.")
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        with held_signals():  # which a worker that is just being started would die of
            results = iter(self.loader)
        try:
            while (result := self._next(results)) is not None:
                batch, broken = result
                self._count(broken)
                if batch is not None:
                    yield batch
        finally:
            if hasattr(results, "_shutdown_workers"):  # else they would live as long as the traceback of an error
                results._shutdown_workers()

    def _next(self, results: Iterator[Result]) -> tuple[Batch | None, tuple[Broken, ...]] | None:
        with explained_death():
            result = next(results, None)
        if isinstance(result, DataError):
            raise result
        return result

    def _count(self, broken: Sequence[Broken]) -> None:
        known = {one.path for one in self.bad}
        self.bad += [one for one in broken if one.path not in known]
        check_count(self.bad, self.max_bad)


@dataclass(frozen=True)
class _TrainImages(Dataset[Result]):
    """The batch of a step. It is a whole batch, so that its error takes the place of the batch."""

    source: Source
    transform: Transform
    batch_size: int
    epoch_steps: int
    seed: int
    offset: int
    local: int

    def __getitem__(self, step: int) -> Result:
        epoch, number = divmod(step, self.epoch_steps)
        first = number * self.batch_size + self.offset
        positions = _order(len(self.source), self.seed, epoch)[first : first + self.local].tolist()
        try:
            samples = ((position, *_read(self.source, position)) for position in positions)
            return augment(self.transform, samples, "image", self.seed, epoch), ()
        except DataError as error:
            return error


@dataclass(frozen=True)
class _EvalImages(Dataset[Result]):
    """Batches of these positions."""

    source: Source
    transform: Transform
    positions: np.ndarray
    local: int

    def __len__(self) -> int:
        return math.ceil(len(self.positions) / self.local)

    def __getitem__(self, number: int) -> Result:
        positions = self.positions[number * self.local : (number + 1) * self.local].tolist()
        try:
            return collate([self.transform(*_read(self.source, position)) for position in positions]), ()
        except DataError as error:
            return error


@lru_cache(maxsize=2)
def _order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch."""
    return generator("order", seed, epoch).permutation(length)


def _read(source: Source, position: int) -> tuple[Image.Image, Any]:
    """An image that could be read before."""
    try:
        return source.read(position)
    except ImageError as error:
        place = source.items.place
        if place is not None and not (place.is_file() or (place.is_dir() and any(place.iterdir()))):
            raise DataError(
                f"'{readable(place)}' is gone or empty, with the {source.called} images: is it still mounted?"
            ) from error
        raise DataError(f"A {source.called} image is missing or broken: {error}") from error


def _divide(batch_size: int, rank: int, world: int) -> int:
    """The batch of one process."""
    if not 0 <= rank < world:
        raise ConfigError(f"rank={rank} is none of {world} processes: it has to be from 0 to {world - 1}.")
    if batch_size < 1 or batch_size % world:
        raise ConfigError(
            f"batch_size={batch_size} cannot be divided among {world} processes. Pass a multiple of {world}."
        )
    return batch_size // world


def stream_workers(stream: Stream, workers: int | None, world: int) -> int:
    """Processes that read a stream for each of `world` processes."""
    return stream.usable_workers(default_workers() if workers is None else workers, world)


def _loader(data: Any, workers: int | None, seed: int, pin_memory: bool, **more: Any) -> DataLoader[Result]:
    return DataLoader(
        data,
        batch_size=None,
        num_workers=default_workers() if workers is None else workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        generator=torch.Generator().manual_seed(seed),  # else it draws from the global one
        worker_init_fn=_leave_signals,
        **more,
    )


def _as_it_is(result: Any) -> Any:
    return result


def _leave_signals(worker: int) -> None:
    """A stop is for the process that trains, which ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))  # it may be that process which asks
    release_signals()

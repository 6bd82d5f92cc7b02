"""Batches of streams, put together in the workers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from masksurgery.data.batching import Result, augment, collate
from masksurgery.data.check import check_count
from masksurgery.data.streams import Lane, Samples, Stream
from masksurgery.images import Broken, ImageError
from masksurgery.transforms import Transform
from masksurgery.types import DataError


@dataclass(frozen=True)
class TrainStream(IterableDataset[Result]):
    """The batches of steps start to stop.

    With k workers, worker i makes the batches of the steps i, i + k, ...: a DataLoader asks its workers in turn. Every
    epoch begins anew, so that a restart has to read over the samples of one epoch at most.
    """

    stream: Stream
    transform: Transform
    batch_size: int
    steps: tuple[int, int]
    epoch_steps: int
    seed: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[Result]:
        try:
            yield from self._results(_lane(self.rank, self.world))
        except DataError as error:
            yield error

    def _results(self, lane: Lane) -> Iterator[Result]:
        start, stop = self.steps
        decoder, current = _Decoder(self.stream), -1
        images: Iterator[tuple[Image.Image, Any]] = iter(())
        for step in range(start - start % lane.workers + lane.worker, stop, lane.workers):
            if step < start:  # the first to be asked is worker 0, and it may be the turn of another one
                yield None, ()
                continue
            if step // self.epoch_steps != current:
                current = step // self.epoch_steps
                images = self._images(decoder, lane, current, step)
            first = step * self.batch_size * self.world + self.rank * self.batch_size
            samples = ((first + k, *pair) for k, pair in enumerate(islice(images, self.batch_size)))
            batch = augment(self.transform, samples, "stream", self.seed)
            yield batch, decoder.report()

    def _images(self, decoder: _Decoder, lane: Lane, epoch: int, step: int) -> Iterator[tuple[Image.Image, Any]]:
        """The images of an epoch from a step on."""
        samples = self.stream.train_samples(lane, self.seed, epoch, self.batch_size)
        begin = epoch * self.epoch_steps
        before = range(begin + (lane.worker - begin) % lane.workers, step, lane.workers)
        if self.stream.max_bad:  # broken ones were left out, and only decoding shows which
            images = decoder.images(samples)
            for _ in islice(images, len(before) * self.batch_size):
                pass
            return images
        for _ in islice(samples, len(before) * self.batch_size):
            pass
        return decoder.images(samples)


@dataclass(frozen=True)
class EvalStream(IterableDataset[Result]):
    """All samples once, in batches of one size but for the last of each worker."""

    stream: Stream
    transform: Transform
    batch_size: int
    rank: int
    world: int

    def __iter__(self) -> Iterator[Result]:
        decoder = _Decoder(self.stream)
        try:
            images = decoder.images(self.stream.eval_samples(_lane(self.rank, self.world)))
            while samples := [self.transform(*pair) for pair in islice(images, self.batch_size)]:
                yield collate(samples), decoder.report()
            yield None, decoder.report()
        except DataError as error:
            yield error


class _Decoder:
    """Decodes samples, and keeps count of the broken ones."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.broken: dict[str, Broken] = {}
        self.reported = 0

    def images(self, samples: Samples) -> Iterator[tuple[Image.Image, Any]]:
        """What can be decoded; a DataError where too many cannot."""
        in_a_row = 0
        for sample in samples:
            if not isinstance(sample, Broken):
                try:
                    yield self.stream.decode(sample)
                    in_a_row = 0
                    continue
                except ImageError as error:
                    sample = Broken(sample.name, str(error))
            in_a_row += 1
            self.broken.setdefault(sample.path, sample)
            check_count(list(self.broken.values()), self.stream.max_bad)
            if in_a_row > len(self.stream):
                raise DataError(f"No {self.stream.called} image can be read any more: {sample.reason}")

    def report(self) -> tuple[Broken, ...]:
        """The broken samples since the last report."""
        new = tuple(self.broken.values())[self.reported :]
        self.reported = len(self.broken)
        return new


def _lane(rank: int, world: int) -> Lane:
    info = get_worker_info()
    return Lane(rank, world, info.id, info.num_workers) if info else Lane(rank, world)

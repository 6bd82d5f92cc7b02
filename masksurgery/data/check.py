"""Find the broken images before they stop a training run at night."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from masksurgery.data.source import Source
from masksurgery.images import Broken, ImageError
from masksurgery.types import DataError

LISTED = 20
_FEW = 256  # images that are read faster than workers are started


def default_workers() -> int:
    """Processes that read images: at most 4, and one less than this process has processors."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = max(int(os.environ.get("LOCAL_WORLD_SIZE") or 1), 1)  # as the launchers of torch and Accelerate set it
    return max(min(4, cpus // processes - 1), 0)


@dataclass(frozen=True)
class BrokenImage(Broken):
    """A broken image of a source: which part it belongs to, and its position there."""

    part: str = ""
    position: int = -1


def find_broken(source: Source, workers: int | None = None) -> list[BrokenImage]:
    """Decode every image once, and return those that cannot be read."""
    if source.items.in_memory:
        return []
    workers = default_workers() if workers is None else workers
    loader: DataLoader[BrokenImage | None] = DataLoader(
        _Trial(source),
        batch_size=32,
        num_workers=workers if len(source) > _FEW else 0,
        collate_fn=_only_broken,
        generator=torch.Generator(),  # else it draws from the global one
    )
    return [found for batch in loader for found in batch]


def drop_broken(source: Source, bad: Sequence[BrokenImage]) -> Source:
    """Without those of these images that belong to it."""
    positions = [broken.position for broken in bad if broken.part == source.called]
    return source.take(np.setdiff1d(np.arange(len(source)), positions)) if positions else source


def check_count(bad: Sequence[Broken], max_bad: int) -> None:
    """Raise a DataError that lists them if more than `max_bad` images are broken."""
    if len(bad) <= max_bad:
        return
    lines = [f"  {broken.reason.removesuffix('.')}." for broken in bad[:LISTED]]
    if len(bad) > LISTED:
        lines.append(f"  And {len(bad) - LISTED} more.")
    images = "1 image is" if len(bad) == 1 else f"{len(bad)} images are"
    raise DataError(
        "\n".join([f"{images} broken:", *lines, f"Replace them, or leave them out with max_bad={len(bad)} or more."])
    )


@dataclass(frozen=True)
class _Trial(Dataset[BrokenImage | None]):
    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, position: int) -> BrokenImage | None:
        try:
            self.source.read(position, draft=True)
        except ImageError as error:
            return BrokenImage(self.source.name(position), str(error), self.source.called, position)
        return None


def _only_broken(results: Sequence[BrokenImage | None]) -> list[BrokenImage]:
    return [result for result in results if result is not None]

"""Samples become batches: what the loaders of files and of streams have in common."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from masksurgery.images import Broken
from masksurgery.randomness import forked_random_state, seed_global
from masksurgery.transforms import Transform
from masksurgery.types import DataError

Batch: TypeAlias = "tuple[Tensor, Tensor]"

# What comes from a worker: a batch (None where it has nothing) and the broken samples that were left out, or an error.
# An error that a worker raised would reach the user inside of its traceback.
Result: TypeAlias = "tuple[Batch | None, tuple[Broken, ...]] | DataError"


def collate(samples: Sequence[tuple[Tensor, Any]]) -> Batch:
    """Stack images, and targets: indices to int64 [b], rows of numbers to float32 [b, k], masks to int64 [b, h, w]."""
    x, y = default_collate(list(samples))
    return x, y


def augment(transform: Transform, samples: Iterable[tuple[int, Image.Image, Any]], purpose: str, *key: int) -> Batch:
    """Transform samples (number, image, target) into a batch; what is drawn for one is a function of key and number."""
    done = []
    with forked_random_state():
        for number, image, target in samples:
            seed_global(purpose, *key, number)
            done.append(transform(image, target))
    return collate(done)

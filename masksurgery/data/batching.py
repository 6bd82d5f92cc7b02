"""Samples become batches: what the loaders of files and of streams have in common."""

from __future__ import annotations

from collections.abc import Sequence
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


def augment(transform: Transform, image: Image.Image, target: Any, purpose: str, *key: int) -> tuple[Tensor, Any]:
    """Transform a sample; whatever is drawn for it is a function of the key."""
    with forked_random_state():
        seed_global(purpose, *key)
        return transform(image, target)

"""Samples become batches: what the loaders of files and of streams have in common."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from masksurgery.data.source import generator
from masksurgery.images import Broken
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
    with _drawn_by(purpose, *key):
        return transform(image, target)


@contextmanager
def _drawn_by(purpose: str, *key: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch, and give them back as they were.

    There is no other way: the transforms of timm and torchvision draw from them. Devices are not touched.
    """
    python, cpu = random.getstate(), torch.get_rng_state()
    numpys = np.random.get_state()  # noqa: NPY002  # what timm's transforms draw from
    seeds = generator(purpose, *key).integers(2**32, size=3)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]))  # noqa: NPY002
    torch.default_generator.manual_seed(int(seeds[2]))  # torch.manual_seed would seed every device too
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpys)  # noqa: NPY002
        torch.set_rng_state(cpu)

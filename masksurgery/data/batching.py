"""Samples become batches: what the loaders of files and of streams have in common."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

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


def augment(transform: Transform, samples: Iterable[tuple[int, Image.Image, Any]], purpose: str, *key: int) -> Batch:
    """Transform samples (number, image, target) into a batch; what is drawn for one is a function of key and number."""
    done = []
    with _lent_generators():
        for number, image, target in samples:
            _seed_generators(purpose, *key, number)
            done.append(transform(image, target))
    return collate(done)


@contextmanager
def _lent_generators() -> Iterator[None]:
    """Give the global generators of Python, numpy and torch back as they were.

    There is no other way: the transforms of timm and torchvision draw from them. Devices are not touched.
    """
    python, cpu = random.getstate(), torch.get_rng_state()
    numpys = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpys)  # noqa: NPY002
        torch.set_rng_state(cpu)


def _seed_generators(purpose: str, *key: int) -> None:
    seeds = np.random.SeedSequence([*purpose.encode(), *key]).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])  # noqa: NPY002
    torch.default_generator.manual_seed(seeds[2])  # torch.manual_seed would seed every device too

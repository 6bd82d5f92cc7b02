"""Random numbers that a step and a sample have to themselves, and a global state that is given back as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def forked_random_state(device: torch.device | None = None) -> Iterator[None]:
    """Whatever is drawn or seeded inside, the global generators go on outside as if nothing had been.

    Dropout, timm's mixup and most augmentations draw from the generators of Python, numpy and torch and take no other.

    Args:
        device: An accelerator whose generator is forked too.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    forks = {"devices": [device], "device_type": device.type} if device is not None and device.type != "cpu" else None
    try:
        with torch.random.fork_rng(**(forks or {"devices": []})):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def seed_everything(*key: int) -> None:
    """Seed the generators of Python, numpy and torch by a tuple of numbers; only inside of `forked_random_state`."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002
    torch.manual_seed((int(words[2]) << 32) | int(words[3]))

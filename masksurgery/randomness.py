"""Random numbers that a step or a sample has to itself, and a global state that is given back as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.random import Generator, default_rng


def generator(purpose: str, *key: int) -> Generator:
    """A generator of its own for each purpose and key."""
    return default_rng([*purpose.encode(), *key])


@contextmanager
def forked_random_state(device: torch.device | None = None) -> Iterator[None]:
    """Whatever is drawn or seeded inside, the global generators go on outside as if nothing had been.

    There is no other way: dropout, timm's mixup and the transforms of timm and torchvision draw from the generators of
    Python, numpy and torch, and take no other.

    Args:
        device: The current accelerator, whose generator is forked too.
    """
    python, cpu = random.getstate(), torch.get_rng_state()
    numpys = np.random.get_state()  # noqa: NPY002
    devices = torch.get_device_module(device) if device is not None and device.type != "cpu" else None
    state = devices.get_rng_state() if devices is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpys)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if devices is not None:
            devices.set_rng_state(state)


def seed_global(purpose: str, *key: int, device: torch.device | None = None) -> None:
    """Seed the global generators by a purpose and a key. Only inside of `forked_random_state`, with the same device."""
    python, numpys, cpu, accelerator = map(int, generator(purpose, *key).integers(2**32, size=4))
    random.seed(python)
    np.random.seed(numpys)  # noqa: NPY002
    torch.default_generator.manual_seed(cpu)  # torch.manual_seed would seed every device too
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(accelerator)

"""Accelerate for one run: devices, processes and precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from masksurgery.types import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

PATIENCE = timedelta(hours=2)
"""How long processes wait for the main one, which reads every image once; by default 10 minutes with NCCL."""


def require(package: str, extra: str, what: str) -> None:
    """Raise a ConfigError that says what to install unless a package is there."""
    if find_spec(package) is None:
        raise ConfigError(f'{what} needs {package}, which is not installed: pip install "masksurgery[{extra}]".')


@contextmanager
def accelerated(**settings: Any) -> Iterator[Accelerator]:
    """An Accelerator; what it keeps for the process is given back, if nobody had asked for it before.

    Args:
        settings: Its own, but for the handler that sets `PATIENCE`.
    Raises:
        ConfigError: Accelerate cannot be set up like that.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    fresh = not AcceleratorState._shared_state
    handlers = [*settings.pop("kwargs_handlers", ()), InitProcessGroupKwargs(timeout=PATIENCE)]
    try:
        accelerator = Accelerator(kwargs_handlers=handlers, **settings)
    except ValueError as error:  # such as fp16 on a device without it
        raise ConfigError(f"Accelerate cannot be set up: {error}") from error
    try:
        yield accelerator
    finally:
        accelerator.free_memory()
        if fresh:
            AcceleratorState._reset_state()

"""Peak memory of a forward, to a fraction of a MiB, where that can be measured."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from torch import nn

from masksurgery.variants import Conditions

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What Linux takes for "the peak is what stands now"."""

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
"""Of glibc's malloc.h."""
MAPPED = 1 << 16
"""Bytes from which on a tensor gets pages of its own, which go back to the system with it."""
KNOWN = 1 << 26
"""Bytes of a tensor that the measurement is tried on."""

Inputs = Mapping[str, Any]


def weight_bytes(model: nn.Module) -> int:
    """Memory of the parameters and buffers; what is shared counts once."""
    storages = (x.untyped_storage() for x in (*model.parameters(), *model.buffers()))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def cpu_peaks(
    make: Callable[[], nn.Module], inputs: Sequence[Inputs], conditions: Conditions
) -> list[int] | list[None]:
    """Peak memory of forwards on the CPU, above what stood before each, measured in a process of its own.

    Memory that was freed before, and that malloc has kept, would serve a forward unseen. So the process lets malloc
    keep as little as it can, which would make other work in it slow.

    Args:
        make: Makes the model there; can be pickled.
        inputs: Of each forward, described.
        conditions: Of the measurement.
    Returns:
        Bytes; None for each forward where the system, its malloc or its memory does not allow it.
    """
    nothing = [None] * len(inputs)
    if not os.access(CLEAR_REFS, os.W_OK):
        return nothing
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_measure, make, list(inputs), conditions).result() or nothing
    except BrokenProcessPool:  # it was ended from outside, as a system does that runs out of memory
        return nothing


def cuda_peak(run: Callable[[], Any], device: torch.device | str) -> int:
    """Bytes that a call needs at its peak on a CUDA device, above what stood before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# --- in the process of its own ---------------------------------------------------------------------------------------


def _measure(make: Callable[[], nn.Module], inputs: list[Inputs], conditions: Conditions) -> list[int] | None:
    trim = _set_malloc()
    if trim is None or not _measures_right(trim):
        return None
    model = conditions.prepare(make())
    peaks = []
    with conditions.hold(), torch.inference_mode():
        for one in inputs:
            args, kwargs = conditions.draw(one)
            model(*args, **kwargs)  # what libraries make once and keep is theirs, not the forward's
            peaks.append(_peak_of(lambda a=args, k=kwargs: model(*a, **k), trim))  # type: ignore[misc]
    return peaks


def _set_malloc() -> Callable[[int], Any] | None:
    """Let malloc map large blocks one by one, in one arena; None where there is no glibc."""
    libc = ctypes.CDLL(None)
    try:
        libc.mallopt(M_MMAP_THRESHOLD, MAPPED)
        libc.mallopt(M_ARENA_MAX, 1)
        return libc.malloc_trim  # type: ignore[no-any-return]
    except AttributeError:
        return None


def _measures_right(trim: Callable[[int], Any]) -> bool:
    """A tensor of a known size is seen, and seen again after it was freed: another malloc may keep its memory."""
    try:
        found = [_peak_of(lambda: torch.ones(KNOWN // 4), trim) for _ in range(2)]
    except OSError:  # a container may forbid what the file's mode allows
        return False
    return all(abs(peak - KNOWN) < KNOWN / 32 for peak in found)


def _peak_of(run: Callable[[], Any], trim: Callable[[int], Any]) -> int:
    """Bytes that a call needs at its peak, above what stood before."""
    gc.collect()
    trim(0)
    CLEAR_REFS.write_text(RESET_PEAK)
    before = _read("VmRSS")
    run()
    return _read("VmHWM") - before


def _read(field: str) -> int:
    """Bytes of a field of the process's status."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0

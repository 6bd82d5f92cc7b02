"""Settings that hold for every test: one torch thread, repeatable properties, and how Keras starts where it is used.

Of the tests that are marked slow CI takes a fourth, another one with each commit (`zoo/selection.py`); an eighth of
those marked `slow(parts=8)`.
"""

import atexit
import gc
import os
import shutil
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; processes that a test starts take it over

# Keras reads these when it is imported: the backend, and instead of ~/.keras/keras.json a folder without settings.
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ["KERAS_HOME"] = tempfile.mkdtemp(prefix="keras-")

import pytest
import torch
from hypothesis import settings

from selection import chosen

atexit.register(shutil.rmtree, os.environ["KERAS_HOME"], ignore_errors=True)

# With more threads than idle cores a small forward takes a hundred times as long, and sums come out in another order.
torch.set_num_threads(1)

settings.register_profile("masksurgery", derandomize=True, deadline=None)
settings.load_profile("masksurgery")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests that the commit does not choose."""
    taken: dict[bool, list[pytest.Item]] = {True: [], False: []}
    for item in items:
        marker = item.get_closest_marker("slow")
        taken[marker is None or chosen(item.nodeid, marker.kwargs.get("parts", 4))].append(item)
    if taken[False]:
        config.hook.pytest_deselected(items=taken[False])
        items[:] = taken[True]


def pytest_collection_finish() -> None:
    """Let the garbage collector leave out what has been imported: it is most of what there is, and stays."""
    gc.collect()
    gc.freeze()

"""Settings that hold for every test: one torch thread, repeatable properties, and how Keras starts where it is used."""

import atexit
import os
import shutil
import tempfile

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; processes that a test starts take it over

# Keras reads these when it is imported: the backend, and instead of ~/.keras/keras.json a folder without settings.
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ["KERAS_HOME"] = tempfile.mkdtemp(prefix="keras-")

import torch
from hypothesis import settings

atexit.register(shutil.rmtree, os.environ["KERAS_HOME"], ignore_errors=True)

# With more threads than idle cores a small forward takes a hundred times as long, and sums come out in another order.
torch.set_num_threads(1)

settings.register_profile("masksurgery", derandomize=True, deadline=None)
settings.load_profile("masksurgery")

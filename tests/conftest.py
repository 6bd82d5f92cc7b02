"""Settings that hold for every test: one torch thread, repeatable properties."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; processes that a test starts take it over

import torch
from hypothesis import settings

# With more threads than idle cores a small forward takes a hundred times as long, and sums come out in another order.
torch.set_num_threads(1)

settings.register_profile("masksurgery", derandomize=True, deadline=None)
settings.load_profile("masksurgery")

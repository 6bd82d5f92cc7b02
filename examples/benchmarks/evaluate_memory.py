"""Peak memory of `masksurgery evaluate` over 2,000 and over 10,000 images: it should be the same.

Run it where `masksurgery[evaluate]` is installed:

    python examples/benchmarks/evaluate_memory.py

Images of noise in ten classes are written to a temporary folder; a small ensemble that nobody has trained, and its base
model, are evaluated on them with a temperature, a threshold, out-of-distribution data, corruption and a report. The
exit status is 1 if the larger set needs more than `--limit` MiB more memory.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES, SIZE = 10, 32

MEASURED = """
import resource, sys
from masksurgery.cli import app
try:
    app(sys.argv[1:], prog_name="masksurgery")
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def write_images(folder: Path, count: int, classes: bool = True) -> None:
    """Images of noise, as PNG."""
    draws = np.random.default_rng(0)
    for k in range(count):
        place = folder / str(k % CLASSES) if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(place / f"{k:05}.png")


def measure(folder: Path, count: int, corrupt: str) -> tuple[float, float]:
    """Peak memory in MiB of one process that reads the images itself, and the seconds."""
    write_images(folder / f"images-{count}", count)
    write_images(folder / f"unknown-{count}", count, classes=False)
    arguments = [
        "evaluate", folder / "base", folder / "ensemble", "--data", folder / f"images-{count}", "--all",
        "--temperature", "--coverage", "0.9", "--ood", folder / f"unknown-{count}", "--corrupt", corrupt,
        "--report", folder / "report.html", "--workers", "0",
    ]  # fmt: skip
    start = time.perf_counter()
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    # One arena: how many of them malloc makes is chance, and worth tens of MiB.
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MALLOC_ARENA_MAX": "1"})
    if done.returncode:
        sys.exit(done.stderr)
    return int(done.stderr.split("peak")[-1]) / 1024, time.perf_counter() - start


def make_models(folder: Path) -> None:
    """An ensemble with random weights, and its base model in timm's format."""
    import timm
    import torch

    import masksurgery
    from masksurgery.checkpoint import save_base

    base = timm.create_model("test_resnet", num_classes=CLASSES)
    model = masksurgery.convert(base, example_inputs=(torch.zeros(1, 3, SIZE, SIZE),))
    model.recipe = {"source": "timm", "name": "test_resnet", "kwargs": {"num_classes": CLASSES}}
    masksurgery.save(model, folder / "ensemble")
    base.pretrained_cfg["input_size"] = (3, SIZE, SIZE)
    save_base(base, folder / "base", model.recipe)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs=2, default=(2_000, 10_000), metavar="COUNT")
    parser.add_argument("--corrupt", default="noise")
    parser.add_argument("--limit", type=float, default=40, metavar="MIB")
    options = parser.parse_args(arguments)
    peaks = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_models(folder)
        for count in options.images:
            peak, seconds = measure(folder, count, options.corrupt)
            peaks.append(peak)
            print(f"{count:6} images: {peak:7.1f} MiB at the peak, {seconds:.0f} s", flush=True)
    more = peaks[1] - peaks[0]
    print(f"{more:+.1f} MiB, limit {options.limit:.0f}")
    return int(more > options.limit)


if __name__ == "__main__":
    sys.exit(main())

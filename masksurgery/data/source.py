"""Images with their targets, by index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from masksurgery.images import ImageError, decode_image, open_image, readable, reading, to_channels
from masksurgery.randomness import generator
from masksurgery.types import DataError


class Items(Protocol):
    """All images of a data set."""

    @property
    def place(self) -> Path | None:
        """The folder or file that holds them, if it is one."""

    @property
    def in_memory(self) -> bool:
        """They are no files, and cannot break."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What an error calls an image."""

    def read(self, index: int, channels: int, draft: bool = False) -> tuple[Image.Image, Any]:
        """An image and its target; an ImageError if it cannot be read. See `open_image` for `draft`."""


@dataclass(frozen=True)
class FileItems:
    """Files, and a target for each: an index, or a row of numbers."""

    files: Sequence[Path]
    targets: np.ndarray
    place: Path | None = None
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return readable(self.files[index])

    def read(self, index: int, channels: int, draft: bool = False) -> tuple[Image.Image, Any]:
        return open_image(self.files[index], channels, draft=draft), self.targets[index]


@dataclass(frozen=True)
class ReaderItems:
    """A reader of timm: it opens files, and leaves it to us to decode them. Without labels every target is 0."""

    reader: Any
    called: str
    place: Path | None = None
    num_classes: int | None = None
    in_memory: bool = False
    labelled: bool = True

    def __len__(self) -> int:
        return len(self.reader)

    def name(self, index: int) -> str:
        return self.reader.filename(index, absolute=True) or f"{self.called}[{index}]"

    def read(self, index: int, channels: int, draft: bool = False) -> tuple[Image.Image, Any]:
        with reading(lambda: self.name(index)):
            file, target = self.reader[index][:2]
            with file:
                image = decode_image(file, channels, draft=draft)
        return image, as_index(target, self.num_classes, lambda: self.name(index)) if self.labelled else 0


@dataclass(frozen=True)
class DatasetItems:
    """A data set of torchvision: it opens images itself. Without labels every target is 0."""

    dataset: Any
    called: str
    place: Path | None = None
    num_classes: int | None = None
    labelled: bool = True

    @property
    def in_memory(self) -> bool:
        return hasattr(self.dataset, "data")

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        return f"{self.called}[{index}]"

    def read(self, index: int, channels: int, draft: bool = False) -> tuple[Image.Image, Any]:
        with reading(lambda: self.name(index)):
            image, target = self.dataset[index]
            image = to_channels(image, channels)
        return image, as_index(target, self.num_classes, lambda: self.name(index)) if self.labelled else 0


def as_index(target: Any, num_classes: int | None, name: Callable[[], str]) -> int:
    """The index of a class, from what a data set gives.

    Raises:
        ImageError: It is none of the classes.
    """
    try:
        index = int(target)
    except (TypeError, ValueError):
        index = -1
    if index < 0:  # -1 is what Hugging Face's hidden test labels are
        raise ImageError(f"'{name()}' has the label {target!r}, which is not the index of a class.")
    if num_classes is not None and index >= num_classes:
        raise ImageError(f"'{name()}' has the label {index}, and the model only classes 0 to {num_classes - 1}.")
    return index


@dataclass(frozen=True, eq=False)
class Source:
    """Some of the images of a data set, in order.

    Attributes:
        items: All of them.
        indices: Which, [k].
        channels: 3 (RGB) or 1 (grey).
        called: "training", "validation" or "unlabelled".
    """

    items: Items = field(repr=False)
    indices: np.ndarray = field(repr=False)
    channels: int = 3
    called: str = "training"

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, position: int) -> str:
        return self.items.name(int(self.indices[position]))

    def read(self, position: int, draft: bool = False) -> tuple[Image.Image, Any]:
        """An image and its target.

        Raises:
            ImageError: It cannot be read.
        """
        return self.items.read(int(self.indices[position]), self.channels, draft)

    def take(self, positions: np.ndarray) -> Source:
        """Only these, in the order of the data set."""
        return replace(self, indices=self.indices[np.sort(positions)])

    def limit(self, count: int | None, seed: int) -> Source:
        """At most so many, drawn by the seed."""
        if count is None or count >= len(self):
            return self
        return self.take(generator("limit", seed).permutation(len(self))[:count])


def hold_out(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """Divide into two parts by the seed; the second is called validation. At least one image is in each.

    Raises:
        DataError: There is one image at most.
    """
    if len(source) < 2:
        raise DataError(f"{len(source)} images cannot be divided into two parts. Add more images.")
    count = min(max(round(len(source) * fraction), 1), len(source) - 1)
    order = generator("hold out", seed).permutation(len(source))
    return source.take(order[count:]), replace(source.take(order[:count]), called="validation")

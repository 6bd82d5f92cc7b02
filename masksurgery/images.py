"""Images: finding and opening files, and what a model says of those that it takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn
from torch.utils._pytree import tree_leaves

from masksurgery.convert import default_inputs
from masksurgery.ensemble import Ensemble
from masksurgery.inputs import describe, is_described_tensor
from masksurgery.transforms import Preprocessing
from masksurgery.types import ConfigError, MasksurgeryError, TraceError

SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
BY_HAND = "Call it from Python: masksurgery.load(...)(...)."
_MODES = {1: "L", 3: "RGB"}


class ImageError(MasksurgeryError):
    """A file cannot be read as an image."""


@dataclass(frozen=True)
class Broken:
    """An image that could not be read, and why."""

    path: str
    reason: str


# --- files -----------------------------------------------------------------------------------------------------------


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Files as they are given, and the images in folders and their subfolders by name; no hidden ones.

    Raises:
        ImageError: A path does not exist, or there is no image.
    """
    found: dict[Path, None] = {}
    given = list(paths)
    for path in given:
        if path.is_dir():
            files = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file())
            found.update((file, None) for file in files if not file.name.startswith("."))
        elif path.exists():
            found[path] = None
        else:
            raise ImageError(f"'{readable(path)}' does not exist.")
    if not found:
        names = ", ".join(f"'{readable(path)}'" for path in given)
        raise ImageError(f"No image in {names}. Images end in {', '.join(SUFFIXES)}.")
    return list(found)


def readable(path: Path) -> str:
    """A path as text that can be printed, whatever its bytes are."""
    return os.fsencode(path).decode("utf-8", "replace")


def open_image(path: Path, channels: int = 3, *, draft: bool = False) -> Image.Image:
    """Read an image upright, in RGB, or with one channel in grey. See `decode_image`.

    Raises:
        ImageError: It cannot be read.
    """
    with reading(lambda: readable(path)):
        return decode_image(path, channels, draft=draft)


def decode_image(file: Path | BinaryIO, channels: int, *, draft: bool = False) -> Image.Image:
    """Decode an image, with whatever error the decoder has; so call it inside of `reading`.

    Args:
        file: A path, or an open file.
        channels: 3 or 1.
        draft: Decode a JPEG at an eighth of its size: enough to see that it is whole, and far faster.
    """
    with Image.open(file) as image:
        if draft:
            image.draft(image.mode, (1, 1))
        return to_channels(ImageOps.exif_transpose(image), channels)


@contextmanager
def reading(name: Callable[[], str], kind: str = "an image") -> Iterator[None]:
    """Every error inside becomes an ImageError that names the file. The name is asked for only then."""
    try:
        yield
    except Exception as error:  # the decoders raise whatever a damaged file makes of them
        raise ImageError(f"'{name()}' cannot be read as {kind}: {explain(error)}") from error


def explain(error: Exception) -> str:
    """Why something could not be opened."""
    if isinstance(error, UnidentifiedImageError):
        return "it is of no format that PIL knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """An image of any mode in RGB, or with one channel in grey."""
    if image.mode.startswith("I"):
        image = _to_eight_bits(image)
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(_MODES[channels])


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Sixteen bits scaled down, where PIL would cut everything above 255 off."""
    values = np.asarray(image).astype(np.int64)
    if image.mode != "I" or values.max(initial=0) > 255:
        values = values // 257
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


# --- preprocessing ---------------------------------------------------------------------------------------------------


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """The size, channels and dtype of the images that the model takes, and the rest of its pretrained_cfg.

    Raises:
        ConfigError: The model takes something else than one image, or does not say what.
    """
    shape, dtype = image_input(model)
    return Preprocessing(shape[1:], getattr(torch, dtype), pretrained_cfg(model))


def pretrained_cfg(model: nn.Module) -> Mapping[str, Any]:
    cfg = getattr(model, "pretrained_cfg", None)
    return cfg if isinstance(cfg, Mapping) else {}


def image_input(model: nn.Module) -> tuple[list[int], str]:
    """Shape and dtype of the image that the model takes; a ConfigError if it takes something else.

    An ensemble takes what its example inputs are, a base model what its attribute `example_inputs` or its
    pretrained_cfg says.
    """
    tensors = tree_leaves(_described_inputs(model), is_leaf=is_described_tensor)
    described = [leaf for leaf in tensors if is_described_tensor(leaf)]
    if len(described) == 1 and len(described[0]["shape"]) == 4 and described[0]["shape"][1] in _MODES:
        return described[0]["shape"], described[0]["dtype"]
    seen = ", ".join(f"{leaf['dtype']}{leaf['shape']}" for leaf in described)
    raise ConfigError(
        f"Image files are for models of one image [b, 3, h, w] or [b, 1, h, w]; this one takes {seen}. {BY_HAND}"
    )


def _described_inputs(model: nn.Module) -> Any:
    if isinstance(model, Ensemble):
        return model.inputs
    given = getattr(model, "example_inputs", None)
    try:
        return describe(default_inputs(model) if given is None else given)
    except TraceError as error:
        raise ConfigError(
            f"{type(model).__name__} does not say what it takes: it has no timm pretrained_cfg. Set "
            f"model.example_inputs = (torch.zeros(1, 3, 224, 224),), or whatever one forward takes."
        ) from error


def label_names(model: nn.Module) -> list[str] | None:
    """The names of the classes: those in the model's pretrained_cfg, else ImageNet's where their number fits."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    cfg = pretrained_cfg(model)
    given = given_names(model)
    if given:
        described = cfg.get("label_descriptions")
        more = described if isinstance(described, Mapping) else {}
        return [str(more.get(name, name)) for name in given]
    subset = infer_imagenet_subset(dict(cfg))
    return list(ImageNetInfo(subset).label_descriptions()) if subset else None


def given_names(model: nn.Module) -> tuple[str, ...] | None:
    """The names of the classes in the model's pretrained_cfg: a list, or an object by index; None without any."""
    names = pretrained_cfg(model).get("label_names")
    if isinstance(names, Mapping):
        by_index = {str(key): name for key, name in names.items()}
        names = [by_index.get(str(k)) for k in range(len(by_index))]
        if None in names:  # timm writes an object where there are gaps
            return None
    return tuple(map(str, names)) if names else None

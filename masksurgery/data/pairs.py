"""Images and their masks, for segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from masksurgery.data.config import TRAIN_NAMES, VAL_NAMES, DataConfig
from masksurgery.data.source import Source
from masksurgery.images import ImageError, find_images, open_image, readable, reading
from masksurgery.types import DataError

IGNORED = 255  # the index of pixels that are of no class
_INDEXED = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


@dataclass(frozen=True)
class PairItems:
    """Files of images and of masks."""

    files: Sequence[Path]
    masks: Sequence[Path]
    place: Path
    num_classes: int | None = None
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return readable(self.files[index])

    def read(self, index: int, channels: int, draft: bool = False) -> tuple[Image.Image, np.ndarray]:
        # no draft: the size is needed
        image = open_image(self.files[index], channels)
        mask = open_mask(self.masks[index], self.num_classes)
        if mask.shape != (image.height, image.width):
            height, width = mask.shape
            raise ImageError(
                f"'{self.name(index)}' is {image.width} x {image.height} pixels, "
                f"its mask '{readable(self.masks[index])}' {width} x {height}."
            )
        return image, mask


def open_mask(path: Path, num_classes: int | None = None) -> np.ndarray:
    """Read the class of each pixel, int32 [h, w]; 255 is ignored. Of a palette the indices count, not the colours.

    Raises:
        ImageError: It cannot be read, is of colours, or has an index that is no class.
    """
    name = readable(path)
    with reading(lambda: name, "a mask"), Image.open(path) as image:
        mode, mask = image.mode, np.array(image)
    if mode not in _INDEXED:
        raise ImageError(
            f"'{name}' is no mask: its mode is {mode}. Each pixel has to be the index of a class (mode L or P)."
        )
    mask = mask.astype(np.int32)
    highest = mask.max(initial=0, where=mask != IGNORED)
    if num_classes is not None and highest >= num_classes:
        raise ImageError(f"'{name}' has a pixel of class {highest}, the model only classes 0 to {num_classes - 1}.")
    return mask


def open_pairs(
    config: DataConfig, channels: int, num_classes: int | None, training: bool = True
) -> tuple[Source | None, Source | None]:
    """Pair images with masks by their names relative to the two folders, without the suffix.

    Args:
        training: Open the training part where there is a validation part, too.
    Returns:
        The training part, and the validation part or None. Parts are folders in both, such as train and val.
    Raises:
        DataError: An image has no mask, a mask no image, two files have one name, or there is nothing.
    """
    root, masks = Path(config.data), Path(config.masks or "")
    images, of_images = _by_name(root), _by_name(masks)
    for what, found, other, where in (("mask", images, of_images, masks), ("image", of_images, images, root)):
        missing = [found[name] for name in found if name not in other]
        if missing:
            more = f" (and so {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise DataError(f"'{readable(missing[0])}' has no {what} of that name in '{readable(where)}'{more}.")
    for file in of_images.values():
        if file.suffix.lower() in (".jpg", ".jpeg", ".jfif"):
            raise DataError(f"The mask '{readable(file)}' is a JPEG, which changes the indices. Write masks as PNG.")
    names = list(images)
    items = PairItems([images[name] for name in names], [of_images[name] for name in names], root, num_classes)
    everything = Source(items, np.arange(len(names)), channels)
    folders = [name.partition("/")[0] if "/" in name else "" for name in names]
    val = _part(everything, folders, config.val_split, VAL_NAMES)
    if val is not None and not training:
        return None, replace(val, called="validation")
    train = _part(everything, folders, config.train_split, TRAIN_NAMES) or everything
    if val is None:
        return train, None
    if train is everything:
        raise DataError(f"'{readable(root)}' has a folder of validation images, and none called train.")
    return train, replace(val, called="validation")


def _by_name(folder: Path) -> dict[str, Path]:
    """Images of a folder by their relative names without suffix."""
    if not folder.is_dir():
        raise DataError(f"'{readable(folder)}' is no folder of images.")
    found: dict[str, Path] = {}
    for file in find_images([folder]):
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise DataError(f"'{readable(file)}' and '{readable(found[name])}' have one name. Remove one of them.")
        found[name] = file
    return found


def _part(everything: Source, folders: Sequence[str], asked: str | None, names: Sequence[str]) -> Source | None:
    """The pairs in the folder that was asked for, else in the first of these names that exists."""
    wanted = asked or next((name for name in names if name in folders), None)
    if wanted is None:
        return None
    if wanted not in folders:
        seen = ", ".join(sorted(set(folders) - {""})) or "none"
        raise DataError(f"There is no folder '{wanted}' of images. The folders are: {seen}.")
    return everything.take(np.flatnonzero([folder == wanted for folder in folders]))

"""Small pictures of the images that a model was given, and of what it says of their pixels."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from masksurgery.data import IGNORED

LARGEST = 128
"""Longer side in pixels that a picture is shrunk to."""

SMALLEST = 96
"""About the longer side in pixels that a tiny picture is enlarged to."""


def to_picture(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """A normalised image [c, h, w] as uint8 [c, h', w'] of at most `LARGEST` pixels on the longer side."""
    shift, scale = (torch.tensor(list(values))[:, None, None] for values in (mean, std))
    pixels = x.detach().float().cpu() * scale + shift
    return _to_bytes(_shrink(pixels, *_small(*pixels.shape[1:])))


def to_classes(classes: Tensor, like: Tensor) -> Tensor:
    """Classes of pixels [h, w] as uint8 of the height and width of a picture; 255 is none, 256 is 1 again."""
    known = torch.where(classes == IGNORED, classes, classes % IGNORED)
    size = tuple(like.shape[1:])
    return F.interpolate(known[None, None].float().cpu(), size, mode="nearest-exact")[0, 0].to(torch.uint8)


def to_grey(values: Tensor, like: Tensor) -> Tensor:
    """Numbers of pixels [h, w] as uint8 of the height and width of a picture: 0 is black, the largest one white."""
    shrunk = _shrink(values[None].float().cpu(), *like.shape[1:])[0]
    return _to_bytes(shrunk / shrunk.max().clamp_min(torch.finfo(shrunk.dtype).tiny))


def encode(picture: Tensor) -> bytes:
    """A picture uint8 [c, h, w] as PNG or JPEG, whichever is smaller; a tiny one is enlarged by a whole factor."""
    image = _to_image(picture)
    return min((_write(image, "PNG", optimize=True), _write(image, "JPEG", quality=85)), key=len)


def encode_classes(classes: Tensor) -> bytes:
    """Classes uint8 [h, w] as a PNG with a colour for each, and grey for what is of no class."""
    image = _to_image(classes[None])
    image.putpalette([level for k in range(256) for level in _colour(k)])
    return _write(image, "PNG", optimize=True)


def encode_grey(values: Tensor) -> bytes:
    """Grey values uint8 [h, w] as PNG."""
    return _write(_to_image(values[None]), "PNG", optimize=True)


def _small(height: int, width: int) -> tuple[int, int]:
    factor = min(LARGEST / max(height, width), 1)
    return max(round(height * factor), 1), max(round(width * factor), 1)


def _shrink(x: Tensor, height: int, width: int) -> Tensor:
    """[c, h, w] to [c, height, width]."""
    if x.shape[1:] == (height, width):
        return x
    return F.interpolate(x[None], (height, width), mode="bilinear", antialias=True)[0]


def _to_bytes(x: Tensor) -> Tensor:
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def _to_image(picture: Tensor) -> Image.Image:
    """An image of uint8 [c, h, w], each pixel being so many pixels wide that the whole can be seen."""
    factor = max(round(SMALLEST / max(picture.shape[1:])), 1)
    pixels = picture.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy())


def _colour(k: int) -> tuple[int, int, int]:
    """Red, green and blue of a class: neighbours differ in hue and in lightness."""
    if k == IGNORED:
        return (128, 128, 128)
    red, green, blue = colorsys.hls_to_rgb(k * 0.618034 % 1, (0.55, 0.35, 0.75)[k % 3], 0.7)
    return round(red * 255), round(green * 255), round(blue * 255)


def _write(image: Image.Image, kind: str, **options: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()

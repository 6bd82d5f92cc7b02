"""Images made worse step by step, to see whether a model notices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from masksurgery.data import IGNORED
from masksurgery.randomness import generator
from masksurgery.types import ConfigError, check_choice

KINDS = ("noise", "blur", "contrast", "rotation")
SEVERITIES = 5

NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)
"""Standard deviations of pixels in [0, 1]."""

BLUR = (1.0, 2.0, 3.0, 4.0, 6.0)
"""Standard deviations in pixels of an image whose shorter side has 224."""

CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
"""Shares of the contrast that are left."""

ROTATION = (10.0, 20.0, 30.0, 45.0, 60.0)
"""Degrees, to one side or the other."""


def corrupt(
    x: Tensor,
    y: Tensor,
    kind: str,
    severity: int,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    positions: Tensor,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Corrupt a batch of normalised images; of masks, what is rotated into the picture is ignored.

    What is drawn for an image is a function of the seed, the kind, the severity and its position in the data set, so
    that neither the batch nor the process that it comes in changes it.

    Args:
        x: Normalised images; corrupted in at least float32.
        y: Targets. Integers [b, h, w] are masks, which are rotated with their images; others are handed on.
        kind: One of `KINDS`: Gaussian noise, Gaussian blur, less contrast, rotation.
        severity: 1 to 5.
        mean: What was subtracted from the pixels in [0, 1], by channel.
        std: What they were divided by.
        positions: Of the images in the data set; of a stream the order in which they come.
        seed: For noise, and the side of a rotation.
    Shape:
        x (b, c, h, w), c being 1 or 3; positions (b,); results like x and y.
    Raises:
        ConfigError: There is no such kind or severity.
    Source:
        The levels of noise, blur and contrast are those of Hendrycks and Dietterich 2019, arXiv:1903.12261.
    """
    check_choice("kind", kind, KINDS)
    if severity not in range(1, SEVERITIES + 1):
        raise ConfigError(f"severity={severity!r} is none of 1 to {SEVERITIES}.")
    wide = x.float() if torch.finfo(x.dtype).bits < 32 else x
    shift, scale = (wide.new_tensor(list(values))[:, None, None] for values in (mean, std))
    pixels = wide * scale + shift
    level = severity - 1
    if kind == "noise":
        pixels = pixels + NOISE[level] * _noise(pixels, positions, seed, severity)
    elif kind == "blur":
        pixels = _blur(pixels, BLUR[level])
    elif kind == "contrast":
        pixels = _lower_contrast(pixels, CONTRAST[level])
    else:
        pixels, y = _rotate(pixels, y, ROTATION[level] * _sides(positions, seed, severity))
    return ((pixels.clamp(0, 1) - shift) / scale).to(x.dtype), y


def _noise(pixels: Tensor, positions: Tensor, seed: int, severity: int) -> Tensor:
    """Standard normal numbers, drawn on the CPU for each image."""
    shape = tuple(pixels.shape[1:])
    drawn = [
        torch.from_numpy(generator("noise", seed, severity, position).standard_normal(shape, "float32"))
        for position in positions.tolist()
    ]
    return torch.stack(drawn).to(pixels)


def _blur(pixels: Tensor, sigma: float) -> Tensor:
    from torchvision.transforms.v2 import functional

    sigma = sigma * min(pixels.shape[-2:]) / 224
    width = 2 * int(4 * sigma + 0.5) + 1  # beyond four standard deviations nothing is seen
    for kernel in ([width, 1], [1, width]):  # one after the other: a third of the time
        pixels = functional.gaussian_blur(pixels, kernel, [sigma, sigma])
    return pixels


def _lower_contrast(pixels: Tensor, share: float) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.adjust_contrast(pixels.clamp(0, 1), share)


def _sides(positions: Tensor, seed: int, severity: int) -> Tensor:
    """1 or -1 for each image."""
    drawn = [int(generator("rotation", seed, severity, position).integers(2)) for position in positions.tolist()]
    return torch.tensor(drawn) * 2 - 1


def _rotate(pixels: Tensor, y: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each image, and its mask if the targets are masks, by its angle in degrees; the corners become black."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    are_masks = y.dim() == 3 and not y.is_floating_point()
    pixels, y = pixels.clone(), y.clone() if are_masks else y
    for angle in angles.unique().tolist():
        rows = (angles == angle).nonzero().flatten()
        of_x, of_y = rows.to(pixels.device), rows.to(y.device)
        pixels[of_x] = functional.rotate(pixels[of_x], angle, InterpolationMode.BILINEAR)
        if are_masks:
            masks = functional.rotate(y[of_y][:, None], angle, InterpolationMode.NEAREST, fill=[IGNORED])
            y[of_y] = masks[:, 0]
    return pixels, y

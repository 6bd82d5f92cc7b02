"""Corrupted images: how strong, of what, and the same whatever batch they come in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor

from masksurgery import ConfigError
from masksurgery.corruptions import BLUR, CONTRAST, KINDS, NOISE, ROTATION, SEVERITIES, corrupt
from masksurgery.data import IGNORED

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(pixels: Tensor) -> Tensor:
    c = pixels.shape[1]
    return (pixels - torch.tensor(MEAN[:c]).view(1, c, 1, 1)) / torch.tensor(STD[:c]).view(1, c, 1, 1)


def pixels_of(x: Tensor) -> Tensor:
    c = x.shape[1]
    return x.float() * torch.tensor(STD[:c]).view(1, c, 1, 1) + torch.tensor(MEAN[:c]).view(1, c, 1, 1)


def apply(pixels: Tensor, kind: str, severity: int = 3, y: Tensor | None = None, **more: Any) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1] in and out."""
    c, b = pixels.shape[1], len(pixels)
    settings = {"positions": torch.arange(b), "seed": 0, "mean": MEAN[:c], "std": STD[:c], **more}
    x, y = corrupt(normalise(pixels), torch.zeros(b, dtype=torch.int64) if y is None else y, kind, severity, **settings)
    return pixels_of(x), y


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("severity", range(1, SEVERITIES + 1))
def test_noise_has_its_standard_deviation(severity: int) -> None:
    grey = torch.full((4, 3, 64, 64), 0.5)
    found, _ = apply(grey, "noise", severity)
    sigma = NOISE[severity - 1]
    inside = torch.distributions.Normal(0.0, 1.0).sample((200_000,)).mul(sigma).clamp(-0.5, 0.5).std()
    assert (found - grey).std() == pytest.approx(inside.item(), rel=0.03)
    assert abs((found - grey).mean().item()) < 0.01
    assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6
    assert not torch.equal(found[0], found[1]) and not torch.equal(found[0, 0], found[0, 1])


@pytest.mark.parametrize("size", [(224, 300), (112, 96)])
@pytest.mark.parametrize("severity", range(1, SEVERITIES + 1))
def test_blur_is_gaussian_in_proportion_to_the_size(severity: int, size: tuple[int, int]) -> None:
    pixels = noise(1, 3, *size)
    found, _ = apply(pixels, "blur", severity)
    sigma = BLUR[severity - 1] * min(size) / 224
    wanted = np.stack([ndimage.gaussian_filter(channel, sigma, mode="mirror") for channel in pixels[0].numpy()])
    assert np.allclose(found[0], wanted, atol=1e-4)


def test_images_too_small_to_blur_stay() -> None:
    for size in (1, 2, 8):
        pixels = noise(2, 1, size, size)
        assert torch.allclose(apply(pixels, "blur", 1)[0], pixels, atol=1e-5)


@pytest.mark.parametrize("severity", range(1, SEVERITIES + 1))
@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_shrinks_towards_the_mean(severity: int, channels: int) -> None:
    pixels = noise(3, channels, 20, 24)
    found, _ = apply(pixels, "contrast", severity)
    share = CONTRAST[severity - 1]
    weights = torch.tensor([0.2989, 0.587, 0.114]) if channels == 3 else torch.ones(1)  # of luminance
    grey = (pixels * weights.view(1, -1, 1, 1)).sum(1, keepdim=True).mean((1, 2, 3), keepdim=True)
    assert torch.allclose(found, grey + share * (pixels - grey), atol=1e-3)


@pytest.mark.parametrize("severity", range(1, SEVERITIES + 1))
def test_rotation_is_by_its_angle_to_either_side(severity: int) -> None:
    size, radius, angle = 65, 20, np.deg2rad(ROTATION[severity - 1])
    pixels = torch.zeros(16, 1, size, size)
    pixels[:, 0, 32 - 1 : 32 + 2, 32 + radius - 1 : 32 + radius + 2] = 1  # a dot to the right of the centre
    found, _ = apply(pixels, "rotation", severity)
    rows, columns = torch.meshgrid(torch.arange(size) - 32.0, torch.arange(size) - 32.0, indexing="ij")
    mass = found.sum((1, 2, 3))
    x, y = ((found[:, 0] * axis).sum((1, 2)) / mass for axis in (columns, rows))
    assert torch.allclose(x, torch.tensor(radius * np.cos(angle), dtype=torch.float32), atol=0.2)
    assert torch.allclose(y.abs(), torch.tensor(radius * np.sin(angle), dtype=torch.float32), atol=0.2)
    assert (y > 0).any() and (y < 0).any()


def test_masks_turn_with_their_images() -> None:
    classes = torch.randint(0, 7, (6, 12, 12), generator=torch.Generator().manual_seed(0))
    y = classes.repeat_interleave(4, 1).repeat_interleave(4, 2)
    pixels = (y[:, None] / 10).float().expand(-1, 3, -1, -1)
    before = y.clone()
    found, turned = apply(pixels, "rotation", 3, y)
    assert torch.equal(y, before) and turned.dtype == torch.int64 and turned.shape == y.shape
    assert (turned[:, 0, 0] == IGNORED).all() and (turned[:, 24, 24] == y[:, 24, 24]).all()
    assert set(turned.unique().tolist()) <= {*range(7), IGNORED}
    inside = turned != IGNORED
    near = (found[:, 0] * 10 - turned).abs() < 0.05
    assert (near & inside).sum() > 0.4 * inside.sum()  # but for the edges, which bilinear pixels blur
    assert (found[:, 0][turned == IGNORED] <= 0.6).all() and (found[:, :, 0, 0].abs() < 1e-6).all()
    for kind in ("noise", "blur", "contrast"):
        assert apply(pixels, kind, 5, y)[1] is y


@pytest.mark.parametrize("y", [torch.arange(4), torch.rand(4, 3), torch.rand(4, 20, 24)])
@pytest.mark.parametrize("kind", KINDS)
def test_other_targets_are_handed_on(kind: str, y: Tensor) -> None:
    assert apply(noise(4, 3, 20, 24), kind, 3, y)[1] is y


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_order_change_nothing(kind: str) -> None:
    pixels, positions = noise(8, 3, 20, 24), torch.tensor([5, 0, 17, 3, 1000, 8, 9, 2])
    whole, _ = apply(pixels, kind, 4, positions=positions)
    for rows in ([0, 1, 2], [7], [6, 3, 4]):
        part, _ = apply(pixels[rows], kind, 4, positions=positions[rows])
        assert torch.allclose(part, whole[rows], rtol=0, atol=1e-6)
    assert torch.equal(apply(pixels, kind, 4, positions=positions)[0], whole)


@pytest.mark.parametrize("kind", ["noise", "rotation"])
def test_what_is_drawn_depends_on_seed_severity_and_position(kind: str) -> None:
    pixels = noise(1, 1, 16, 16).expand(12, 1, 16, 16)
    first, _ = apply(pixels, kind, 2)
    assert not torch.equal(first, apply(pixels, kind, 2, seed=1)[0])
    assert not torch.equal(first, apply(pixels, kind, 2, positions=torch.arange(12) + 12)[0])
    grey = torch.full_like(pixels, 0.5)
    drawn = [(apply(grey, "noise", severity)[0] - 0.5) / NOISE[severity - 1] for severity in (1, 2)]
    assert not torch.allclose(*drawn, atol=0.1)


def test_the_global_random_state_stays() -> None:
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].tolist()
    for kind in KINDS:
        apply(noise(2, 3, 16, 16), kind)
    assert torch.equal(torch.get_rng_state(), before) and np.random.get_state()[1].tolist() == numpys


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes(kind: str, dtype: torch.dtype) -> None:
    x, y = normalise(noise(2, 3, 32, 32)).to(dtype), torch.zeros(2, dtype=torch.int64)
    settings: dict[str, Any] = {"mean": MEAN, "std": STD, "positions": torch.arange(2), "seed": 0}
    before = x.clone()
    found, _ = corrupt(x, y, kind, 3, **settings)
    wanted, _ = corrupt(x.float(), y, kind, 3, **settings)
    assert found.dtype == dtype and torch.equal(x, before)
    assert torch.allclose(found.float(), wanted.to(dtype).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "severity", "message"),
    [
        ("fog", 3, "kind='fog' is not one of 'noise', 'blur', 'contrast', 'rotation'"),
        ("noise", 0, "severity=0 is none of 1 to 5"),
        ("blur", 6, "severity=6 is none of 1 to 5"),
    ],
)
def test_there_is_no_such_corruption(kind: str, severity: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply(noise(1, 3, 8, 8), kind, severity)

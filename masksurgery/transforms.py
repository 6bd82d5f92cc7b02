"""From a PIL image to the tensor that a model takes: for prediction, evaluation and training alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from masksurgery.types import ConfigError

Transform: TypeAlias = Callable[[Image.Image, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Augmentation:
    """What is drawn anew for an image each time that it is trained on.

    The defaults are mild, as fine-tuning wants it: training from scratch crops down to 0.08 of the area.

    Attributes:
        crop_scale: Smallest and largest share of the area that is cropped.
        crop_ratio: Smallest and largest ratio of width to height of the crop.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of the change of brightness, contrast and saturation.
        auto_augment: A policy of timm, such as "rand-m9-mstd0.5" or "3a". It takes the place of `color_jitter`.
        random_erasing: Probability of a rectangle of noise.
        enabled: If false, training images are prepared as those of evaluation.
    """

    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    enabled: bool = True

    def __post_init__(self) -> None:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ConfigError(f"crop_scale={self.crop_scale} is not a range inside of 0 to 1, such as (0.5, 1.0).")
        low, high = self.crop_ratio
        if not 0 < low <= high < float("inf"):
            raise ConfigError(f"crop_ratio={self.crop_ratio} is not a range of positive numbers, such as (0.75, 1.33).")
        for name in ("hflip", "vflip", "random_erasing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)} is not a probability: it has to be from 0 to 1.")
        if not 0 <= self.color_jitter < float("inf"):
            raise ConfigError(f"color_jitter={self.color_jitter} is not a strength, such as 0.4.")

    @classmethod
    def none(cls) -> Augmentation:
        """No augmentation: the preprocessing of evaluation."""
        return cls(enabled=False)


class Preprocessing:
    """How a model wants its images.

    Resizing, cropping and normalisation are those of its pretrained_cfg, else timm's defaults for ImageNet.

    Args:
        shape: [c, h, w] of the model's input; c is 1 or 3.
        dtype: Of the tensors.
        pretrained_cfg: timm's.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        pretrained_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        from timm.data import resolve_data_config

        self.channels, *size = shape
        self.size = tuple(size)
        self.dtype = dtype
        self.config = resolve_data_config({"input_size": tuple(shape)}, pretrained_cfg=dict(pretrained_cfg or {}))
        for name in ("mean", "std"):  # of three channels where the model has one
            if len(self.config[name]) != self.channels:
                self.config[name] = (sum(self.config[name]) / len(self.config[name]),) * self.channels

    def evaluation(self, *, masks: bool = False) -> Transform:
        """What evaluation and `predict` do: (image, target) to ([c, h, w], target).

        Args:
            masks: The target is a mask. It becomes int64 [h, w], and image and mask are resized as a whole: cut margins
                would never be evaluated. An image with any other target is resized in the same way.
        """
        from timm.data import create_transform

        if masks:
            return _PairTransform(self._resize(), self)
        return _ImageTransform(create_transform(**self.config, is_training=False), self.dtype)

    def training(self, augmentation: Augmentation | None = None, *, masks: bool = False) -> Transform:
        """What training does, see `evaluation`. It draws from the global generators of Python, numpy and torch.

        Raises:
            ConfigError: timm does not know the policy `auto_augment`, or an option does not go with masks.
        """
        chosen = augmentation or Augmentation()
        if not chosen.enabled:
            return self.evaluation(masks=masks)
        if masks:
            return _PairTransform(self._random_pair(chosen), self)
        return _ImageTransform(self._random_image(chosen), self.dtype)

    def _random_image(self, chosen: Augmentation) -> Callable[[Image.Image], Tensor]:
        from timm.data import create_transform

        try:
            return create_transform(
                **self.config,
                is_training=True,
                scale=chosen.crop_scale,
                ratio=chosen.crop_ratio,
                hflip=chosen.hflip,
                vflip=chosen.vflip,
                color_jitter=chosen.color_jitter,
                auto_augment=chosen.auto_augment,
                re_prob=chosen.random_erasing,
                re_mode="pixel",
            )
        except Exception as error:  # timm asserts, or whatever its parser runs into
            raise ConfigError(
                f"timm cannot build the augmentation auto_augment={chosen.auto_augment!r}: "
                f'{str(error) or type(error).__name__}. Policies look like "rand-m9-mstd0.5", "original" or "3a".'
            ) from error

    def _random_pair(self, chosen: Augmentation) -> Callable[..., Any]:
        from torchvision.transforms import v2

        for name in ("auto_augment", "random_erasing"):
            if getattr(chosen, name):
                raise ConfigError(
                    f"{name}={getattr(chosen, name)!r} moves or erases pixels without their mask. Leave it out."
                )
        jitter = chosen.color_jitter
        return v2.Compose(
            [
                v2.RandomResizedCrop(
                    self.size, chosen.crop_scale, chosen.crop_ratio, self._interpolation(), antialias=True
                ),
                v2.RandomHorizontalFlip(chosen.hflip),
                v2.RandomVerticalFlip(chosen.vflip),
                v2.ColorJitter(jitter, jitter, jitter),
            ]
        )

    def _resize(self) -> Callable[..., Any]:
        from torchvision.transforms import v2

        return v2.Resize(self.size, self._interpolation(), antialias=True)

    def _interpolation(self) -> Any:
        from torchvision.transforms import InterpolationMode

        return InterpolationMode(self.config["interpolation"])


@dataclass(frozen=True)
class _ImageTransform:
    """(image, anything) to ([c, h, w], the same)."""

    transform: Callable[[Image.Image], Tensor]
    dtype: torch.dtype

    def __call__(self, image: Image.Image, target: Any = None) -> tuple[Tensor, Any]:
        return self.transform(image).to(self.dtype), target


class _PairTransform:
    """(image, mask of class indices) to ([c, h, w], int64 [h, w]), moved together; of a mask no two are mixed."""

    def __init__(self, moves: Callable[..., Any], preprocessing: Preprocessing) -> None:
        self.moves = moves
        self.dtype = preprocessing.dtype
        self.mean = torch.tensor(preprocessing.config["mean"])[:, None, None]
        self.std = torch.tensor(preprocessing.config["std"])[:, None, None]

    def __call__(self, image: Image.Image, mask: Any) -> tuple[Tensor, Any]:
        from torchvision import tv_tensors
        from torchvision.transforms.v2 import functional

        if not isinstance(mask, np.ndarray):  # the image has none
            return self._normalise(self.moves(functional.to_image(image))), mask
        pixels, classes = self.moves(functional.to_image(image), tv_tensors.Mask(torch.from_numpy(mask)))
        return self._normalise(pixels), classes.as_subclass(Tensor).long()

    def _normalise(self, pixels: Tensor) -> Tensor:
        return ((pixels.as_subclass(Tensor).float() / 255 - self.mean) / self.std).to(self.dtype)

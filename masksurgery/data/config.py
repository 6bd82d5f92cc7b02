"""The settings of data."""

from __future__ import annotations

from dataclasses import dataclass

from masksurgery.types import ConfigError

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("validation", "val", "valid", "eval", "evaluation")  # a test part is never taken without being asked for


@dataclass(frozen=True)
class DataConfig:
    """Where images and targets come from, and how many of them are used.

    Attributes:
        data: A folder of images with a folder for each class (in `train` and `val`, or held out by seed), a tar file
            of such a folder, a CSV file, "torch/fashion_mnist" and the other names of torchvision, "hfds/NAME" or
            "hfds/FOLDER" (Hugging Face datasets), or a stream: "wds/FOLDER" (WebDataset shards), "hfids/...",
            "tfds/...".
        data_dir: Where a named data set lies (timm's root); for a CSV file the folder of the images, by default its
            own.
        train_split: The part to train on: a folder, a split of the data set, or a value of the column `split`. For
            shards also a pattern with the number of images behind it: "train-{000..127}.tar|100000".
        val_split: The part to validate on. By default the one that is called validation, val, valid, eval or
            evaluation, and where there is none a share of the training part.
        val_fraction: Share of the training part that is held out where there is no validation part.
        masks: For segmentation: a folder of masks, named as the images are.
        download: Allow a download of the named data set.
        max_train: Train on so many images only, drawn by the seed.
        max_val: Validate on so many images only, drawn by the seed.
        max_bad: How many broken images are left out before they are an error.
        check: Read every image once before training.
        seed: For everything that is drawn.
    """

    data: str
    data_dir: str | None = None
    train_split: str | None = None
    val_split: str | None = None
    val_fraction: float = 0.1
    masks: str | None = None
    download: bool = False
    max_train: int | None = None
    max_val: int | None = None
    max_bad: int = 0
    check: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.data:
            raise ConfigError('data="" names nothing. Pass a folder, a CSV file, or a name such as "torch/cifar10".')
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction={self.val_fraction} is not a share between 0 and 1, such as 0.1.")
        for name in ("max_train", "max_val"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} leaves no image. Pass at least 1, or nothing for all.")
        for name in ("max_bad", "seed"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} is negative. Pass 0 or more.")

    @property
    def prefix(self) -> str:
        """Which reader of timm opens it: "torch", "hfds", "hfids", "tfds", "wds", or "" for files."""
        first, slash, _ = self.data.partition("/")
        return first.lower() if slash and first.lower() in ("torch", "hfds", "hfids", "tfds", "wds") else ""

    @property
    def name(self) -> str:
        """The data without the prefix."""
        return self.data[len(self.prefix) + 1 :] if self.prefix else self.data

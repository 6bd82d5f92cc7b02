"""The whole job in two minutes: train a small model, make it an ensemble, and see whether it knows what it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from masksurgery.checkpoint import save
from masksurgery.convert import convert
from masksurgery.data import DataConfig
from masksurgery.evaluate import evaluate
from masksurgery.evaluation import Evaluation
from masksurgery.evaluation_config import EvaluateConfig
from masksurgery.factory import create_base
from masksurgery.finetune import finetune
from masksurgery.processes import require
from masksurgery.randomness import forked_random_state, generator, seed_global
from masksurgery.training_config import FinetuneConfig
from masksurgery.transforms import Augmentation
from masksurgery.types import ConfigError

ARCHITECTURE = "test_resnet"
KNOWN = 8
"""The digits below it are the task; the others are unseen."""
SIZE = 32
RATE = 3e-3
EPOCHS = 20, 80
"""Of the base model, and then of the ensemble and of the base model again."""
TRAIN, VAL = 300, 200
"""Images of each part; about 940 are left for the test."""


@dataclass(frozen=True)
class Demo:
    """What the demo leaves in its folder.

    Attributes:
        folder: The others are in it.
        seed: Of the split, the weights, the masks and the training.
    """

    folder: Path
    seed: int = 0

    @property
    def data(self) -> Path:
        """The digits 0 to 7, in train, val and test."""
        return self.folder / "data"

    @property
    def unseen(self) -> Path:
        """The digits 8 and 9."""
        return self.folder / "unseen"

    @property
    def base(self) -> Path:
        """The base model, fine-tuned for as many epochs as the ensemble."""
        return self.folder / "base"

    @property
    def ensemble(self) -> Path:
        return self.folder / "ensemble"

    def run(
        self,
        epochs: tuple[int, int] = EPOCHS,
        say: Callable[[str], object] = lambda text: None,
        observer: Any = None,
    ) -> Evaluation:
        """Do it all.

        Args:
            epochs: Of the base model, and then of both.
            say: Is told of each step beforehand.
            observer: Of the evaluation.
        Raises:
            ConfigError: A package is missing, or the folder is not empty.
        """
        self.prepare()
        say(f"training {ARCHITECTURE} on {TRAIN} images of the digits 0 to {KNOWN - 1}")
        self.train(epochs[0])
        say("converting it")
        self.convert()
        say("fine-tuning the ensemble")
        self.finetune(self.ensemble, epochs[1])
        say("fine-tuning the base model for as many epochs")
        self.finetune(self.base, epochs[1], base_only=True)
        say("evaluating both")
        config = EvaluateConfig(ood=(str(self.unseen),), corrupt=("all",), coverage=0.9, score="entropy", workers=0)
        return self.evaluate(config, observer)

    def prepare(self) -> None:
        """Write the images as files, as users have them."""
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ConfigError(f"{self.folder} is not empty. Pass another folder, or remove it.")
        require("sklearn", "demo", "The demo")
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = generator("demo", self.seed).permutation(len(digits.target))
        known = [k for k in order if digits.target[k] < KNOWN]
        for rank, k in enumerate(known):
            part = "train" if rank < TRAIN else "val" if rank < TRAIN + VAL else "test"
            _write(digits.images[k], self.data / part / str(digits.target[k]) / f"{k:04}.png")
        for k in order:
            if digits.target[k] >= KNOWN:
                _write(digits.images[k], self.unseen / f"{digits.target[k]}-{k:04}.png")

    def train(self, epochs: int) -> None:
        """Train the base model from scratch, to the folder `trained`."""
        self._convert(self.folder / "untrained", None)
        self._finetune(self.folder / "untrained", self.folder / "trained", epochs, base_only=True)

    def convert(self) -> None:
        """Make an ensemble of what `train` has left, in the folder `converted`."""
        self._convert(self.folder / "converted", self.folder / "trained" / "model.safetensors")

    def finetune(self, output: Path, epochs: int, base_only: bool = False) -> None:
        """Fine-tune the ensemble, or the base model."""
        self._finetune(self.folder / "converted", output, epochs, base_only=base_only)

    def evaluate(self, config: EvaluateConfig, observer: Any = None) -> Evaluation:
        """Evaluate both on the test part."""
        data = DataConfig(str(self.data), val_split="test", seed=self.seed)
        return evaluate([self.base, self.ensemble], data, config=config, observer=observer)

    def _convert(self, output: Path, weights: Path | None) -> None:
        """Convert the architecture with these weights, or with random ones."""
        with forked_random_state():
            seed_global("demo", self.seed)
            base, recipe, inputs = create_base(
                ARCHITECTURE, pretrained=False, checkpoint=weights, num_classes=KNOWN, in_chans=1, img_size=SIZE
            )
        model = convert(base, n=4, scale=2.0, seed=self.seed, example_inputs=inputs)
        model.recipe = recipe.to_dict()
        save(model, output)

    def _finetune(self, source: Path, output: Path, epochs: int, base_only: bool) -> None:
        config = FinetuneConfig(epochs=epochs, lr=RATE, seed=self.seed, workers=0)
        augmentation = Augmentation(crop_scale=(0.8, 1.0), hflip=0.0)  # a mirrored digit is no digit
        data = DataConfig(str(self.data), seed=self.seed, check=False)
        finetune(source, data, output, config=config, augmentation=augmentation, base_only=base_only)


def _write(pixels: np.ndarray, file: Path) -> None:
    """An image of 8 x 8 in 17 shades, enlarged."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
    image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(file)

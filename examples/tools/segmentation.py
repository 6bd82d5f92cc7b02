"""Segmentation: where in an image a network is unsure, as a picture.

    pip install masksurgery[evaluate] segmentation-models-pytorch
    python examples/tools/segmentation.py

A U-Net learns discs in noise. In the test images there are discs, and squares that it has never seen; the picture shows
each image with the probability and the standard deviation over the members, for every pixel.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all that is wanted

import segmentation_models_pytorch as smp
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

import masksurgery

SIZE = 64


def draw(count: int, square: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [count, 1, 64, 64] with one shape each, and their masks [count, 64, 64]."""
    where = torch.rand(count, 2, 1, 1, generator=generator) * 32 + 16
    size = torch.rand(count, 1, 1, generator=generator) * 6 + 7
    grid = torch.stack(torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")).float()
    apart = (grid[None] - where).abs()
    distance = apart.amax(1) if square else apart.square().sum(1).sqrt()
    mask = distance < size
    noise = torch.randn(count, SIZE, SIZE, generator=generator) * 0.6
    return (mask * 1.0 + noise)[:, None], mask.long()


def fit(model: nn.Module, x: Tensor, y: Tensor, epochs: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.eval()


def main(file: Path = Path("segmentation.png")) -> dict[str, float]:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    channels = {"encoder_depth": 3, "decoder_channels": (48, 32, 16), "in_channels": 1, "classes": 2}
    base = smp.Unet("tu-test_resnet", encoder_weights=None, **channels)
    x, y = draw(256, False, generator)
    fit(base, x, y, 6, generator)
    model = masksurgery.convert(base, n=4, scale=2.0, example_inputs=(x[:1],))
    fit(model, x, y, 10, generator)

    (discs, masks), (squares, other) = draw(64, False, generator), draw(64, True, generator)
    with torch.no_grad():
        p, q = model(discs), model(squares)
    of_shapes = [
        torch.cat([of_discs[:3, 1], of_squares[:3, 1]]) for of_discs, of_squares in zip(p[:2], q[:2], strict=True)
    ]
    show(file, torch.cat([discs[:3], squares[:3]]), *of_shapes)
    wrong = p.mean.argmax(1) != masks
    unsure = p.variance[:, 1]
    return {
        "pixels that are right": 1 - float(wrong.float().mean()),
        "variance where it is wrong, to where it is right": float(unsure[wrong].mean() / unsure[~wrong].mean()),
        "variance of squares, to that of discs": float(q.variance[:, 1].mean() / unsure.mean()),
        "pixels that are right, squares": float((q.mean.argmax(1) == other).float().mean()),
    }


def show(file: Path, images: Tensor, mean: Tensor, variance: Tensor) -> None:
    """A column for each image; below it what the network says, and how far its members disagree."""
    rows = {"image": images[:, 0], "probability": mean, "standard deviation": variance.sqrt()}
    figure, axes = plt.subplots(3, len(images), figsize=(1.6 * len(images), 5), layout="constrained")
    for line, (title, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            limits = {} if title == "image" else {"vmin": 0, "vmax": 1 if title == "probability" else 0.5}
            axis.imshow(picture, cmap="gray" if title == "image" else "viridis", **limits)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:50} {value:.3g}")
    print("The picture is segmentation.png.")

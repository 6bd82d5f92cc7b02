"""LoRA (peft) on a converted ViT: new classes by a sixth of its weights, which are then merged, saved and loaded.

pip install masksurgery[demo] peft
python examples/tools/lora.py
"""

from __future__ import annotations

import tempfile

import timm
import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn

import masksurgery

SIZE = 32


def load_data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    images = torch.tensor(digits.images).float()[:, None] / 8 - 1  # from -1 to 1
    return nn.functional.interpolate(images, size=SIZE, mode="bilinear"), torch.tensor(digits.target)


def fit(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float) -> None:
    """A training loop that knows of neither masks nor LoRA."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    found = model(x)
    scores = found if isinstance(found, Tensor) else found.mean
    return float((scores.argmax(1) == y).float().mean())


def main() -> dict[str, float]:
    torch.manual_seed(0)
    x, y = load_data()
    # What stands for a pretrained model here has seen the digits 0 to 4 alone; its output layer is for ten classes.
    base = timm.create_model("test_vit", in_chans=1, img_size=SIZE, num_classes=10)
    seen = y[:1000] < 5
    fit(base, x[:1000][seen], y[:1000][seen], epochs=10, lr=1e-3)

    model = masksurgery.convert(base, n=4, scale=1.5, example_inputs=(x[:1],))
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["qkv", "proj", "fc1", "fc2"], modules_to_save=["head"])
    adapted = get_peft_model(model, lora)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    fit(adapted, x[:1000], y[:1000], epochs=20, lr=3e-3)

    merged = adapted.merge_and_unload()  # the converted model again, without adapters
    with tempfile.TemporaryDirectory() as folder:
        loaded = masksurgery.load(masksurgery.save(merged, folder))
    with torch.no_grad():
        apart = float((adapted.eval()(x[1000:1100]).mean - loaded(x[1000:1100]).mean).abs().max())
    return {
        "share of weights that was trained": trained / sum(p.numel() for p in base.parameters()),
        "accuracy of the base model": accuracy(base, x[1000:], y[1000:]),
        "accuracy of the ensemble": accuracy(loaded, x[1000:], y[1000:]),
        "largest difference once merged, saved and loaded": apart,
    }


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:50} {value:.3g}")

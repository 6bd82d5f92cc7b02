"""int8 weights (torchao) on a packed model: a quarter of the bytes, nearly the same predictions.

pip install masksurgery torchao
python examples/tools/int8.py
"""

from __future__ import annotations

import io

import timm
import torch
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import masksurgery


def size_of(model: nn.Module) -> int:
    """Bytes of the weights, as torch.save writes them."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def main() -> dict[str, float]:
    torch.manual_seed(0)
    base = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    model = masksurgery.convert(base, n=4, scale=2.0, heads=True).eval()
    packed = masksurgery.pack(model, "unrolled", dense=True)
    x: Tensor = torch.randn(4, 3, 224, 224)
    with torch.no_grad():
        expected = packed(x)
        before = size_of(packed)
        quantize_(packed, Int8WeightOnlyConfig())
        found = packed(x)
    return {
        "MB before": before / 1e6,
        "MB after": size_of(packed) / 1e6,
        "largest difference of a mean probability": float((found.mean - expected.mean).abs().max()),
        "largest difference of a variance, of the largest variance": float(
            (found.variance - expected.variance).abs().max() / expected.variance.max()
        ),
    }


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:58} {value:.3g}")

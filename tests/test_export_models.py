"""Six models: exported to both formats with a dynamic batch, converted and packed; compiled without graph breaks.

With two members, for each packed one is followed by itself, and takes its time. CI takes a third of them with each
commit, `pytest -m slow` all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import masksurgery
from nets import randomise
from test_examples import load_example
from test_export import run_onnx

pytestmark = pytest.mark.slow

SIZES = {"vit_tiny_patch16_224": 224, "swin_tiny_patch4_window7_224": 224}
NAMES = (
    "resnet50",
    "efficientnet_b0",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "deeplabv3_mobilenet_v3_large",
)
six = pytest.mark.parametrize("name", NAMES)


def images(name: str, batch: int) -> Tensor:
    size = SIZES.get(name, 64)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def convert(name: str, n: int = 2) -> masksurgery.ConvertedModel:
    if name.startswith("deeplab"):
        base: nn.Module = torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=5, aux_loss=True
        )
    else:
        base = timm.create_model(name, num_classes=10, drop_path_rate=0.1)
    return masksurgery.convert(randomise(base), n=n, scale=2.0, example_inputs=(images(name, 1),)).eval()


@pytest.mark.parametrize("packed", [False, True], ids=["converted", "packed"])
@six
def test_files_agree_with_the_model(name: str, packed: bool, tmp_path: Path) -> None:
    converted = convert(name)
    masksurgery.recalibrate(converted, [images(name, 4)])  # random statistics would let numbers overflow
    model = masksurgery.pack(converted, "unrolled", dense=False) if packed else converted
    x = images(name, 3)
    with torch.no_grad():
        expected = [leaf.numpy() for leaf in tree_leaves(model(x))]
    for format in ("onnx", "pt2"):
        found = masksurgery.export(model, tmp_path / f"model.{format}")
        assert set(found.differences) == {1, 2, 5} and max(found.differences.values()) <= 1e-4
    for ours, theirs in zip(run_onnx(tmp_path / "model.onnx", x).values(), expected, strict=True):
        assert np.abs(ours - theirs).max() <= 1e-4 * max(1, np.abs(theirs).max())


@pytest.mark.real
def test_photos_give_the_same_in_every_format(tmp_path: Path) -> None:
    photos = load_example("imagenet_photos")
    base = photos.load_base()
    model = masksurgery.convert(base, n=4, scale=2.0, where="head", seed=1).eval()
    x = photos.preprocess(base, photos.load_photos())[[0, 1, 2, 3, 0]]
    with torch.no_grad():
        expected = model(x)
    for kind, one in (("converted", model), ("packed", masksurgery.pack(model, "unrolled"))):
        masksurgery.export(one, tmp_path / f"{kind}.onnx")
        for batch in (1, 2, 5):
            seen = run_onnx(tmp_path / f"{kind}.onnx", x[:batch])
            for field in ("mean", "variance", "entropy", "mutual_information"):
                assert np.abs(seen[field] - getattr(expected, field)[:batch].numpy()).max() <= 1e-4
        program = torch.export.load(masksurgery.export(one, tmp_path / f"{kind}.pt2").path).module()
        with torch.no_grad():
            assert (program(x).mean - expected.mean).abs().max() <= 1e-4


def test_attention_with_a_bias_of_its_own(tmp_path: Path) -> None:
    """torch's exporter alone fails on it, on the base model as well."""
    base = timm.create_model("test_vit_relpos", num_classes=10, img_size=32)
    model = masksurgery.convert(randomise(base), n=2, example_inputs=(torch.zeros(1, 3, 32, 32),)).eval()
    assert max(masksurgery.export(model, tmp_path / "model.onnx").differences.values()) <= 1e-4


class Windows(nn.Module):
    """Attention within windows, which have a dimension of their own: [b, windows, heads, tokens, channels]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.fc = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x.unflatten(1, (4, 5))).unflatten(-1, (3, 2, 4)).permute(3, 0, 1, 4, 2, 5)
        x = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.fc(x.transpose(2, 3).flatten(3).mean((1, 2)))


@pytest.mark.parametrize("packed", [False, True], ids=["converted", "packed"])
def test_attention_of_five_dimensions(tmp_path: Path, packed: bool) -> None:
    """Those of torch's exporter are four."""
    base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Windows())
    converted = masksurgery.convert(randomise(base), n=2, example_inputs=(torch.zeros(1, 20, 6),)).eval()
    model = masksurgery.pack(converted, "unrolled", dense=False) if packed else converted
    assert max(masksurgery.export(model, tmp_path / "model.onnx").differences.values()) <= 1e-4


# --- torch.compile ---------------------------------------------------------------------------------------------------


def compiled(model: nn.Module) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager", dynamic=False)


@pytest.mark.parametrize("packed", [False, True], ids=["converted", "packed"])
@six
def test_compiled_in_eval_without_graph_breaks(name: str, packed: bool) -> None:
    converted, x = convert(name), images(name, 2)
    masksurgery.recalibrate(converted, [images(name, 4)])
    model = masksurgery.pack(converted, "unrolled", dense=False) if packed else converted
    with torch.no_grad():
        for ours, theirs in zip(tree_leaves(compiled(model)(x)), tree_leaves(model(x)), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@six
def test_compiled_in_training_without_graph_breaks(name: str) -> None:
    """One compiled model for both batch sizes: which samples a member gets depends on the size."""
    model = convert(name).train()
    masksurgery.recalibrate(model, [images(name, 4)])
    for module in model.modules():
        if isinstance(module, (nn.Dropout, timm.layers.DropPath)):
            module.eval()  # what these draw is drawn in another order
    fast = compiled(model)
    for batch in (4, 7):
        outputs = []
        for run in (fast, model):
            torch.manual_seed(0)
            outputs.append(tree_leaves(run(images(name, batch))))
        for ours, theirs in zip(*outputs, strict=True):
            assert len(ours) == batch and torch.allclose(ours, theirs, atol=1e-4, rtol=1e-3)
        sum(leaf.float().mean() for leaf in outputs[0]).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["resnet50", "vit_tiny_patch16_224"])
def test_packed_as_it_is_packed_by_default(name: str, tmp_path: Path) -> None:
    converted, x = convert(name, 4), images(name, 2)
    masksurgery.recalibrate(converted, [images(name, 4)])
    packed = masksurgery.pack(converted)
    masksurgery.export(packed, tmp_path / "model.pt2")
    with torch.no_grad():
        for ours, theirs in zip(tree_leaves(compiled(packed)(x)), tree_leaves(packed(x)), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_inductor_gives_what_eager_gives() -> None:
    """The default backend, which writes C++."""
    torch._dynamo.reset()
    base = timm.create_model("test_resnet", num_classes=10)
    model = masksurgery.convert(randomise(base), n=4, example_inputs=(torch.zeros(1, 3, 64, 64),)).eval()
    x = torch.randn(3, 3, 64, 64)
    masksurgery.recalibrate(model, [torch.randn(8, 3, 64, 64)])
    fast = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for ours, theirs in zip(fast(x), model(x), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
    model.train()
    x = torch.randn(8, 3, 64, 64)  # two for each member: nothing is drawn
    assert torch.allclose(fast(x), model(x), atol=1e-3)

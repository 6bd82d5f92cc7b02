"""The models that packing is measured by: the same predictions, and soon."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import masksurgery
from masksurgery.model import ConvertedModel
from nets_base import randomise, settle
from packing import assert_members, assert_packed


@dataclass(frozen=True)
class Small:
    """The smallest images that a model is tried with in float64, and the arguments for them."""

    size: int = 64
    kwargs: dict[str, Any] = field(default_factory=dict)


MODELS = {
    "resnet50": Small(),
    "efficientnet_b0": Small(),
    "mobilenetv3_large_100": Small(),
    "convnext_tiny": Small(),
    "vit_small_patch16_224": Small(64, {"img_size": 64}),
    "swin_tiny_patch4_window7_224": Small(56, {"img_size": 56}),
}
models = pytest.mark.parametrize("name", MODELS)
pytestmark = pytest.mark.slow


def images(batch: int, size: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=generator).to(dtype)


@cache
def small(name: str) -> tuple[nn.Module, ConvertedModel]:
    """Base and converted model in float64."""
    base = randomise(timm.create_model(name, num_classes=10, **MODELS[name].kwargs)).double().eval()
    return base, masksurgery.convert(base, example_inputs=(images(1, MODELS[name].size, torch.float64),))


@models
@pytest.mark.parametrize("dense", [False, True], ids=["sums", "dense"])
def test_packed_is_converted(name: str, dense: bool) -> None:
    _, model = small(name)
    packed = masksurgery.pack(model, "unrolled", dense=dense)
    assert_packed(packed, model, (images(3, MODELS[name].size, torch.float64),))


@models
def test_grouped_is_converted(name: str) -> None:
    _, model = small(name)
    packed = masksurgery.pack(model, "grouped")
    assert packed.layout == "grouped"
    assert_packed(packed, model, (images(3, MODELS[name].size, torch.float64),))


@models
def test_a_member_alone_is_the_base_model_with_its_masks(name: str) -> None:
    base, model = small(name)
    packed = masksurgery.pack(model, "unrolled", dense=False)
    assert_members(packed, model, base, (images(2, MODELS[name].size, torch.float64),))


@models
@pytest.mark.parametrize("layout", ["unrolled", "grouped"])
def test_single_precision_at_full_size(name: str, layout: str) -> None:
    # With random statistics some member of efficientnet_b0 multiplies rounding by a thousand, converted as well.
    base = settle(randomise(timm.create_model(name)), images(8, 64, torch.float32)).eval()
    model = masksurgery.convert(base)
    x = (images(1, 224, torch.float32),)
    for dense in (False, True) if layout == "unrolled" else (None,):
        packed = masksurgery.pack(model, layout, dense=dense)
        assert packed.layout == layout
        assert_packed(packed, model, x)


def test_resnet50_is_packed_in_less_than_five_seconds() -> None:
    model = masksurgery.convert(timm.create_model("resnet50").eval())
    seconds = []
    for _ in range(3):
        start = time.process_time()
        masksurgery.pack(model, "unrolled", dense=False)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 5

"""The layers that make a model's output: what a frozen backbone leaves to train."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import masksurgery


class Perceptron(nn.Module):
    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.hidden, self.gate, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x).relu() * self.gate(x).sigmoid())


IMAGE = (torch.zeros(1, 3, 64, 64),)
VECTOR = (torch.zeros(1, 6),)
FCN = {"weights": None, "weights_backbone": None, "num_classes": 5, "aux_loss": True}

MODELS: dict[str, tuple[Callable[[], nn.Module], Any, tuple[str, ...]]] = {
    "resnet50": (lambda: timm.create_model("resnet50"), IMAGE, ("fc",)),
    "vit_tiny": (lambda: timm.create_model("vit_tiny_patch16_224"), None, ("head",)),
    "efficientnet_b0": (lambda: timm.create_model("efficientnet_b0"), IMAGE, ("classifier",)),
    "features": (lambda: timm.create_model("resnet18", num_classes=0), IMAGE, ()),
    "fcn": (lambda: torchvision.models.segmentation.fcn_resnet50(**FCN), IMAGE, ("classifier.4", "aux_classifier.4")),
    "perceptron": (Perceptron, VECTOR, ("out",)),
    "one output": (lambda: Perceptron(1), VECTOR, ("out",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_of_a_model(name: str) -> None:
    build, inputs, expected = MODELS[name]
    task = "regression" if name in ("one output", "features") else "classification"
    base = build().eval()
    for where in ("all", "head") if expected else ("all",):
        model = masksurgery.convert(base, where=where, task=task, example_inputs=inputs)
        assert model.surgery.output_layers == expected
    if expected:  # what where="head" puts its masks before
        assert {layer for site in model.surgery.sites for layer in (site.layer, *site.chain)} == set(expected)


def test_whatever_is_masked() -> None:
    base = Perceptron()
    for settings in ({"include": ["out"]}, {"exclude": ["out"]}, {"after": nn.Linear}, {"include": ["hidden"]}):
        model = masksurgery.convert(base, example_inputs=VECTOR, **settings)
        assert model.surgery.output_layers == ("out",)


def test_of_a_copy_and_of_a_saved_folder(tmp_path: Path) -> None:
    base = timm.create_model("test_vit", num_classes=4).eval()
    model = masksurgery.convert(base)
    masksurgery.save(model, tmp_path / "m")
    for twin in (copy.deepcopy(model), masksurgery.load(tmp_path / "m")):
        assert twin.surgery.output_layers == ("head",)
        assert isinstance(twin.get_submodule("head"), nn.Linear)
    assert model.surgery.to_dict()["output_layers"] == ("head",)

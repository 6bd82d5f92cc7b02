"""The base model of a saved folder, and what a folder keeps of what fine-tuning says of the classes."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import masksurgery
from masksurgery import CheckpointError, ConfigError
from masksurgery.checkpoint import CONFIG, WEIGHTS, load_base, save_base
from masksurgery.factory import create_base
from masksurgery.images import label_names
from masksurgery.predict import predict_images
from nets import randomise
from test_checkpoint import FACTORY, Small, Tied, small

NAMES = (
    "T-shirt",
    "pantalon",
    "свитер",
    "ワンピース",
    "معطف",
    "サンダル🩴",
    'say "shirt"',
    "a, b",
    "bag",
    "ankle boot",
)


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def train_a_step(model: nn.Module) -> None:
    """Other weights, and other statistics."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.25)


# --- the base model --------------------------------------------------------------------------------------------------


def test_the_base_model_has_the_saved_weights(tmp_path: Path) -> None:
    base = randomise(timm.create_model("test_resnet", num_classes=6), 0).eval()
    model = masksurgery.convert(base)
    train_a_step(model)
    masksurgery.save(model, tmp_path)
    loaded = load_base(tmp_path)
    train_a_step(base)  # to the same values
    assert same(loaded, base) and type(loaded) is type(base) and loaded.num_classes == 6
    assert not any(module.training for module in loaded.modules())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), base(x))
    assert loaded.pretrained_cfg == model.pretrained_cfg
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert masksurgery.convert(loaded).surgery == model.surgery


def test_the_base_model_takes_images_of_the_size_that_it_was_converted_for(tmp_path: Path) -> None:
    base = timm.create_model("test_resnet", num_classes=6).eval()
    base.pretrained_cfg = {**base.pretrained_cfg, "test_input_size": (3, 288, 288)}
    for size in (160, 32):
        x = torch.zeros(1, 3, size, size)
        loaded = load_base(masksurgery.save(masksurgery.convert(base, example_inputs=(x,)), tmp_path / str(size)))
        assert loaded.pretrained_cfg["input_size"] == (3, size, size)
        assert ("test_input_size" in loaded.pretrained_cfg) is (size == 160)
        save_base(loaded, tmp_path / "base", None)
        own = json.loads((tmp_path / "base" / CONFIG).read_text())["pretrained_cfg"]
        assert timm.data.resolve_data_config(pretrained_cfg=own)["input_size"] == [3, size, size]
        assert masksurgery.convert(loaded).inputs["args"][0]["shape"] == [1, 3, size, size]
    base, model = small()
    assert not hasattr(load_base(masksurgery.save(model, tmp_path / "own"), base=base), "pretrained_cfg")


def test_the_base_model_that_only_the_caller_has(tmp_path: Path) -> None:
    base, model = small()
    masksurgery.save(model, tmp_path)
    other = Small()
    before = copy.deepcopy(other.state_dict())
    loaded = load_base(tmp_path, base=other)
    assert same(loaded, base) and not loaded.training
    assert other.training and all(torch.equal(x, before[name]) for name, x in other.state_dict().items())
    with pytest.raises(CheckpointError, match=r"config\.json: 'base' is null.*Small.*Pass base="):
        load_base(tmp_path)


def test_tied_weights_stay_tied_in_the_base_model(tmp_path: Path) -> None:
    base = randomise(Tied().eval(), 1)
    masksurgery.save(masksurgery.convert(base, example_inputs=(torch.zeros(2, 8),)), tmp_path)
    loaded = load_base(tmp_path, base=Tied())
    assert loaded.decode.weight is loaded.encode.weight and same(loaded, base)
    with pytest.raises(CheckpointError, match=r"config\.json: decode\.weight, encode\.weight are one tied parameter"):
        load_base(tmp_path, base=Tied(tied=False))


def test_the_dtype_of_the_base_model(tmp_path: Path) -> None:
    _, model = small()
    masksurgery.save(model.bfloat16(), tmp_path)
    loaded = load_base(tmp_path, base=Small())
    assert loaded.conv.weight.dtype == loaded.gain.dtype == torch.bfloat16
    assert loaded.bn.num_batches_tracked.dtype == torch.int64


def test_a_function_of_the_users_is_not_run_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base_nets_of_mine.py").write_text(FACTORY)
    base, recipe, inputs = create_base("base_nets_of_mine:net", model_kwargs={"width": 6})
    model = masksurgery.convert(base, example_inputs=inputs)
    model.recipe = recipe.to_dict()
    masksurgery.save(model, "saved")
    monkeypatch.delitem(sys.modules, "base_nets_of_mine")
    with pytest.raises(CheckpointError, match=r"'base_nets_of_mine:net', which is not run unasked.*trust=True"):
        load_base("saved")
    assert same(load_base("saved", trust=True), base) and same(load_base("saved", base=base), base)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), r"config\.json: there is no such file"),
        (lambda folder: (folder / CONFIG).write_text("{"), r"config\.json: not JSON"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"x"), r"model\.safetensors: not a safetensors file"),
        (lambda folder: (folder / WEIGHTS).unlink(), r"model\.safetensors: there is no such file"),
    ],
)
def test_damaged_folders(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    _, model = small()
    masksurgery.save(model, tmp_path / "saved")
    damage(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=message):
        load_base(tmp_path / "saved", base=Small())


def test_another_base_model_and_no_folder(tmp_path: Path) -> None:
    _, model = small()
    masksurgery.save(model, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"not those of the base model Linear\. missing: weight.*unexpected: bn"):
        load_base(tmp_path / "saved", base=nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match=r"nowhere: does not exist; a folder that masksurgery\.save wrote"):
        load_base(tmp_path / "nowhere")


# --- the names of the classes ----------------------------------------------------------------------------------------


def predicted_labels(model: masksurgery.ConvertedModel, folder: Path) -> set[str]:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "x.png")
    (row,) = predict_images(model, [folder / "x.png"], topk=10)
    return {entry.label for entry in row.entries}


def test_label_names_of_a_new_classifier_come_back(tmp_path: Path) -> None:
    weights = tmp_path / "x.pth"
    torch.save(timm.create_model("test_efficientnet").state_dict(), weights)
    base, recipe, inputs = create_base("test_efficientnet", checkpoint=weights, num_classes=10, img_size=32)
    model = masksurgery.convert(base, where="head", example_inputs=inputs)
    model.recipe = recipe.to_dict()
    assert predicted_labels(model, tmp_path) == {f"class {i}" for i in range(10)}
    model.pretrained_cfg = {**model.pretrained_cfg, "num_classes": 10, "label_names": NAMES}
    for twin in (model, copy.deepcopy(model), masksurgery.load(masksurgery.save(model, tmp_path / "m"))):
        assert twin.pretrained_cfg["label_names"] == NAMES and twin.num_classes == 10
        assert twin.pretrained_cfg["input_size"] == (3, 32, 32)
        assert label_names(twin) == list(NAMES) and predicted_labels(twin, tmp_path) == set(NAMES)
    assert load_base(tmp_path / "m").pretrained_cfg["label_names"] == NAMES
    assert NAMES[2] in json.loads((tmp_path / "m" / CONFIG).read_text())["pretrained_cfg"]["label_names"]


@pytest.mark.parametrize("source", ["torchvision", "own"])
def test_a_model_without_a_pretrained_cfg_is_given_one_of_names_only(source: str, tmp_path: Path) -> None:
    if source == "torchvision":
        base, recipe, inputs = create_base("torchvision:squeezenet1_1", pretrained=False, num_classes=10, img_size=64)
        del base.pretrained_cfg
        model = masksurgery.convert(base, where="head", example_inputs=inputs)
        model.recipe = recipe.to_dict()
    else:
        base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        model = masksurgery.convert(base.eval(), where="head", example_inputs=(torch.zeros(1, 3, 16, 16),))
    assert not hasattr(model, "pretrained_cfg")
    model.pretrained_cfg = {"label_names": NAMES}
    masksurgery.save(model, tmp_path / "m")
    loaded = masksurgery.load(tmp_path / "m", base=base if source == "own" else None)
    assert loaded.pretrained_cfg == {"label_names": NAMES}
    assert predicted_labels(loaded, tmp_path) == set(NAMES)
    if source == "own":
        assert not hasattr(base, "pretrained_cfg")


def test_too_few_names_are_not_used(tmp_path: Path) -> None:
    base = timm.create_model("test_efficientnet", num_classes=10).eval()
    model = masksurgery.convert(base, where="head")
    model.pretrained_cfg = {**model.pretrained_cfg, "label_names": NAMES[:9]}
    loaded = masksurgery.load(masksurgery.save(model, tmp_path / "m"))
    assert predicted_labels(loaded, tmp_path) == {f"class {i}" for i in range(10)}


def test_save_takes_no_base_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save takes a converted or packed model, not Small"):
        masksurgery.save(Small(), tmp_path)

"""Base models for other classes, channels and image sizes than those of their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

import masksurgery
from masksurgery import CheckpointError, ConfigError
from masksurgery.factory import create_base
from masksurgery.rebuild import find_recipe
from nets import randomise

FACTORY = """
import torch
from torch import nn

def net(num_classes=3):
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, num_classes))
    model.example_inputs = torch.zeros(1, 6)
    return model
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("adapted_nets.py").write_text(FACTORY)
    return "adapted_nets:net"


def weights(name: str, path: Path, **kwargs: Any) -> tuple[dict[str, Tensor], Path]:
    """Random weights of a timm model, and a file of them."""
    state = randomise(timm.create_model(name, **kwargs), 0).state_dict()
    torch.save(state, path / "weights.pth")
    return state, path / "weights.pth"


def rounds_trip(base: nn.Module, recipe: Any, inputs: Any, folder: Path) -> masksurgery.ConvertedModel:
    """The converted model, loaded again without the base model."""
    model = masksurgery.convert(base.eval(), where="head", example_inputs=inputs)
    model.recipe = recipe.to_dict()
    loaded = masksurgery.load(masksurgery.save(model, folder))
    assert all(torch.equal(x, loaded.state_dict()[key]) for key, x in model.state_dict().items())
    return loaded


# --- image sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "argument"),
    [
        ("test_efficientnet", 64, {}),
        ("test_resnet", 40, {}),
        ("test_vit", 64, {"img_size": 64}),
        ("test_byobnet", 64, {"img_size": 64}),  # takes the size, although it needs none
        ("torchvision:squeezenet1_1", 64, {}),
    ],
)
def test_a_size(name: str, size: int, argument: dict[str, int], tmp_path: Path) -> None:
    base, recipe, inputs = create_base(name, pretrained=False, img_size=size)
    assert inputs[0].shape[-2:] == (size, size) and recipe.kwargs == argument and not base.training
    loaded = rounds_trip(base, recipe, inputs, tmp_path / "m")
    assert loaded.inputs["args"][0]["shape"] == [1, 3, size, size]
    assert loaded.pretrained_cfg["input_size"] == (3, size, size)
    with torch.no_grad():
        assert loaded(inputs[0]).mean.shape == (1, 1000)


def test_a_model_that_hands_its_size_on() -> None:
    base, recipe, inputs = create_base("levit_128s", pretrained=False, img_size=64)
    assert recipe.kwargs == {"img_size": 64} and inputs[0].shape == (1, 3, 64, 64)
    assert base.stages[0].blocks[0].attn.attention_biases.shape[1] == 4 * 4


def test_the_size_of_a_video() -> None:
    base, recipe, inputs = create_base("torchvision:r3d_18", pretrained=False, img_size=32)
    assert recipe.kwargs == {} and inputs[0].shape == (1, 3, 16, 32, 32) and not hasattr(base, "pretrained_cfg")


@pytest.mark.slow
def test_the_argument_of_torchvisions_transformers() -> None:
    base, recipe, inputs = create_base("torchvision:vit_b_32", pretrained=False, img_size=64)
    assert recipe.kwargs == {"image_size": 64} and base.encoder.pos_embedding.shape[1] == 2 * 2 + 1
    assert inputs[0].shape == (1, 3, 64, 64) and base.pretrained_cfg["input_size"] == (3, 64, 64)


@pytest.mark.slow
def test_size_channels_and_classes_together(tmp_path: Path) -> None:
    base, recipe, inputs = create_base("test_vit", pretrained=False, img_size=48, in_chans=1, num_classes=5)
    assert inputs[0].shape == (1, 1, 48, 48) and base.pretrained_cfg["input_size"] == (1, 48, 48)
    loaded = rounds_trip(base, recipe, inputs, tmp_path / "m")
    assert loaded(inputs[0]).mean.shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("test_vit", 65, r"img_size=65 .*'test_vit' does not take .* 65 x 65 .*have 16 x 16\. Pass 64 or 80\.$"),
        ("test_vit", 8, r"its patches have 16 x 16\. Pass 16\."),
        ("inception_v3", 32, r"'inception_v3' does not take images of 32 x 32 pixels: .*[Kk]ernel.* Pass another size"),
        ("torchvision:vit_b_32", 65, r"cannot be built with model_kwargs=\{'image_size': 65\}: .*indivisible by patch"),
        ("torchvision:maxvit_t", 100, r"model_kwargs=\{'input_size': \(100, 100\)\}: .*not divisible by partition"),
        ("adapted_nets:net", 64, r"img_size=64 \(--img-size\) is for models of timm and torchvision.*example_inputs"),
    ],
)
def test_sizes_that_a_model_does_not_take(name: str, size: int, message: str, module: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        create_base(name, pretrained=False, img_size=size)
    assert "\n" not in str(caught.value)


def test_two_sizes() -> None:
    with pytest.raises(ConfigError, match=r"img_size=64 and model_kwargs\['img_size'\]=32 contradict each other"):
        create_base("test_vit", img_size=64, model_kwargs={"img_size": 32})


def test_a_checkpoint_of_another_size_is_resampled(tmp_path: Path) -> None:
    state, path = weights("test_vit", tmp_path)
    base, _, _ = create_base("test_vit", checkpoint=path, img_size=64)
    expected = resample_abs_pos_embed(state["pos_embed"], [4, 4], num_prefix_tokens=base.num_prefix_tokens)
    torch.testing.assert_close(base.pos_embed, expected)
    assert base.pos_embed.shape != state["pos_embed"].shape
    assert all(torch.equal(x, state[key]) for key, x in base.state_dict().items() if key != "pos_embed")
    with pytest.raises(CheckpointError, match=r"of another shape: pos_embed .* instead of"):
        create_base("test_vit", checkpoint=path, model_kwargs={"img_size": 64})  # nobody asked for another size


@pytest.mark.parametrize("fails", [False, True])
def test_a_checkpoint_that_timm_cannot_resample(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(state: Any, model: Any) -> Any:
        raise KeyError("another format")

    _, path = weights("test_vit", tmp_path)
    monkeypatch.setattr("timm.models.vision_transformer.checkpoint_filter_fn", refuse if fails else None)
    with pytest.raises(CheckpointError, match=r"of another shape: pos_embed .* instead of"):
        create_base("test_vit", checkpoint=path, img_size=64)


@pytest.mark.slow
def test_a_recipe_is_found_after_the_pretrained_cfg_was_changed(tmp_path: Path) -> None:
    """What fine-tuning sets tells of the use of a model, and no longer of the tag that it is made by."""
    base = timm.create_model("test_vit", num_classes=5, img_size=64, in_chans=1).eval()
    model = masksurgery.convert(base, where="head")
    names = tuple("abcde")
    model.pretrained_cfg = {**model.pretrained_cfg, "num_classes": 5, "input_size": (1, 64, 64), "label_names": names}
    assert find_recipe(model) is not None
    loaded = masksurgery.load(masksurgery.save(model, tmp_path / "m"))
    assert loaded.pretrained_cfg["label_names"] == names and loaded.pretrained_cfg["input_size"] == (1, 64, 64)


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "classifiers"),
    [
        ("test_resnet", ["fc"]),
        ("test_convnext", ["head.fc"]),
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
    ],
)
def test_a_new_classifier(name: str, classifiers: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state, path = weights(name, tmp_path)
    base, _, _ = create_base(name, checkpoint=path, num_classes=7)
    messages = [record.getMessage() for record in caplog.records if record.name == "masksurgery.adapt"]
    assert messages == [f"{layer}: new, 7 classes (the checkpoint has 1000)" for layer in classifiers]
    fresh = {f"{layer}.{tensor}" for layer in classifiers for tensor in ("weight", "bias")}
    for key, x in base.state_dict().items():
        assert torch.equal(x, state[key]) if key not in fresh else x.shape[0] == 7
    assert all(base.get_parameter(key).isfinite().all() for key in fresh)


def test_the_classifier_of_a_torchvision_model_and_of_ones_own(
    module: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, _, _ = create_base(module, num_classes=5)
    torch.save(source.state_dict(), tmp_path / "mlp.pth")
    base, _, _ = create_base(module, checkpoint=tmp_path / "mlp.pth", num_classes=4)
    assert torch.equal(base[0].weight, source[0].weight) and base[2].out_features == 4
    source, _, _ = create_base("torchvision:squeezenet1_1", pretrained=False)
    torch.save(source.state_dict(), tmp_path / "squeezenet.pth")
    kwargs = {"checkpoint": tmp_path / "squeezenet.pth", "num_classes": 4}
    base, _, _ = create_base("torchvision:squeezenet1_1", **kwargs)
    assert base.classifier[1].weight.shape[0] == 4
    assert torch.equal(base.features[0].weight, source.features[0].weight)
    assert [record.getMessage() for record in caplog.records] == [
        "2: new, 4 classes (the checkpoint has 5)",
        "classifier.1: new, 4 classes (the checkpoint has 1000)",
    ]


def test_the_classifier_of_the_checkpoint_is_kept_where_it_fits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, path = weights("test_resnet", tmp_path, num_classes=7)
    base, _, _ = create_base("test_resnet", checkpoint=path, num_classes=7)
    assert all(torch.equal(x, state[key]) for key, x in base.state_dict().items())
    assert caplog.records == []


def test_without_a_number_of_classes_a_classifier_has_to_fit(tmp_path: Path) -> None:
    _, path = weights("test_resnet", tmp_path, num_classes=7)
    with pytest.raises(CheckpointError, match=r"'fc' has 7 classes, the model's 1000: pass num_classes=7"):
        create_base("test_resnet", checkpoint=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state | {"bn1.bias": torch.zeros(3)}, r"of another shape: bn1\.bias \(3,\)"),
        (lambda state: state | {"fc.weight": torch.zeros(1000, 3)}, r"of another shape: fc\.weight \(1000, 3\)"),
        (
            lambda state: state | {"fc.bias": torch.zeros(4)},
            r"of another shape: fc\.weight \(1000, .*, fc\.bias \(4,\)",
        ),
        (lambda state: {key: x for key, x in state.items() if key != "bn1.bias"}, r"missing: bn1\.bias"),
        (lambda state: state | {"surplus": torch.zeros(3)}, r"unexpected: surplus"),
    ],
)
def test_nothing_but_the_classifier_may_differ(
    change: Any, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, path = weights("test_resnet", tmp_path)
    torch.save(change(dict(state)), path)
    with pytest.raises(CheckpointError, match=rf"weights\.pth: the keys are not those of the model\. .*{message}"):
        create_base("test_resnet", checkpoint=path, num_classes=7)
    assert caplog.records == []


def test_a_single_layer_of_other_rows_is_no_classifier(tmp_path: Path, module: str) -> None:
    """A hidden layer of another width has not the number of classes that was asked for."""
    source = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    torch.save(source.state_dict() | {"0.weight": torch.zeros(9, 6), "0.bias": torch.zeros(9)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"of another shape: 0\.weight \(9, 6\) instead of \(4, 6\)"):
        create_base(module, checkpoint=tmp_path / "x.pth", num_classes=3)


# --- channels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_first_layer_is_adapted_to_the_channels(name: str, tmp_path: Path) -> None:
    state, path = weights(name, tmp_path)
    first = timm.models.get_pretrained_cfg(name).first_conv + ".weight"
    grey = create_base(name, checkpoint=path, in_chans=1)[0].state_dict()
    torch.testing.assert_close(grey[first], state[first].sum(1, keepdim=True))
    four = create_base(name, checkpoint=path, in_chans=4)[0].state_dict()
    torch.testing.assert_close(four[first], state[first][:, [0, 1, 2, 0]] * 0.75)
    for adapted in (grey, four):
        assert all(torch.equal(x, state[key]) for key, x in adapted.items() if key != first)


@pytest.mark.parametrize("kwargs", [{"in_chans": 4}, {"in_chans": 3}, {}])
def test_channels_that_cannot_be_adapted(kwargs: dict[str, int], tmp_path: Path) -> None:
    _, path = weights("test_resnet", tmp_path, in_chans=2)
    with pytest.raises(CheckpointError, match=r"of another shape: conv1.* instead of"):
        create_base("test_resnet", checkpoint=path, **kwargs)


def test_what_is_new_is_in_the_folder(tmp_path: Path) -> None:
    _, path = weights("test_efficientnet", tmp_path)
    base, recipe, inputs = create_base("test_efficientnet", checkpoint=path, num_classes=10, img_size=64, in_chans=1)
    loaded = rounds_trip(base, recipe, inputs, tmp_path / "m")
    record = json.loads((tmp_path / "m" / "config.json").read_text())
    assert record["inputs"]["args"] == [{"shape": [1, 1, 64, 64], "dtype": "float32"}]
    assert record["base"]["kwargs"] == {"num_classes": 10, "in_chans": 1}
    assert loaded(inputs[0]).mean.shape == (1, 10)

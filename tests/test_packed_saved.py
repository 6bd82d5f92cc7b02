"""Folders of packed models: what comes back is what was saved, and it is used as a converted model is."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import masksurgery
from finetuning import make_converted, make_images
from masksurgery import CheckpointError, ConfigError, DataConfig, EvaluateConfig
from masksurgery.checkpoint import CONFIG, WEIGHTS, load_base, save_calibration
from masksurgery.cli import app
from masksurgery.folders import mask_key
from masksurgery.images import find_images
from masksurgery.model import ConvertedModel
from masksurgery.pack import PackedModel, pack
from masksurgery.predict import Reader
from masksurgery.scores import Threshold
from masksurgery.subjects import open_subject
from nets import randomise
from test_checkpoint import SHOW, Small, Tied, assert_equal, small
from test_checkpoint_errors import change_config, change_tensors, fails


def packed_small(**kwargs: Any) -> tuple[ConvertedModel, PackedModel]:
    _, model = small()
    return model, pack(model.eval(), "unrolled", **kwargs)


def assert_same(one: PackedModel, other: Any, *args: Tensor) -> None:
    """`assert_equal`, and what only packed models have."""
    assert isinstance(other, PackedModel)
    assert (one.layout, one.dense, one.barriers) == (other.layout, other.dense, other.barriers)
    assert one.digest == other.digest
    assert one.settings == other.settings and one.recipe == other.recipe
    assert one.surgery.masks.keys() == other.surgery.masks.keys()
    assert all((one.surgery.masks[name] == other.surgery.masks[name]).all() for name in one.surgery.masks)
    assert_equal(one, other, *args)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return masksurgery.save(packed_small()[1], tmp_path / "saved")


@pytest.mark.slow
def test_folders_predict_the_same_in_another_process(tmp_path: Path) -> None:
    models, inputs = {}, {}
    for name in ("test_resnet", "test_vit"):
        base = randomise(timm.create_model(name, num_classes=7), 0).eval()
        models[name] = pack(masksurgery.convert(base, n=3, seed=5), "unrolled")
        folder = masksurgery.save(models[name], tmp_path / "new" / name)
        assert sorted(path.name for path in folder.iterdir()) == [CONFIG, WEIGHTS]
        inputs[name] = torch.randn(2, *models[name].inputs["args"][0]["shape"][1:])
    save_file(inputs, tmp_path / "x.safetensors")
    command = [sys.executable, "-c", SHOW, tmp_path / "new", tmp_path / "x.safetensors", tmp_path / "out.safetensors"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    there = load_file(tmp_path / "out.safetensors")
    for name, model in models.items():
        prediction = model(inputs[name])._asdict()
        assert all(torch.equal(there.pop(f"{name}.{field}"), prediction[field]) for field in prediction)
        loaded = masksurgery.load(tmp_path / "new" / name)
        assert_same(model, loaded, inputs[name])
        assert loaded.pretrained_cfg == model.pretrained_cfg and loaded.num_classes == 7
        assert loaded.inputs == model.inputs
    assert there == {}


def test_a_loaded_model_is_saved_again(tmp_path: Path) -> None:
    _, packed = packed_small()
    loaded = masksurgery.load(masksurgery.save(packed, tmp_path / "first"), base=Small())
    again = masksurgery.load(masksurgery.save(loaded, tmp_path / "second"), base=Small())
    assert_same(packed, again, torch.randn(2, 3, 8, 8))


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "dense"), [("unrolled", False), ("unrolled", True), ("grouped", True)])
def test_it_is_packed_in_the_same_way_again(layout: Any, dense: bool, tmp_path: Path) -> None:
    base = randomise(timm.create_model("test_resnet", num_classes=3), 0)
    packed = pack(masksurgery.convert(base), layout, dense=dense)
    masksurgery.save(packed, tmp_path)
    record = json.loads((tmp_path / CONFIG).read_text())["packed"]
    assert record == {"layout": packed.layout, "dense": dense, "digest": packed.digest}
    assert_same(packed, masksurgery.load(tmp_path), torch.randn(2, 3, 64, 64))


def test_a_model_of_ones_own_needs_its_base_and_leaves_it_alone(tmp_path: Path) -> None:
    """Its buffer, which is not persistent, is in no file, and has its values again."""
    model, packed = packed_small()
    masksurgery.save(packed, tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: 'base' is null.*Small.*Pass base="):
        masksurgery.load(tmp_path)
    other, x = Small(), torch.randn(4, 3, 8, 8)
    before = copy.deepcopy(other.state_dict())
    loaded = masksurgery.load(tmp_path, base=other)
    assert_same(packed, loaded, x)
    torch.testing.assert_close(loaded(x).mean, model(x).mean, rtol=1e-4, atol=1e-5)
    assert other.training and all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


class Computed(Small):
    """A scale that is computed of a parameter alone, which packing does once and for all."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.log_scale.exp()


@pytest.mark.parametrize("value", [0.0, 1.0, float("nan")])
def test_the_weights_of_the_base_model_do_not_count(value: float, tmp_path: Path) -> None:
    model = masksurgery.convert(randomise(Computed(), 3), n=3, example_inputs=(torch.zeros(1, 3, 8, 8),))
    packed, base = pack(model.eval(), "unrolled"), Computed()
    for parameter in base.parameters():
        parameter.data.fill_(value)
    assert_same(packed, masksurgery.load(masksurgery.save(packed, tmp_path), base=base), torch.randn(2, 3, 8, 8))


def test_what_was_fitted_and_what_eval_returns_come_back(tmp_path: Path) -> None:
    _, packed = packed_small()
    packed.temperature, packed.threshold, packed.output = 2.5, Threshold("entropy", 0.7), "logits"
    loaded = masksurgery.load(masksurgery.save(packed, tmp_path), base=Small())
    assert (loaded.temperature, loaded.threshold, loaded.output) == (2.5, Threshold("entropy", 0.7), "logits")
    assert_same(packed, loaded, torch.randn(2, 3, 8, 8))
    before = (tmp_path / WEIGHTS).read_bytes()
    save_calibration(tmp_path, temperature=0.5, threshold=None)
    loaded = masksurgery.load(tmp_path, base=Small())
    assert (loaded.temperature, loaded.threshold, loaded.output) == (0.5, None, "logits")
    assert (tmp_path / WEIGHTS).read_bytes() == before and isinstance(loaded, PackedModel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    _, packed = packed_small()
    packed.to(dtype)
    loaded = masksurgery.load(masksurgery.save(packed, tmp_path), base=Small())
    assert {x.dtype for x in loaded.parameters()} == {dtype}
    assert_same(packed, loaded, torch.randn(2, 3, 8, 8, dtype=dtype))


def test_dtypes_may_be_mixed(tmp_path: Path) -> None:
    _, packed = packed_small()
    last = list(packed.parameters())[-1]
    last.data = last.data.double()
    loaded = masksurgery.load(masksurgery.save(packed, tmp_path), base=Small())
    dtypes = {name: x.dtype for name, x in packed.state_dict().items()}
    assert {name: x.dtype for name, x in loaded.state_dict().items()} == dtypes
    assert {torch.float32, torch.float64} <= set(dtypes.values())


def test_inputs_by_keyword_and_several_outputs(tmp_path: Path) -> None:
    model = masksurgery.convert(randomise(Tied().eval(), 1), example_inputs={"x": torch.zeros(2, 8), "scale": 2.0})
    packed, x = pack(model, "unrolled"), torch.randn(3, 8)
    loaded = masksurgery.load(masksurgery.save(packed, tmp_path), base=Tied())
    assert_same(packed, loaded, x)
    assert torch.equal(loaded(x=x, scale=2.0)["logits"].mean, packed(x)["logits"].mean)
    with pytest.raises(masksurgery.TraceError, match=r"scale=1\.0: the model was converted with scale=2\.0"):
        loaded(x, scale=1.0)


def test_a_packed_model_takes_the_place_of_a_converted_one(tmp_path: Path) -> None:
    model, packed = packed_small()
    masksurgery.save(model, tmp_path)
    assert "packed" not in json.loads((tmp_path / CONFIG).read_text())  # so that older readers read it
    masksurgery.save(packed, tmp_path)
    assert isinstance(masksurgery.load(tmp_path, base=Small()), PackedModel)
    masksurgery.save(model, tmp_path)
    assert isinstance(masksurgery.load(tmp_path, base=Small()), ConvertedModel)
    (tmp_path / CONFIG).write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: exists, and masksurgery\.save did not write it"):
        masksurgery.save(packed, tmp_path)


# --- damaged and foreign folders -------------------------------------------------------------------------------------


def first_weight(folder: Path) -> str:
    return next(name for name in sorted(load_file(folder / WEIGHTS)) if name.endswith(".weight"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, key: tensors.pop(key), "missing: {key}"),
        (lambda tensors, key: tensors.update({"members.9.weight": torch.zeros(2)}), r"unexpected: members\.9\.weight"),
        (lambda tensors, key: tensors.update({key: tensors[key][:-1].clone()}), r"of another shape: {key} \("),
    ],
)
def test_the_keys_are_not_those_that_packing_makes(
    change: Callable[[dict[str, Tensor], str], Any], message: str, folder: Path
) -> None:
    key = first_weight(folder)
    change_tensors(folder, lambda tensors: change(tensors, key))
    again = r".* It was packed by masksurgery .*: pack the converted model again, or use that version\."
    fails(folder, WEIGHTS, "the keys are not those of the packed model Small. " + message.format(key=key) + again)


def test_weights_of_other_channels(folder: Path) -> None:
    """Of the right names and shapes, as another version of pack may have cut them."""
    _, dense = packed_small(dense=True)
    assert dense.digest != packed_small()[1].digest
    change_config(folder, lambda config: config["packed"].update(digest=dense.digest))
    fails(folder, WEIGHTS, r"its weights belong to other channels than are left now\. It was packed by")


def test_integers_where_there_were_weights(folder: Path) -> None:
    key = first_weight(folder)
    change_tensors(folder, lambda tensors: tensors.update({key: tensors[key].long()}))
    fails(folder, WEIGHTS, rf"'{key}' is torch\.int64, not torch\.float32 as in the model")


def test_masks_that_are_missing_or_of_another_size(folder: Path) -> None:
    key = mask_key("conv_mask", True)
    assert key == "masks.conv_mask"
    change_tensors(folder, lambda tensors: tensors.update({key: tensors[key][:, :-1].clone()}))
    fails(folder, WEIGHTS, rf"'{key}' is bool of the shape \(3, 11\), not bool of the shape \(3, 12\)")
    change_tensors(folder, lambda tensors: tensors.pop(key))
    fails(folder, WEIGHTS, f"'{key}' is missing, the masks after 'conv'")


def test_a_base_model_of_another_architecture(folder: Path) -> None:
    fails(folder, CONFIG, r"'sites\[0\]\.layer' names 'conv', which Tied does not have", base=Tied())
    wide = Small()
    wide.fc = nn.Linear(12, 6)
    fails(folder, WEIGHTS, r"the keys are not those of the packed model Small\. of another shape: ", base=wide)


def test_it_says_that_it_is_packed_where_it_is_not(folder: Path, tmp_path: Path) -> None:
    change_config(folder, lambda config: config.pop("packed"))
    fails(folder, WEIGHTS, r"'conv_mask\.masks' is missing")
    converted = masksurgery.save(small()[1], tmp_path / "converted")
    change_config(converted, lambda config: config.update(packed={"layout": "unrolled", "dense": False, "digest": ""}))
    fails(converted, WEIGHTS, r"'masks\.conv_mask' is missing")


@pytest.mark.slow
def test_what_needs_the_base_model_or_the_masks(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"saved/config\.json: is of a packed model, .* Read the folder of the"):
        load_base(folder, base=Small())
    packed = pack(masksurgery.load(make_converted(tmp_path / "converted")), "unrolled")
    masksurgery.save(packed, tmp_path / "packed")
    for place in (packed, tmp_path / "packed"):
        with pytest.raises(ConfigError, match=r"finetune: this ResNet is packed.* the converted model that it was"):
            masksurgery.finetune(place, DataConfig(str(tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- predict and evaluate --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same ensemble of three classes twice, and images."""
    folder = tmp_path_factory.mktemp("packed")
    make_images(folder / "images", train=2, val=5)
    model = masksurgery.load(make_converted(folder / "start"))
    randomise(model, 0)
    model.temperature, reader = 1.5, Reader(model)
    with torch.no_grad():
        entropy = model(torch.stack([reader(file) for file in find_images([folder / "images" / "val"])])).entropy
    model.threshold = Threshold("entropy", entropy.sort().values[7:9].mean().item())
    masksurgery.save(model, folder / "converted")
    masksurgery.save(pack(model, "unrolled"), folder / "packed")
    return folder


def numbers(value: Any) -> list[float]:
    """All numbers in a value of JSON, in their order."""
    if isinstance(value, dict):
        return [x for part in value.values() for x in numbers(part)]
    if isinstance(value, list):
        return [x for part in value for x in numbers(part)]
    return [float(value)] if isinstance(value, (int, float)) else []


@pytest.mark.slow
def test_predict_writes_the_same_rows(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for name in ("converted", "packed"):
        with pytest.raises(SystemExit) as stop:
            app(["predict", str(place / name), str(place / "images" / "val"), "--json", str(tmp_path / name)])
        assert stop.value.code in (0, None), capsys.readouterr()
        found[name] = json.loads((tmp_path / name).read_text())
    assert len(found["packed"]) == 15 and len({row["unsure"] for row in found["packed"]}) == 2
    for ours, theirs in zip(found["packed"], found["converted"], strict=True):
        assert (ours["path"], ours["unsure"]) == (theirs["path"], theirs["unsure"])
        assert [entry["label"] for entry in ours["entries"]] == [entry["label"] for entry in theirs["entries"]]
        assert numbers(ours) == pytest.approx(numbers(theirs), rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_evaluate_finds_the_same_figures(place: Path) -> None:
    data, config = DataConfig(str(place / "images")), EvaluateConfig(workers=0, gallery=2)
    converted, packed = masksurgery.evaluate([place / "converted", place / "packed"], data, config=config).models
    assert (packed.kind, packed.n, packed.temperature) == ("converted", 4, 1.5)
    assert packed.threshold is not None and packed.threshold == converted.threshold
    assert packed.figures == pytest.approx(converted.figures, rel=1e-3, abs=1e-4)
    assert packed.members == pytest.approx(converted.members)


@pytest.mark.slow
def test_evaluate_fits_into_a_packed_folder(place: Path, tmp_path: Path) -> None:
    masksurgery.save(masksurgery.load(place / "packed"), tmp_path / "fitted")
    data = ["--data", str(place / "images"), "--workers", "0", "--coverage", "0.5"]
    with pytest.raises(SystemExit) as stop:
        app(["evaluate", str(tmp_path / "fitted"), *data])
    assert stop.value.code in (0, None)
    model = masksurgery.load(tmp_path / "fitted")
    before = masksurgery.load(place / "packed").threshold
    assert isinstance(model, PackedModel) and model.threshold not in (None, before)


@pytest.mark.slow
def test_a_packed_model_in_memory_is_evaluated_and_not_changed(place: Path) -> None:
    model = masksurgery.load(place / "packed")
    model.output = "logits"
    subject = open_subject(model)
    assert (subject.kind, subject.name, subject.folder) == ("converted", "test_resnet", None)
    assert subject.ensemble is not model and model.output == "logits"
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(subject.model(x).logits, model(x))

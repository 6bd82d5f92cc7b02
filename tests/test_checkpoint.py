"""Saved folders: what comes back is what was saved, in another process, from the hub, and from earlier releases."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import masksurgery
from masksurgery import CheckpointError, ConfigError
from masksurgery.checkpoint import CONFIG, WEIGHTS, save_calibration
from masksurgery.factory import create_base
from masksurgery.model import ConvertedModel
from masksurgery.scores import Threshold
from nets import NETS, randomise

GOLDEN = Path(__file__).parent / "golden"

SHOW = """
import sys, torch, masksurgery
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
folder, inputs, out = sys.argv[1:]
found = {}
for name, x in load_file(inputs).items():
    with torch.no_grad():
        prediction = masksurgery.load(f"{folder}/{name}")(x)
    found |= {f"{name}.{field}": value.contiguous() for field, value in prediction._asdict().items()}
save_file(found, out)
"""

FACTORY = """
import torch
from torch import nn

def net(width):
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
    model.example_inputs = (torch.zeros(1, 4),)
    return model
"""


class Small(nn.Module):
    """A convolution, BatchNorm (whose counter is an integer), a non-persistent buffer and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)
        self.register_buffer("gain", torch.linspace(0.5, 1.5, 12), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).relu().mean((2, 3))
        return self.fc(x * self.gain)


class Tied(nn.Module):
    """Two layers of one weight; two outputs by name."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(8, 8), nn.Linear(8, 8)
        if tied:
            self.decode.weight = self.encode.weight
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor, shift: Tensor | None = None, *, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = self.decode(self.encode(x).relu()).relu() * scale
        return {"logits": self.out(hidden if shift is None else hidden + shift), "hidden": hidden}


def small(**kwargs: Any) -> tuple[Small, ConvertedModel]:
    base = randomise(Small().eval(), 3)
    return base, masksurgery.convert(base, n=3, example_inputs=(torch.zeros(1, 3, 8, 8),), **kwargs)


def predict(model: nn.Module, *args: Any, **kwargs: Any) -> list[Tensor]:
    with torch.no_grad():
        return torch.utils._pytree.tree_leaves(model(*args, **kwargs))


def assert_equal(one: ConvertedModel, other: ConvertedModel, *args: Any, **kwargs: Any) -> None:
    """The same tensors bit for bit, the same record, the same predictions."""
    before, after = one.state_dict(), other.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    assert one.surgery == other.surgery
    for x, y in zip(predict(one.eval(), *args, **kwargs), predict(other, *args, **kwargs), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


@pytest.mark.slow
def test_folders_predict_the_same_in_another_process(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models, inputs = {}, {}
    for name in ("test_resnet", "test_vit", "test_efficientnet"):
        models[name] = masksurgery.convert(randomise(timm.create_model(name, num_classes=7), 0).eval(), n=3, seed=5)
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
        assert_equal(model, masksurgery.load(tmp_path / "new" / name), inputs[name])
    assert there == {}


def test_settings_come_back(tmp_path: Path) -> None:
    base, model = small(
        seed=9, scale=1.5, where="head", task="multilabel", train_mode="repeat", rescale=False, after=[nn.Linear]
    )
    model.output = "mean"
    loaded = masksurgery.load(masksurgery.save(model, tmp_path), base=base)
    assert loaded.settings == model.settings
    assert (loaded.output, loaded.training, loaded.members_module.train_mode) == ("mean", False, "repeat")
    assert loaded.inputs == model.inputs and loaded.recipe is None
    assert_equal(model, loaded, torch.randn(4, 3, 8, 8))


def test_a_model_of_ones_own_needs_its_base_and_leaves_it_alone(tmp_path: Path) -> None:
    _, model = small()
    with torch.no_grad():
        model.bn.num_batches_tracked.fill_(2**40 + 1)
    masksurgery.save(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: 'base' is null.*Small.*Pass base="):
        masksurgery.load(tmp_path)
    other = Small()
    before = copy.deepcopy(other.state_dict())
    assert_equal(model, masksurgery.load(tmp_path, base=other), torch.randn(2, 3, 8, 8))
    assert other.training and all(torch.equal(x, before[name]) for name, x in other.state_dict().items())
    assert "gain" not in load_file(tmp_path / WEIGHTS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    base = randomise(Small().eval(), 3).to(dtype)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    model = masksurgery.convert(base, example_inputs=(x,))
    loaded = masksurgery.load(masksurgery.save(model, tmp_path), base=Small())
    assert loaded.conv.weight.dtype == loaded.gain.dtype == dtype
    assert_equal(model, loaded, x)


def test_dtypes_may_be_mixed(tmp_path: Path) -> None:
    _, model = small()
    model.half()
    model.bn.float()
    loaded = masksurgery.load(masksurgery.save(model, tmp_path), base=Small())
    dtypes = {name: x.dtype for name, x in model.state_dict().items()}
    assert {name: x.dtype for name, x in loaded.state_dict().items()} == dtypes
    assert (dtypes["conv.weight"], dtypes["bn.weight"]) == (torch.float16, torch.float32)


def test_tied_weights_are_written_once_and_stay_tied(tmp_path: Path) -> None:
    base = randomise(Tied().eval(), 1)
    model = masksurgery.convert(base, example_inputs=(torch.zeros(2, 8),))
    masksurgery.save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["aliases"] == {"decode.weight": "encode.weight"}
    assert "decode.weight" not in load_file(tmp_path / WEIGHTS)
    loaded = masksurgery.load(tmp_path, base=Tied())
    assert loaded.decode.weight is loaded.encode.weight
    assert_equal(model, loaded, torch.randn(3, 8))
    with pytest.raises(
        CheckpointError, match=r"config\.json: decode\.weight, encode\.weight are one tied parameter in 'ali"
    ):
        masksurgery.load(tmp_path, base=Tied(tied=False))


def test_inputs_by_position_and_by_keyword_come_back(tmp_path: Path) -> None:
    base = randomise(Tied().eval(), 1)
    x, shift = torch.randn(3, 8), torch.randn(3, 8)
    for i, inputs in enumerate([(x, shift), {"x": x, "shift": shift, "scale": 0.5}, {"x": x, "scale": 2.0}]):
        model = masksurgery.convert(base, example_inputs=inputs)
        loaded = masksurgery.load(masksurgery.save(model, tmp_path / str(i)), base=Tied())
        given = inputs if isinstance(inputs, dict) else dict(zip(("x", "shift"), inputs, strict=True))
        assert_equal(model, loaded, **{name: value for name, value in given.items() if isinstance(value, Tensor)})
    assert type(loaded(x)) is dict


def test_tensors_that_share_memory_or_are_not_contiguous_are_written(tmp_path: Path) -> None:
    class Views(Small):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(10)
            self.register_buffer("front", whole[:5])
            self.register_buffer("back", whole[5:])
            self.conv.weight = nn.Parameter(torch.randn(12, 3, 3, 3).to(memory_format=torch.channels_last))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.front - self.back

    base = Views().eval()
    model = masksurgery.convert(base, example_inputs=(torch.zeros(1, 3, 8, 8),))
    loaded = masksurgery.load(masksurgery.save(model, tmp_path), base=Views())
    assert_equal(model, loaded, torch.randn(2, 3, 8, 8))


def test_the_recorded_sites_are_used_and_not_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = small(include=["conv"])
    masksurgery.save(model, tmp_path)
    module = sys.modules["masksurgery.convert"]  # `masksurgery.convert` is the function
    monkeypatch.setattr(module, "find_sites", lambda *args: pytest.fail("the rule was asked"))
    loaded = masksurgery.load(tmp_path, base=base)
    assert [site.layer for site in loaded.surgery.sites] == ["conv"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kwargs", "recorded"),
    [
        ("test_resnet", {"num_classes": 3, "in_chans": 1, "drop_rate": 0.2}, True),
        ("test_vit", {"img_size": 64, "drop_path_rate": 0.1, "num_classes": 4}, True),
        ("test_resnet", {"act_layer": "silu"}, False),
    ],
)
def test_a_timm_model_is_recorded_only_if_its_recipe_gives_it_again(
    name: str, kwargs: dict[str, Any], recorded: bool, tmp_path: Path
) -> None:
    base = timm.create_model(name, **kwargs).eval()
    model = masksurgery.convert(base)
    masksurgery.save(model, tmp_path)
    base_record = json.loads((tmp_path / CONFIG).read_text())["base"]
    assert (base_record is not None) is recorded
    loaded = masksurgery.load(tmp_path, base=None if recorded else base)
    assert_equal(model, loaded, torch.randn(2, *model.inputs["args"][0]["shape"][1:]))
    assert loaded.pretrained_cfg == model.pretrained_cfg and loaded.num_classes == model.num_classes


def test_a_model_that_was_changed_by_hand_is_not_taken_for_timms(tmp_path: Path) -> None:
    base = timm.create_model("test_resnet").eval()
    base.layer1[0].act1 = nn.ReLU(inplace=False)
    masksurgery.save(masksurgery.convert(base), tmp_path)
    record = json.loads((tmp_path / CONFIG).read_text())
    assert record["base"] is None and "the caller supplies" in record["base_note"]


def test_a_loaded_model_trains_and_is_saved_again(tmp_path: Path) -> None:
    model = masksurgery.load(masksurgery.save(masksurgery.convert(timm.create_model("test_resnet")), tmp_path)).train()
    nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.arange(4)).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert_equal(model, masksurgery.load(masksurgery.save(model, tmp_path)), torch.randn(2, 3, 64, 64))


def test_a_factory_is_not_run_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("nets_of_mine.py").write_text(FACTORY)
    base, recipe, inputs = create_base("nets_of_mine:net", model_kwargs={"width": 6})
    model = masksurgery.convert(base, example_inputs=inputs)
    model.recipe = recipe.to_dict()
    masksurgery.save(model, "saved")
    monkeypatch.delitem(sys.modules, "nets_of_mine")
    with pytest.raises(CheckpointError, match=r"'nets_of_mine:net', which is not run unasked.*base=.*trust=True"):
        masksurgery.load("saved")
    assert "nets_of_mine" not in sys.modules
    assert_equal(model, masksurgery.load("saved", trust=True), torch.randn(2, 4))
    assert_equal(model, masksurgery.load("saved", base=base), torch.randn(2, 4))


@pytest.mark.parametrize("place", ["hf-hub:user/repo", "user/repo@main"])
def test_the_hub_gives_the_two_files(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, model = small()
    masksurgery.save(model, tmp_path / "saved")
    asked: list[Any] = []

    def snapshot_download(repository: str, **kwargs: Any) -> str:
        asked.append((repository, kwargs))
        return str(tmp_path / "saved")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_equal(model, masksurgery.load(place, base=base), torch.randn(2, 3, 8, 8))
    revision = "main" if "@" in place else None
    assert asked == [("user/repo", {"revision": revision, "allow_patterns": [CONFIG, WEIGHTS]})]


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"user/repo: there is no such folder.*\(ConnectionError: no route\)"):
        masksurgery.load("user/repo")


# --- temperature and threshold ---------------------------------------------------------------------------------------

SHOW_FITTED = """
import sys, torch, masksurgery
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
folder, inputs, out = sys.argv[1:]
model = masksurgery.load(folder)
with torch.no_grad():
    p = model(load_file(inputs)["x"])
save_file({"mean": p.mean, "unsure": model.unsure(p)}, out)
print(model.temperature, model.threshold)
"""


@pytest.mark.slow
def test_a_fitted_model_is_the_same_in_another_process(tmp_path: Path) -> None:
    model = masksurgery.convert(randomise(timm.create_model("test_resnet", num_classes=7), 0).eval(), n=3)
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain = model.eval()(x)
    model.temperature = 2.5
    model.threshold = Threshold("entropy", model(x).entropy.median().item())
    save_file({"x": x}, tmp_path / "x.safetensors")
    masksurgery.save(model, tmp_path / "saved")
    command = [sys.executable, "-c", SHOW_FITTED, tmp_path / "saved", tmp_path / "x.safetensors", tmp_path / "out"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"2.5 {model.threshold}\n"
    found, p = load_file(tmp_path / "out"), model(x)
    assert torch.equal(found["mean"], p.mean) and not torch.equal(p.mean, plain.mean)
    assert torch.equal(found["unsure"], model.unsure(p)) and 0 < found["unsure"].sum() < 8


def test_nothing_fitted_is_written_as_null(tmp_path: Path) -> None:
    base, model = small()
    model.temperature = 1
    masksurgery.save(model, tmp_path)
    record = json.loads((tmp_path / CONFIG).read_text())
    assert record["temperature"] is None and record["threshold"] is None
    assert masksurgery.load(tmp_path, base=base).temperature == 1.0


def test_what_was_fitted_is_written_into_a_folder_and_nothing_else_changes(tmp_path: Path) -> None:
    base, model = small()
    masksurgery.save(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for temperature, threshold in [
        (2.5, Threshold("mutual_information", 0.25)),
        (np.float32(0.5), None),
        (None, Threshold("max_probability", 0.75)),
        (1.0, None),
    ]:
        save_calibration(tmp_path, temperature=temperature, threshold=threshold)
        assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}
        assert (tmp_path / WEIGHTS).read_bytes() == before[WEIGHTS]
        record, old = json.loads((tmp_path / CONFIG).read_text()), json.loads(before[CONFIG])
        assert record["threshold"] == (None if threshold is None else asdict(threshold))
        assert record["temperature"] == (None if temperature in (None, 1) else temperature)
        assert {**record, "temperature": None, "threshold": None} == old and record["id"] == old["id"]
        loaded = masksurgery.load(tmp_path, base=base)
        assert (loaded.temperature, loaded.threshold) == (temperature or 1.0, threshold)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["net", "vit"])
def test_a_folder_of_an_earlier_release_takes_what_was_fitted(name: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "v1" / name, tmp_path / name)
    save_calibration(tmp_path / name, temperature=4.0, threshold=None)
    model = masksurgery.load(tmp_path / name, base=GoldenNet() if name == "net" else None)
    expected = load_file(tmp_path / name / "expected.safetensors")
    torch.testing.assert_close(predict(model, expected["x"])[-1], expected["members"] / 4, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_fitted_to_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = masksurgery.save(small(task="regression")[1], tmp_path / "saved")
    before = (folder / CONFIG).read_bytes()

    def refuse(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match=r"hf-hub:a/b is on the hub, .* Save a copy first: masksurgery\.save\("):
        save_calibration("hf-hub:a/b", temperature=2.0, threshold=None)
    with pytest.raises(ConfigError, match="temperature=0 is not a finite number above 0"):
        save_calibration(folder, temperature=0, threshold=None)
    with pytest.raises(ConfigError, match="score='entropy' is none of a regression, which has 'variance'"):
        save_calibration(folder, temperature=None, threshold=Threshold("entropy", 0.5))
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json: there is no such file, so this is no folder"):
        save_calibration(tmp_path / "nowhere", temperature=2.0, threshold=None)
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be written .*What was there before is as it was"):
        save_calibration(folder, temperature=2.0, threshold=None)
    assert (folder / CONFIG).read_bytes() == before and len(list(folder.iterdir())) == 2


# --- folders of released format versions -----------------------------------------------------------------------------


class GoldenNet(nn.Module):
    """Never change it: tests/golden/v1/net was saved with it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, groups=8)
        self.conv3, self.fc = nn.Conv2d(8, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        x = self.conv2(self.bn(self.conv1(x)).relu()).relu()
        x = self.conv3(x).relu().mean((2, 3))
        return OrderedDict(out=self.fc(x))


GOLDEN_VIT = {"img_size": 32, "depth": 1, "embed_dim": 8, "num_heads": 2, "num_classes": 3}


def make_golden(folder: Path) -> None:
    """Write the folders of the present format version; run once per version, by hand."""
    for name, base, inputs in [
        ("net", GoldenNet(), (torch.zeros(1, 3, 12, 12),)),
        ("vit", timm.create_model("test_vit", **GOLDEN_VIT), None),
    ]:
        model = masksurgery.convert(randomise(base.eval(), 11), n=3, scale=1.7, seed=2, example_inputs=inputs)
        if name == "vit":
            model.recipe = {"source": "timm", "name": "test_vit.r160_in1k", "kwargs": GOLDEN_VIT}
        masksurgery.save(model, folder / name)
        size = 12 if name == "net" else 32
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        mean, members = predict(model, x)[0], predict(model, x)[-1]
        save_file({"x": x, "mean": mean, "members": members.contiguous()}, folder / name / "expected.safetensors")


@pytest.mark.parametrize("version", sorted(path.name for path in GOLDEN.iterdir()))
@pytest.mark.parametrize("name", ["net", "vit"])
def test_a_folder_of_an_earlier_release_predicts_as_it_did(version: str, name: str) -> None:
    folder = GOLDEN / version / name
    model = masksurgery.load(folder, base=GoldenNet() if name == "net" else None)
    expected = load_file(folder / "expected.safetensors")
    leaves = predict(model, expected["x"])
    torch.testing.assert_close(leaves[0], expected["mean"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaves[-1], expected["members"], rtol=1e-5, atol=1e-5)


def test_both_files_can_be_read_by_the_same_people(tmp_path: Path) -> None:
    net = NETS["conv_bn_relu"]
    model = masksurgery.convert(net.build().eval(), example_inputs=net.inputs(2))
    folder = masksurgery.save(model, tmp_path / "saved")
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1
    assert modes.pop() & 0o400

"""masksurgery.finetune on every task, what it leaves behind, and what it refuses."""

from __future__ import annotations

import importlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

import masksurgery
from finetuning import NAMES, make_converted, make_images, metrics_of, tensors_of
from masksurgery import Augmentation, ConfigError, DataConfig, DataError, FinetuneConfig
from masksurgery.cli import app
from masksurgery.scores import Threshold
from pictures import write_shards
from training import Small

module = importlib.import_module("masksurgery.finetune")  # the package has the function under this name

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 8, "workers": 0}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), train=8, val=4)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_converted(tmp_path_factory.mktemp("converted") / "dir")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    """Other tests have left Accelerate's state in this process."""
    AcceleratorState._reset_state()


def finetune(model: Any, data: Any, output: Path, **settings: Any) -> Path:
    more = {key: settings.pop(key) for key in ("base_only", "resume", "force", "augmentation") if key in settings}
    data = data if isinstance(data, DataConfig) else DataConfig(str(data))
    return masksurgery.finetune(model, data, output, config=FinetuneConfig(**{**QUICK, **settings}), **more)


def run_cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        app([str(argument) for argument in arguments], prog_name="masksurgery")
    return int(end.value.code or 0)


# --- what is left ----------------------------------------------------------------------------------------------------


def test_the_folder_is_a_model_that_knows_its_classes(
    images: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (converted / "model.safetensors").read_bytes()
    folder = finetune(converted, images, tmp_path / "run", lr=0.003)
    assert folder == tmp_path / "run"
    assert (converted / "model.safetensors").read_bytes() == before
    model = masksurgery.load(folder)
    assert model.pretrained_cfg["label_names"] == NAMES
    assert masksurgery.load(folder / "last").pretrained_cfg["num_classes"] == 3
    first = load_file(converted / "model.safetensors")
    assert not any(torch.equal(x, first[name]) for name, x in model.named_parameters())
    assert run_cli("predict", folder, images / "val" / "dog" / "000.png") == 0
    assert set(NAMES) <= set(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_model_object_is_not_changed(images: Path, converted: Path, tmp_path: Path) -> None:
    model = masksurgery.load(converted)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    finetune(model, images, tmp_path / "run", epochs=1)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model.members_module.fixed is None and "label_names" not in (model.pretrained_cfg or {})
    other = finetune(converted, images, tmp_path / "other", epochs=1)
    assert tensors_of(tmp_path / "run") == tensors_of(other)


@pytest.mark.slow
def test_what_was_fitted_to_the_weights_before_is_forgotten(
    images: Path, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, threshold = masksurgery.load(converted), Threshold("entropy", 0.5)
    model.temperature, model.threshold = 3.0, threshold
    with caplog.at_level(logging.WARNING, "masksurgery"):
        finetune(model, images, tmp_path / "run", epochs=1)
    told = [record.getMessage() for record in caplog.records if "fitted" in record.getMessage()]
    assert told == [
        "the fitted temperature and threshold are of the weights before; fit them again with masksurgery evaluate"
    ]
    assert (model.temperature, model.threshold) == (3.0, threshold)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "masksurgery"):
        plain = finetune(converted, images, tmp_path / "plain", epochs=1)
    assert "fitted" not in caplog.text
    assert tensors_of(tmp_path / "run") == tensors_of(plain)  # config.json too, whose temperature is null
    assert metrics_of(tmp_path / "run")[-1]["val_nll"] == metrics_of(plain)[-1]["val_nll"]


@pytest.mark.slow
def test_statistics_are_estimated_under_the_masks_first(images: Path, converted: Path, tmp_path: Path) -> None:
    still = {"epochs": 1, "lr": 1e-12, "opt": "sgd", "weight_decay": 0.0}
    runs = {
        flag: finetune(converted, images, tmp_path / str(flag), recalibrate=flag, **still) for flag in (True, False)
    }
    first = load_file(converted / "model.safetensors")
    shifts = {
        flag: (load_file(folder / "model.safetensors")["bn1.running_mean"] - first["bn1.running_mean"]).norm()
        for flag, folder in runs.items()
    }
    assert shifts[True] > 2 * shifts[False] > 0


@pytest.mark.slow
def test_the_base_model_is_trained_by_the_same_code(
    images: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finetune(converted, images, tmp_path / "run", base_only=True, lr=0.003)
    weights = folder / "model.safetensors"
    base = timm.create_model("test_resnet", num_classes=3, checkpoint_path=weights)
    assert set(base.state_dict()) == set(load_file(weights))
    rows = metrics_of(folder)
    best = min(float(row["val_nll"]) for row in rows if row["val_nll"])
    assert score(base, images) == pytest.approx(best, rel=1e-4)
    if not hasattr(timm.models._hub, "load_model_config_from_path"):
        return  # this timm reads no folders
    again = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert again.num_classes == 3 and again.pretrained_cfg["label_names"] == list(NAMES)
    assert all(torch.equal(x, base.state_dict()[name]) for name, x in again.state_dict().items())
    assert run_cli("convert", f"local-dir:{folder}", "--img-size", 32, "-o", tmp_path / "again") == 0


def score(base: nn.Module, images: Path) -> float:
    """The negative log-likelihood of a base model, by timm alone."""
    config = timm.data.resolve_data_config({"input_size": (3, 32, 32)}, pretrained_cfg=base.pretrained_cfg)
    transform = timm.data.create_transform(**config)
    paths = sorted((images / "val").rglob("*.png"))
    x = torch.stack([transform(Image.open(path)) for path in paths])
    y = torch.tensor([NAMES.index(path.parent.name) for path in paths])
    with torch.no_grad():
        return nn.functional.cross_entropy(base.eval()(x), y).item()


@pytest.mark.slow
def test_freeze_trains_the_output_layer_only(images: Path, converted: Path, tmp_path: Path) -> None:
    for recalibrate in (True, False):
        folder = finetune(converted, images, tmp_path / str(recalibrate), freeze=True, recalibrate=recalibrate)
        before, after = load_file(converted / "model.safetensors"), load_file(folder / "model.safetensors")
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name for name in changed if "running" not in name and "num_batches" not in name} == {
            "fc.weight",
            "fc.bias",
        }
        assert (len(changed) > 2) == recalibrate  # masks change what a BatchNorm sees, once


@pytest.mark.slow
def test_trackers_get_the_figures(images: Path, converted: Path, tmp_path: Path) -> None:
    folder = finetune(converted, images, tmp_path / "run", log_with=("tensorboard",), log_every=1)
    seen = EventAccumulator(str(folder / "masksurgery")).Reload()
    rows = metrics_of(folder)
    assert [event.value for event in seen.Scalars("val_nll")] == pytest.approx(
        [float(row["val_nll"]) for row in rows if row["val_nll"]]
    )
    assert [event.step for event in seen.Scalars("lr")] == [int(row["step"]) for row in rows]


@pytest.mark.slow
def test_mixed_precision_trains_and_evaluates_in_the_right_graph(images: Path, converted: Path, tmp_path: Path) -> None:
    for precision in ("no", "bf16", "no"):  # Accelerate's state does not stay with the process
        folder = finetune(converted, images, tmp_path / precision, mixed_precision=precision, force=True)
    model = masksurgery.load(folder)
    assert all(x.dtype == torch.float32 for x in model.parameters())
    plain, half = (
        [float(row["train_loss"]) for row in metrics_of(tmp_path / precision)] for precision in ("no", "bf16")
    )
    assert plain != half and plain == pytest.approx(half, rel=0.1)


@pytest.mark.slow
def test_broken_images_are_left_out_and_named(
    images: Path, converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(images, tmp_path / "images")
    (tmp_path / "images" / "train" / "cat" / "003.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 image is broken:\n.*cat/003\.png"):
        finetune(converted, tmp_path / "images", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with caplog.at_level(logging.WARNING, "masksurgery"):
        finetune(converted, DataConfig(str(tmp_path / "images"), max_bad=1), tmp_path / "run", epochs=1)
    assert "left out: " in caplog.text and "003.png" in caplog.text
    assert json.loads((tmp_path / "run" / "run.json").read_text())["found.train"] == 23


@pytest.mark.slow
def test_broken_samples_of_shards_are_named_in_training_and_in_validation(
    converted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path / "shards", lengths=(10, 9), val=7, bad=(3, 20))  # one of each part
    data = DataConfig(f"wds/{tmp_path / 'shards'}", max_bad=1)
    with caplog.at_level(logging.WARNING, "masksurgery"):
        finetune(converted, data, tmp_path / "run")
    named = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert any("0003" in line for line in named) and any("0020" in line for line in named)


# --- tasks -----------------------------------------------------------------------------------------------------------


class TwoHeads(nn.Module):
    """A mean and a log-variance."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Small()
        self.mean, self.log_variance = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        return self.mean(x), self.log_variance(x)


class Pixels(nn.Module):
    """Classes of pixels, with an auxiliary output, in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.head, self.aux = nn.Conv2d(16, 2, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"out": self.head(x), "aux": self.aux(x)}


def make_table(images: Path, file: Path, columns: str, row: Any) -> Path:
    paths = sorted(images.rglob("*.png"))
    lines = [f"{path},{row(path)},{'val' if '/val/' in str(path) else 'train'}" for path in paths]
    file.write_text("\n".join([f"file,{columns},split", *lines]))
    return file


def convert(base: nn.Module, **settings: Any) -> masksurgery.ConvertedModel:
    return masksurgery.convert(base, example_inputs=(torch.zeros(1, 3, 32, 32),), **settings)


def last_val(folder: Path) -> dict[str, float]:
    return {name: float(x) for name, x in metrics_of(folder)[-1].items() if name.startswith("val_") and x}


@pytest.mark.slow
def test_regression(images: Path, tmp_path: Path) -> None:
    table = make_table(
        images, tmp_path / "t.csv", "red,blue", lambda path: "1,0" if path.parent.name == "cat" else "0,1"
    )
    base = timm.create_model("test_resnet", num_classes=2)
    folder = finetune(convert(base, task="regression"), table, tmp_path / "run", epochs=4, lr=0.003)
    scores = [float(row["val_mse"]) for row in metrics_of(folder) if row["val_mse"]]
    assert len(scores) == 4 and set(last_val(folder)) == {"val_mse"}
    model = masksurgery.load(folder, base=base)
    assert model(torch.zeros(2, 3, 32, 32)).mean.shape == (2, 2)


def test_a_mean_and_a_log_variance(images: Path, tmp_path: Path) -> None:
    table = make_table(images, tmp_path / "t.csv", "red", lambda path: int(path.parent.name == "cat"))
    model = convert(TwoHeads(), task="regression", heteroscedastic=True)
    folder = finetune(model, table, tmp_path / "run")
    assert set(last_val(folder)) == {"val_nll", "val_mse"}


@pytest.mark.slow
def test_several_labels(images: Path, tmp_path: Path) -> None:
    def labels(path: Path) -> str:
        return ",".join(str(int(path.parent.name == name)) for name in NAMES)

    table = make_table(images, tmp_path / "t.csv", ",".join(NAMES), labels)
    base = timm.create_model("test_resnet", num_classes=3)
    folder = finetune(convert(base, task="multilabel"), table, tmp_path / "run")
    assert set(last_val(folder)) == {"val_nll", "val_accuracy"}
    assert masksurgery.load(folder, base=base).pretrained_cfg["label_names"] == NAMES


@pytest.mark.slow
def test_segmentation(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 4)):
        for kind in ("images", "masks"):
            (tmp_path / kind / part).mkdir(parents=True)
        for k in range(count):
            mask = np.zeros((32, 32), np.uint8)
            mask[8:24, 8 + k % 8 : 24] = 1
            pixels = (mask[..., None] * 100 + draws.normal(80, 20, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            mask[:2] = 255  # belongs to no class
            Image.fromarray(pixels).save(tmp_path / "images" / part / f"{k}.png")
            Image.fromarray(mask).save(tmp_path / "masks" / part / f"{k}.png")
    data = DataConfig(str(tmp_path / "images"), masks=str(tmp_path / "masks"))
    for refused in ({"mixup": 0.2}, {"loss": "bce"}):
        with pytest.raises(ConfigError, match="masks of segmentation go with neither mixup, cutmix nor loss='bce'"):
            finetune(convert(Pixels()), data, tmp_path / "run", **refused)
    assert not (tmp_path / "run").exists()
    folder = finetune(convert(Pixels()), data, tmp_path / "run", epochs=6, lr=0.01)
    assert last_val(folder)["val_accuracy"] > 0.9
    assert last_val(folder)["val_nll"] < 0.4


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 9, "accumulate": 2}, r"batch_size=9 cannot be divided .* Pass a multiple of 2"),
        ({"batch_size": 9, "mixup": 0.2}, r"in pairs for mixup. Pass a multiple of 2"),
        ({"batch_size": 64}, r"24 training images are less than one batch"),
        ({"opt": "adamw2"}, r"opt='adamw2' is no optimiser of timm\. Close: .*adamw"),
        ({"opt": "adahessian"}, r"opt='adahessian' and sched='cosine' cannot be used: .*require grad"),
        ({"opt": "sgd", "momentum": 0.0}, r"opt='sgd' and sched='cosine' cannot be used: .*Nesterov"),
        ({"loss": "mse"}, r"loss='mse' does not suit task='classification'\. Pass 'cross-entropy' or 'bce'"),
        ({"log_with": ("pencil",)}, r"log_with='pencil' is no tracker of Accelerate\. Pass some of .*tensorboard"),
        ({"log_with": ("wandb",)}, r"log_with='wandb' needs a package that is not installed: pip install wandb"),
    ],
)
def test_settings_that_do_not_go_together(
    images: Path, converted: Path, tmp_path: Path, settings: dict[str, Any], message: str, monkeypatch: Any
) -> None:
    if "wandb" in settings.get("log_with", ()):
        monkeypatch.setattr(module, "find_spec", lambda name: None if name == "wandb" else True)
    with pytest.raises((ConfigError, DataError), match=message):
        finetune(converted, images, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, r"epochs=0 is not a whole number from 1 on"),
        ({"batch_size": 2.5}, r"batch_size=2\.5 is not a whole number from 1 on"),
        ({"lr": 0.0}, r"lr=0\.0 is not a number above 0"),
        ({"lr": float("nan")}, r"lr=nan is not a number above 0"),
        ({"ema_decay": 1.0}, r"ema_decay=1\.0 is not a number from 0 to below 1"),
        ({"layer_decay": 1.5}, r"layer_decay=1\.5 is not a number above 0, at most 1"),
        ({"sched": "cosin"}, r"sched='cosin' is not one of 'cosine', 'tanh', 'step', 'poly', 'none'"),
        ({"mixed_precision": "fp8"}, r"mixed_precision='fp8' is not one of 'no', 'fp16', 'bf16'"),
        ({"warmup_epochs": 3, "epochs": 2}, r"warmup_epochs=3 is more than epochs=2"),
        ({"seed": 0.5}, r"seed=0\.5 is not a whole number from 0 on"),
        ({"sched": "none", "warmup_epochs": 1}, r"sched=\"none\" keeps the rate: it takes no warmup_epochs"),
        ({"clip_grad": -1.0}, r"clip_grad=-1\.0 is not a number from 0 on"),
        ({"workers": "many"}, r"workers='many' is not a whole number from 0 on"),
    ],
)
def test_values_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**settings)


@pytest.mark.slow
def test_a_model_with_another_number_of_classes(images: Path, tmp_path: Path) -> None:
    for classes in (2, 5):
        model = convert(timm.create_model("test_resnet", num_classes=classes))
        with pytest.raises(
            masksurgery.MasksurgeryError, match=rf"(?s)3 classes.*{classes}|{classes} outputs.* 3 classes"
        ):
            finetune(model, images, tmp_path / "run")
    table = make_table(images, tmp_path / "t.csv", "a,b", lambda path: "1,2")
    model = convert(timm.create_model("test_resnet", num_classes=1), task="regression")
    with pytest.raises(ConfigError, match=r"1 outputs, the data 2 targets for each image.*--num-classes 2"):
        finetune(model, table, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_folders_that_hold_something(images: Path, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file is a file\. Pass a folder"):
        finetune(converted, images, tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"full is not empty\. Pass another folder, or --force"):
        finetune(converted, images, tmp_path / "full")
    finetune(converted, images, tmp_path / "full", force=True, epochs=1)
    assert (tmp_path / "full" / "thesis.tex").exists()
    with pytest.raises(ConfigError, match=r"full holds a run\. Pass --resume"):
        finetune(converted, images, tmp_path / "full", epochs=1)


def test_force_leaves_what_is_not_of_a_run(images: Path, converted: Path, tmp_path: Path) -> None:
    for name in ("last/thesis.txt", "sub/.mine.tmp", ".notes.tmp"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    finetune(converted, images, tmp_path / "run", force=True, epochs=1)
    for name in ("last/thesis.txt", "sub/.mine.tmp", ".notes.tmp"):
        assert (tmp_path / "run" / name).read_text() == "mine"
    model = shutil.copytree(converted, tmp_path / "model")
    for output in (model, tmp_path / "sub" / ".." / "model"):
        with pytest.raises(ConfigError, match=r"is what the run reads from\. Pass another folder"):
            finetune(model, images, output, force=True)
    with pytest.raises(ConfigError, match=r"is what the run reads from"):
        finetune(model, images, images, force=True)
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_settings_model_and_data(
    images: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finetune(converted, images, tmp_path / "run", epochs=1)
    before = tensors_of(folder)
    with pytest.raises(ConfigError, match=r"begun with other settings: config\.epochs is 2, then 1\. A run goes on"):
        finetune(converted, images, folder, resume=True)
    with pytest.raises(ConfigError, match=r"augmentation\.hflip is 0\.1, then 0\.5"):
        finetune(converted, images, folder, resume=True, epochs=1, augmentation=Augmentation(hflip=0.1))
    with pytest.raises(ConfigError, match=r"data\.max_train is 10, then None; found\.train is 10, then 24"):
        finetune(converted, DataConfig(str(images), max_train=10), folder, resume=True, epochs=1)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        with pytest.raises(ConfigError, match=r"found\.mixed_precision is 'bf16', then 'no'"):
            finetune(converted, images, folder, resume=True, epochs=1)
    other = masksurgery.load(converted)
    with torch.no_grad():
        other.fc.bias[0] += 1
    with pytest.raises(ConfigError, match=r"model is '\w+', then '\w+'"):
        finetune(other, images, folder, resume=True, epochs=1)
    monkeypatch.chdir(images.parent)
    same = DataConfig(images.name, check=False, max_bad=3)  # by another path, and read otherwise
    finetune(converted, same, folder, resume=True, epochs=1, log_every=3, checkpoint_every=1)
    assert tensors_of(folder) == before
    (folder / "run.json").write_text("{")
    with pytest.raises(masksurgery.CheckpointError, match=r"run\.json: cannot be read .* Begin anew with --force"):
        finetune(converted, images, folder, resume=True, epochs=1)


def test_resume_without_a_run_begins_one(images: Path, converted: Path, tmp_path: Path) -> None:
    assert (finetune(converted, images, tmp_path / "run", resume=True, epochs=1) / "resume.pt").exists()


def test_base_only_needs_a_folder(images: Path, converted: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="base_only=True needs the folder of the converted model"):
        finetune(masksurgery.load(converted), images, tmp_path / "run", base_only=True)


def test_without_accelerate(images: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("masksurgery.processes.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'Fine-tuning needs accelerate, .*: pip install "masksurgery\[train\]"'):
        finetune(converted, images, tmp_path / "run")

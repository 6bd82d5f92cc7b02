"""Whole evaluations: figures against a plain loop over the same images, sets, fitting, and what is refused."""

import copy
import csv
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

import masksurgery
from finetuning import NAMES, make_converted, make_images, run
from masksurgery import ConfigError, DataConfig, EvaluateConfig, EvaluationError, FinetuneConfig, evaluate, finetune
from masksurgery.checkpoint import load_base, read_base, save_base
from masksurgery.images import preprocessing_of
from masksurgery.scores import image_scores

SMALL = EvaluateConfig(workers=0, gallery=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble and its base model, both fine-tuned a little, images of their classes, and images of none."""
    folder = tmp_path_factory.mktemp("evaluate")
    make_images(folder / "images", train=12, val=17)
    converted = make_converted(folder / "converted")
    data, config = DataConfig(str(folder / "images")), FinetuneConfig(epochs=3, batch_size=12, workers=0, lr=3e-3)
    finetune(converted, data, folder / "ensemble", config=config)
    finetune(converted, data, folder / "base", config=config, base_only=True)
    (folder / "unknown").mkdir()
    draws = np.random.default_rng(1)
    for k in range(13):
        pixels = draws.normal(110, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "unknown" / f"{k}.png")
    return folder


@pytest.fixture
def data(place: Path) -> DataConfig:
    return DataConfig(str(place / "images"))


def read(model: masksurgery.ConvertedModel, folder: Path) -> tuple[Tensor, Tensor]:
    """All images of a folder as the model takes them, and their classes (0 where they have none)."""
    transform, files = preprocessing_of(model).evaluation(), sorted(folder.rglob("*.png"))
    y = [NAMES.index(file.parent.name) if file.parent.name in NAMES else 0 for file in files]
    return torch.stack([transform(Image.open(file))[0] for file in files]), torch.tensor(y)


@pytest.mark.slow
def test_figures_are_those_of_a_plain_loop(place: Path, data: DataConfig) -> None:
    found = evaluate([place / "base", place / "ensemble"], data, config=SMALL)
    base, ensemble = found.models
    model = masksurgery.load(place / "ensemble")
    x, y = read(model, place / "images" / "val")
    with torch.no_grad():
        p, logits = model(x), read_base(place / "base")(x)
    assert (found.images, found.task, found.classes, found.fitted_on) == (51, "classification", NAMES, 0)
    assert (base.kind, base.n, ensemble.kind, ensemble.n) == ("base", 1, "converted", 4)
    assert ensemble.figures["nll"] == pytest.approx(F.cross_entropy(p.logits.double(), y).item(), rel=1e-6)
    assert ensemble.figures["accuracy"] == pytest.approx((p.mean.argmax(1) == y).double().mean().item())
    assert base.figures["nll"] == pytest.approx(F.cross_entropy(logits.double(), y).item(), rel=1e-6)
    right = (p.members.argmax(2) == y[:, None]).double().mean(0)
    assert ensemble.members == pytest.approx(right.tolist())
    assert {"ece", "adaptive_ece", "brier", "aurc", "agreement", "disagreement"} <= set(ensemble.figures)
    assert "agreement" not in base.figures


@pytest.mark.slow
def test_the_same_arguments_give_what_finetune_validates_with(place: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    make_images(flat, train=20, val=0)
    data = DataConfig(str(flat / "train"), val_fraction=0.3, seed=3)
    config = FinetuneConfig(epochs=1, batch_size=16, workers=0)
    tuned = finetune(place / "ensemble", data, tmp_path / "tuned", config=config)
    with (tuned / "metrics.csv").open(newline="") as file:
        last = [row for row in csv.DictReader(file) if row["val_nll"]][-1]
    found = evaluate(tuned / "last", data, config=SMALL)
    assert found.images == 18
    assert found.models[0].figures["nll"] == pytest.approx(float(last["val_nll"]), rel=1e-5)
    assert found.models[0].figures["accuracy"] == pytest.approx(float(last["val_accuracy"]))


def test_out_of_distribution(place: Path, data: DataConfig) -> None:
    unknown = str(place / "unknown")
    found = evaluate(place / "ensemble", data, config=EvaluateConfig(ood=(unknown,), workers=0, gallery=3))
    model = masksurgery.load(place / "ensemble")
    with torch.no_grad():
        scores = [image_scores(model(read(model, folder)[0]), "classification")
                  for folder in (place / "images" / "val", place / "unknown")]  # fmt: skip
    truth = [0] * 51 + [1] * 13
    assert found.ood == {unknown: 13}
    for name, figures in found.models[0].detection[unknown].items():
        values = torch.cat([one[name] for one in scores])
        assert figures["auroc"] == pytest.approx(roc_auc_score(truth, values), abs=1e-3), name
        assert figures["aupr"] == pytest.approx(average_precision_score(truth, values), abs=1e-3), name
    assert set(found.models[0].detection[unknown]) == {"max_probability", "entropy", "mutual_information", "variance"}
    galleries = found.models[0].galleries
    assert len(galleries["unknown"]) == len(galleries["surest"]) == 3
    assert all(sample.name.startswith("unknown/") for sample in galleries["unknown"])
    assert all(sample.name.startswith("val/") for sample in galleries["surest"])
    assert len(galleries["surest"][0].votes) == 4


@pytest.mark.slow
def test_corruption(place: Path, data: DataConfig) -> None:
    config = EvaluateConfig(corrupt=("noise", "rotation"), workers=0, batch_size=8)
    one = evaluate(place / "ensemble", data, config=config)
    other = evaluate(place / "ensemble", data, config=EvaluateConfig(corrupt=("all",), workers=0, batch_size=51))
    found = one.models[0].corruption
    assert set(found) == {"noise", "rotation"} and set(other.models[0].corruption) == {*found, "blur", "contrast"}
    for kind, severities in found.items():
        assert len(severities) == 5
        for severity, figures in enumerate(severities):  # what is drawn does not depend on batches
            assert figures == pytest.approx(other.models[0].corruption[kind][severity], rel=1e-4)
            assert figures["nll"] != pytest.approx(one.models[0].figures["nll"], rel=1e-6)


@pytest.mark.slow
def test_a_temperature_is_fitted_and_stored(place: Path, data: DataConfig, tmp_path: Path) -> None:
    folder = masksurgery.save(masksurgery.load(place / "ensemble"), tmp_path / "model")
    config = EvaluateConfig(temperature=True, coverage=0.5, score="entropy", workers=0, fit_fraction=0.4)
    found = evaluate([place / "base", folder], data, config=config)
    base, ensemble = found.models
    assert (found.images, found.fitted_on) == (31, 20)
    model = masksurgery.load(folder)
    assert model.temperature == ensemble.temperature not in (None, 1.0)
    assert model.threshold == ensemble.threshold and ensemble.threshold is not None
    assert ensemble.threshold.score == "entropy"
    assert base.temperature not in (None, 1.0, ensemble.temperature)

    x, y = read(model, place / "images" / "val")
    with torch.no_grad():
        p = model(x)
    again = evaluate(folder, data, config=SMALL)  # over all images, with what is stored
    assert again.models[0].temperature == ensemble.temperature
    assert again.models[0].figures["nll"] == pytest.approx(F.cross_entropy(p.logits.double(), y).item(), rel=1e-6)
    answered = 1 - model.unsure(p).double().mean().item()
    assert again.models[0].figures["answered"] == pytest.approx(answered)
    assert 0.2 < answered < 0.8


@pytest.mark.slow
def test_a_threshold_of_another_temperature_is_dropped(
    place: Path, data: DataConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = masksurgery.save(masksurgery.load(place / "ensemble"), tmp_path / "model")
    evaluate(folder, data, config=EvaluateConfig(coverage=0.5, workers=0))
    assert masksurgery.load(folder).threshold is not None
    found = evaluate(folder, data, config=EvaluateConfig(temperature=True, workers=0))
    assert "the threshold was fitted under another temperature, and is dropped" in caplog.text
    assert found.models[0].threshold is None and masksurgery.load(folder).threshold is None


def test_a_model_in_memory_is_left_alone(place: Path, data: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    model = masksurgery.load(place / "ensemble").train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = evaluate(model, data, config=EvaluateConfig(temperature=True, risk=0.9, workers=0))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and model.temperature == 1 and model.threshold is None
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())
    assert found.models[0].temperature is not None
    assert "what is fitted is not stored, for the model has no folder here" in caplog.text


def test_json_and_csv(place: Path, data: DataConfig, tmp_path: Path) -> None:
    found = evaluate(
        [place / "base", place / "ensemble"], data,
        config=EvaluateConfig(ood=(str(place / "unknown"),), corrupt=("contrast",), workers=0),
    )  # fmt: skip
    found.write_json(tmp_path / "out.json")
    found.write_csv(tmp_path / "out.csv")
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["models"][1]["figures"] == dict(found.models[1].figures)
    assert "image" not in record["models"][1]["galleries"]["surest"][0]
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    name, unknown = "ensemble", str(place / "unknown")
    chosen = [row for row in rows if row["model"] == name and row["set"] == unknown and row["score"] == "entropy"]
    assert {row["metric"]: float(row["value"]) for row in chosen} == found.models[1].detection[unknown]["entropy"]
    of_contrast = [row for row in rows if row["model"] == name and row["corruption"] == "contrast"]
    assert {row["severity"] for row in of_contrast} == set("12345")


# --- other tasks -----------------------------------------------------------------------------------------------------


def convert_small(folder: Path, task: str, outputs: int) -> Path:
    model = masksurgery.load(make_converted(folder / "classes"))
    base = load_base(folder / "classes")
    base.reset_classifier(outputs)
    converted = masksurgery.convert(base, task=task, example_inputs=(torch.zeros(1, 3, 32, 32),))  # type: ignore[arg-type]
    converted.recipe = {**(model.recipe or {}), "kwargs": {"num_classes": outputs}}
    return masksurgery.save(converted, folder / "model")


def write_table(folder: Path, columns: int, draw: str) -> Path:
    draws = np.random.default_rng(2)
    lines = ["file," + ",".join(f"t{k}" for k in range(columns))]
    folder.mkdir()
    for k in range(30):
        Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{k}.png")
        values = draws.normal(size=columns) if draw == "numbers" else draws.integers(0, 2, columns)
        lines.append(f"{k}.png," + ",".join(map(str, values)))
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


@pytest.mark.slow
def test_regression(tmp_path: Path) -> None:
    folder, table = convert_small(tmp_path, "regression", 2), write_table(tmp_path / "data", 2, "numbers")
    save_base(load_base(folder), tmp_path / "base", masksurgery.load(folder).recipe)
    config = EvaluateConfig(temperature=True, coverage=0.7, workers=0)
    found = evaluate([tmp_path / "base", folder], DataConfig(str(table)), config=config, everything=True)
    base, ensemble = found.models
    assert found.task == "regression"  # the base model's too, which does not know it
    assert set(base.figures) >= {"rmse", "crps"} and "nll" not in base.figures
    assert {"rmse", "nll", "crps", "coverage90", "spread", "aurc", "answered"} <= set(ensemble.figures)
    assert ensemble.temperature == masksurgery.load(folder).temperature
    assert ensemble.threshold is not None and ensemble.threshold.score == "variance"


@pytest.mark.slow
def test_multilabel(tmp_path: Path) -> None:
    folder, table = convert_small(tmp_path, "multilabel", 3), write_table(tmp_path / "data", 3, "labels")
    found = evaluate(folder, DataConfig(str(table)), config=SMALL, everything=True)
    model = masksurgery.load(folder)
    transform = preprocessing_of(model).evaluation()
    rows = list(csv.reader(table.open(newline="")))[1:]
    x = torch.stack([transform(Image.open(table.parent / row[0]))[0] for row in rows])
    y = torch.tensor([[float(value) for value in row[1:]] for row in rows])
    with torch.no_grad():
        p = model(x)
    nll = F.binary_cross_entropy_with_logits(p.logits.double(), y.double()).item()
    assert found.models[0].figures["nll"] == pytest.approx(nll, rel=1e-6)
    assert found.models[0].figures["accuracy"] == pytest.approx(((p.mean > 0.5) == (y > 0.5)).double().mean().item())


class Pixels(torch.nn.Module):
    """A class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.head = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(self.stem(x)))


def test_segmentation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Pixels()
    base.pretrained_cfg = {"input_size": (3, 16, 16)}  # type: ignore[assignment]
    model = masksurgery.convert(base, example_inputs=(torch.zeros(1, 3, 16, 16),))
    draws = np.random.default_rng(3)
    for part in ("images", "masks", "unknown"):
        (tmp_path / part).mkdir()
    for k in range(9):
        Image.fromarray(draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{k}.png")
        Image.fromarray(draws.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(tmp_path / "unknown" / f"{k}.png")
        mask = draws.integers(0, 3, (16, 16), dtype=np.uint8)
        mask[0] = 255
        Image.fromarray(mask).save(tmp_path / "masks" / f"{k}.png")
    data = DataConfig(str(tmp_path / "images"), masks=str(tmp_path / "masks"))
    config = EvaluateConfig(
        ood=(str(tmp_path / "unknown"),), corrupt=("rotation",), temperature=True, coverage=0.5, workers=0, gallery=2
    )
    found = evaluate(model, data, config=config, everything=True)
    figures, galleries = found.models[0].figures, found.models[0].galleries
    assert found.segmentation and {"miou", "ece", "accuracy", "nll"} <= set(figures)
    assert 0 < figures["miou"] < 0.6 and math.isfinite(figures["nll"])
    assert [title for title, _ in galleries["uncertain"][0].maps] == ["prediction", "truth", "variance"]
    assert len(found.models[0].corruption["rotation"]) == 5


@pytest.mark.slow
def test_folders_are_called_by_what_tells_them_apart(place: Path, data: DataConfig, tmp_path: Path) -> None:
    for name in ("one/model", "two/model"):
        shutil.copytree(place / "base", tmp_path / name)
    found = evaluate([tmp_path / "one" / "model", str(tmp_path / "two" / "model")], data, config=SMALL)
    assert [model.name for model in found.models] == ["one/model", "two/model"]
    assert evaluate(place / "base", data, config=SMALL).models[0].name == str(place / "base")


# --- what is refused -------------------------------------------------------------------------------------------------


def test_refusals(place: Path, data: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no model to evaluate"):
        evaluate([], data)
    with pytest.raises(ConfigError, match="stands there twice"):
        evaluate([place / "base", place / "base"], data)
    with pytest.raises(EvaluationError, match=r"No threshold on .* has an error of at most 0"):
        evaluate(place / "converted", data, config=EvaluateConfig(risk=0.01, workers=0))
    assert masksurgery.load(place / "converted").threshold is None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"corrupt": ("fog",)}, r"corrupt='fog' is not one of 'noise', .* or 'all'"),
        ({"coverage": 0.9, "risk": 0.1}, "two rules for one threshold"),
        ({"coverage": 1.5}, r"coverage=1\.5 is not a share above 0"),
        ({"risk": -1.0}, r"risk=-1\.0 is not a share of errors"),
        ({"score": "guess"}, "score='guess' is not one of 'max_probability'"),
        ({"fit_fraction": 1.0}, r"fit_fraction=1\.0 is not a share"),
        ({"batch_size": 0}, "batch_size 1 or more"),
    ],
)
def test_settings(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        EvaluateConfig(**settings)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_written_is_found_first(
    place: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != place / "ensemble")
    module = sys.modules["masksurgery.evaluate"]  # of the function of that name
    monkeypatch.setattr(module, "open_sets", None)  # is not reached
    with pytest.raises(masksurgery.CheckpointError, match="ensemble: cannot be written to"):
        evaluate(place / "ensemble", data, config=EvaluateConfig(temperature=True, workers=0))


def test_nan_is_refused(place: Path, data: DataConfig) -> None:
    model = masksurgery.load(place / "ensemble")
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(EvaluationError, match="NaN"):
        evaluate(model, data, config=SMALL)


@pytest.mark.parametrize("package", ["accelerate", "torchmetrics"])
def test_without_a_package(place: Path, data: DataConfig, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setattr("masksurgery.processes.find_spec", lambda name: None if name == package else object())
    with pytest.raises(ConfigError, match=rf'Evaluation needs {package}, .*: pip install "masksurgery\[evaluate\]"'):
        evaluate(place / "ensemble", data)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_find_the_same(place: Path, tmp_path: Path) -> None:
    options = [
        "--data", place / "images", "--ood", place / "unknown", "--corrupt", "noise", "--temperature",
        "--coverage", "0.8", "--batch-size", "8", "--workers", "0", "--gallery", "4",
    ]  # fmt: skip
    shutil.copytree(place / "base", tmp_path / "base")
    found = {}
    for processes in (1, 2):
        masksurgery.save(masksurgery.load(place / "ensemble"), tmp_path / "model", force=True)
        run("evaluate", "base", "model", *options, "--json", "out.json", processes=processes, folder=tmp_path)
        found[processes] = json.loads((tmp_path / "out.json").read_text())
    assert [model["temperature"] for model in found[1]["models"]] != [None, None]
    assert_close(found[2], found[1])


def assert_close(one: object, other: object, where: str = "") -> None:
    """The same text and, up to the order of sums, the same numbers."""
    if isinstance(one, dict):
        assert isinstance(other, dict) and list(one) == list(other), where
        for key, value in one.items():
            assert_close(value, other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert isinstance(other, list) and len(one) == len(other), where
        for k, pair in enumerate(zip(one, other, strict=True)):
            assert_close(*pair, f"{where}/{k}")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-7), where
    else:
        assert one == other, where


@pytest.mark.slow
def test_the_command(place: Path, tmp_path: Path) -> None:
    masksurgery.save(masksurgery.load(place / "ensemble"), tmp_path / "ensemble")
    shutil.copytree(place / "base", tmp_path / "base")
    shutil.copytree(place / "unknown", tmp_path / "unknown")
    (tmp_path / "out.json").write_text("of a run before")
    out, _ = run(
        "evaluate", "base", "ensemble", "--data", place / "images", "--ood", "unknown", "--corrupt", "rotation",
        "--workers", "0", "--coverage", "0.2", "--report", "report.html", "--json", "out.json", "--csv", "out.csv",
        folder=tmp_path,
    )  # fmt: skip
    assert max(map(len, out.splitlines())) <= 80 + len(str(place)), out
    assert "The report is in report.html." in out and "NLL" in out and "FPR95" in out and "rotation" in out
    page = (tmp_path / "report.html").read_text()
    assert "ensemble" in page and "<svg" in page
    assert json.loads((tmp_path / "out.json").read_text())["images"] == 41 and (tmp_path / "out.csv").exists()
    out, _ = run("predict", "ensemble", "unknown", folder=tmp_path)
    assert "unsure" in out


@pytest.mark.slow
def test_a_wrong_file_is_found_first(place: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", place / "ensemble", "--data", place / "images", "--report", "nowhere/report.html")
    _, err = run(*arguments, folder=tmp_path, status=2)
    assert "nowhere/report.html cannot be written: there is no folder" in err

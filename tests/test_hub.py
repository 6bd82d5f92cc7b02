"""The hub: what is pushed to one on the loopback is loaded from it, and the card says what it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from torch import nn

import masksurgery
from hub_server import Hub, serving
from masksurgery import CheckpointError, ConfigError
from masksurgery.evaluation import Evaluation, ModelEvaluation
from masksurgery.folders import SavedModel
from masksurgery.hub import choose_model
from masksurgery.model_card import write_card
from masksurgery.scores import Threshold
from nets import randomise


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.fixture
def python(hub: Hub, tmp_path: Path) -> Callable[..., str]:
    """Runs a program in a process of its own, for which this is the hub; the address is read at the import."""

    def run(code: str, token: str = hub.token, status: int = 0) -> str:
        settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        environment = {**os.environ, **settings, "HF_TOKEN": token}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    return run


def make(base: nn.Module | None = None, **options: Any) -> masksurgery.ConvertedModel:
    base = base or timm.create_model("test_resnet", num_classes=10)
    example = (torch.zeros(1, 3, 64, 64),)
    model = masksurgery.convert(randomise(base), n=2, include=["layer4.*"], example_inputs=example, **options)
    return model.eval()


EVALUATION = Evaluation(
    data="torch/fashion_mnist",
    images=500,
    task="classification",
    models=(
        ModelEvaluation("base", "base", 1, {"accuracy": 0.5}),
        ModelEvaluation(
            "tuned", "converted", 2, {"accuracy": 0.875, "nll": 0.25},
            detection={"mnist": {"entropy": {"auroc": 0.9, "aupr": 0.8, "fpr95": 0.1}}},
        ),
    ),
)  # fmt: skip


@pytest.mark.slow
def test_what_is_pushed_is_loaded(hub: Hub, python: Callable[..., str], tmp_path: Path) -> None:
    model = make()
    model.temperature = 1.5
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    torch.save({"x": x, "mean": expected.mean}, tmp_path / "x.pt")
    masksurgery.save(model, tmp_path / "tuned")
    (tmp_path / "report.html").write_text("<html>")
    out = python(f"""
import torch, masksurgery
folder, known = r"{tmp_path}", torch.load(r"{tmp_path / "x.pt"}")
print(masksurgery.push_to_hub(folder + "/tuned", "user/one", report=folder + "/report.html", private=True))
packed = masksurgery.pack(masksurgery.load(folder + "/tuned"), "unrolled")
masksurgery.push_to_hub(packed, "user/two", message="Packed")
for name in ("hf-hub:user/one", "user/two", "hf-hub:user/one@main"):
    with torch.no_grad():
        model = masksurgery.load(name)
        far = (model(known["x"]).mean - known["mean"]).abs().max().item()
        print(isinstance(model, masksurgery.PackedModel), far < 1e-5)
""")
    assert out.splitlines() == [
        f"{hub.address}/user/one", "False True", "True True", "False True",
    ]  # fmt: skip
    one, two = hub.repositories["user/one"], hub.repositories["user/two"]
    assert sorted(one) == ["README.md", "config.json", "model.safetensors", "report.html"]
    assert one["model.safetensors"] == (tmp_path / "tuned" / "model.safetensors").read_bytes()
    assert sorted(two) == ["README.md", "config.json", "model.safetensors"]
    assert hub.private["user/one"] == "private" and hub.messages == ["Upload a model of masksurgery", "Packed"]
    assert 'masksurgery.load("hf-hub:user/one")' in one["README.md"].decode()


@pytest.mark.slow
def test_a_hub_that_refuses(hub: Hub, python: Callable[..., str], tmp_path: Path) -> None:
    masksurgery.save(make(), tmp_path / "tuned")
    error = python(
        f'import masksurgery; masksurgery.push_to_hub(r"{tmp_path / "tuned"}", "user/one")', token="hf_wrong", status=1
    )
    assert "CheckpointError: user/one: the hub did not take it" in error and "hf auth login" in error
    assert not hub.repositories
    error = python('import masksurgery; masksurgery.load("hf-hub:user/none")', status=1)
    assert "user/none: there is no such folder, and the hub gives no repository of this name" in error


def test_what_cannot_be_pushed_is_said_first(tmp_path: Path) -> None:
    for name in ("name", "hf-hub:user/name", "a/b/c", "user/"):
        with pytest.raises(ConfigError, match=f"'{name}' is no name of a repository"):
            masksurgery.push_to_hub(make(), name)
    with pytest.raises(ConfigError, match="push_to_hub takes a converted or packed model, not Linear"):
        masksurgery.push_to_hub(nn.Linear(1, 1), "user/name")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"none\.html: there is no such file"):
        masksurgery.push_to_hub(make(), "user/name", report=tmp_path / "none.html")
    with pytest.raises(CheckpointError, match="does not exist"):
        masksurgery.push_to_hub(tmp_path / "none", "user/name")


def test_the_model_of_an_evaluation() -> None:
    assert choose_model(EVALUATION, "tuned", 2) == choose_model(EVALUATION, make(), 2) == EVALUATION.models[1]
    assert choose_model(EVALUATION, Path("tuned").resolve(), 2).name == "tuned"
    two = replace(EVALUATION, models=(*EVALUATION.models, ModelEvaluation("other", "converted", 2, {})))
    for evaluation, model, n in (
        (two, make(), 2),
        (EVALUATION, "other", 2),
        (EVALUATION, "base", 2),
        (EVALUATION, make(), 4),
    ):
        with pytest.raises(
            ConfigError, match=r"The evaluation is of base \(1 member\), tuned \(2 members\).* is pushed"
        ):
            choose_model(evaluation, model, n)


@pytest.mark.slow
def test_what_was_found_goes_along_and_does_not_outlive_its_weights(
    hub: Hub, python: Callable[..., str], tmp_path: Path
) -> None:
    masksurgery.save(make(), tmp_path / "tuned")
    (tmp_path / "report.html").write_text("<html>")
    python(f"""
import masksurgery
from masksurgery.evaluation import Evaluation, ModelEvaluation
model = masksurgery.load(r"{tmp_path / "tuned"}")
found = ModelEvaluation("a", "converted", 2, {{"accuracy": 0.875}})
evaluation = Evaluation(data="d", images=8, task="classification", models=(found,))
masksurgery.push_to_hub(model, "user/one", evaluation=evaluation, report=r"{tmp_path / "report.html"}")
masksurgery.push_to_hub(model, "user/two", evaluation=evaluation, report=r"{tmp_path / "report.html"}")
masksurgery.push_to_hub(model, "user/two")
""")
    one, two = hub.repositories["user/one"], hub.repositories["user/two"]
    assert json.loads(one["evaluation.json"])["models"][0]["figures"] == {"accuracy": 0.875}
    assert "| accuracy | 0.875 |" in one["README.md"].decode() and one["report.html"] == b"<html>"
    assert sorted(two) == ["README.md", "config.json", "model.safetensors"] and "0.875" not in two["README.md"].decode()


# --- cards -----------------------------------------------------------------------------------------------------------


def card_of(model: Any, folder: Path, *rest: Any, **more: Any) -> tuple[dict[str, Any], str]:
    masksurgery.save(model, folder)
    _, metadata, text = write_card(SavedModel.read(folder).record, "user/name", *rest, **more).split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_card_says_what_the_model_is(tmp_path: Path) -> None:
    model = make()
    model.threshold = Threshold("entropy", 0.75)
    model.pretrained_cfg = {**model.pretrained_cfg, "hf_hub_id": "timm/test_resnet.r160_in1k"}
    metadata, text = card_of(model, tmp_path / "tuned", license="mit")
    assert metadata == {
        "base_model": "timm/test_resnet.r160_in1k", "library_name": "masksurgery", "license": "mit",
        "pipeline_tag": "image-classification", "tags": ["masksurgery", "masksembles", "uncertainty", "ensemble"],
    }  # fmt: skip
    assert "# name\n" in text and 'model = masksurgery.load("hf-hub:user/name")\n' in text
    for row in (
        "| base model | `test_resnet.r160_in1k` |", "| members | 2 |", "| scale | 2 |", "| masked layers | 3 |",
        "| example input | [3, 64, 64] |", "| threshold | entropy 0.75 |", "| packed | no: it can be trained on |",
    ):  # fmt: skip
        assert row in text
    assert "model.unsure(p)" in text and "model.output" not in text and "How good it is" not in text
    assert card_of(model, tmp_path / "other", base_model="a/b")[0]["base_model"] == "a/b"


def test_a_card_has_the_figures(tmp_path: Path) -> None:
    metadata, text = card_of(make(), tmp_path / "tuned", EVALUATION.models[1], EVALUATION, True)
    (entry,) = metadata["model-index"]
    metrics = {m["type"]: m["value"] for m in entry["results"][0]["metrics"]}
    assert entry["name"] == "name" and metrics == {"accuracy": 0.875, "nll": 0.25}
    assert entry["results"][0]["dataset"]["name"] == "torch/fashion_mnist"
    assert "On 500 images of `torch/fashion_mnist`:" in text and "| accuracy | 0.875 |" in text
    assert "| mnist | entropy | 0.900 | 0.800 | 0.100 |" in text and "[report.html](report.html)" in text


def test_a_card_of_a_model_of_ones_own(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    model = masksurgery.convert(base, n=2, task="regression", example_inputs=(torch.zeros(1, 4),))
    metadata, text = card_of(masksurgery.pack(model, "unrolled"), tmp_path / "own")
    assert "pipeline_tag" not in metadata and "base_model" not in metadata
    assert 'masksurgery.load("hf-hub:user/name", base=my_model)' in text
    assert "`my_model` is a `torch.nn.modules.container.Sequential` of yours" in text
    model.output = "mean"
    assert 'model.output = "prediction"\np = model(x)' in card_of(model, tmp_path / "mean")[1]
    assert "p = model(x)  # p.mean, p.variance\n" in text and "| packed | yes (unrolled) |" in text

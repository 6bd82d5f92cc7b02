"""The command `export`: what it prints and writes, and what it says of bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime
import pytest
import timm
import torch

import masksurgery
from masksurgery.cli import app


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)

    def call(*arguments: Any) -> Result:
        with pytest.raises(SystemExit) as stop:
            app([str(argument) for argument in arguments])
        return Result(int(stop.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base = timm.create_model("test_resnet", num_classes=10)
    model = masksurgery.convert(base, n=2, include=["layer4.*"], example_inputs=(torch.zeros(1, 3, 64, 64),))
    masksurgery.save(model, tmp_path / "model")
    return Path("model")


@pytest.mark.slow
def test_a_folder_becomes_a_file_of_its_name(run: Callable[..., Result], folder: Path) -> None:
    found = run("export", folder)
    assert found.status == 0 and found.err == ""
    lines = found.out.splitlines()
    assert lines[0] == "model is exported to model.onnx"
    assert lines[1].split() == ["inputs", "x"]
    assert lines[2].split(None, 1)[1].strip() == "mean, variance, logits, entropy, mutual_information, members"
    assert lines[3].lstrip().startswith("difference  at most ") and lines[3].rstrip().endswith("batch size 1, 2, 5")
    assert lines[-1] == "Next: masksurgery pack model -o packed, whose export is faster"
    assert max(map(len, lines)) <= 80
    session = onnxruntime.InferenceSession("model.onnx")
    assert session.get_inputs()[0].shape[1:] == [3, 64, 64]

    again = run("export", folder)
    assert again.status == 2 and "model.onnx exists. Pass another name, or --force" in again.err
    found = run("export", folder, "--force", "--static")
    assert found.status == 0 and "batch size 1 " in found.out
    assert onnxruntime.InferenceSession("model.onnx").get_inputs()[0].shape == [1, 3, 64, 64]


@pytest.mark.slow
def test_a_packed_folder_and_the_other_format(run: Callable[..., Result], folder: Path) -> None:
    masksurgery.save(masksurgery.pack(masksurgery.load(folder), "unrolled"), "packed")
    found = run("export", "packed", "-o", "small.pt2")
    assert found.status == 0 and found.out.startswith("packed is exported to small.pt2") and "Next" not in found.out
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = masksurgery.load(folder)(x).mean
        assert torch.allclose(torch.export.load("small.pt2").module()(x).mean, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model", "--format", "tflite"), "format='tflite'"),
        (("model", "-o", "model.bin"), "model.bin: neither .onnx nor .pt2"),
        (("model", "-o", "none/model.onnx"), "there is no folder"),
        (("nothing",), "nothing: does not exist"),
    ],
)
def test_bad_input_is_a_line(run: Callable[..., Result], folder: Path, arguments: Any, message: str) -> None:
    found = run("export", *arguments)
    assert found.status == 2 and found.out == "" and message in found.err and found.err.count("\n") == 1
    assert [path.name for path in Path().iterdir()] == ["model"]

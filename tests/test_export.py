"""Export: files hold what the model computes, at any batch size, with names, and with what a program has to know."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import masksurgery
from masksurgery import CheckpointError, ConfigError, ExportError, TraceError
from masksurgery.layers import Assignment
from masksurgery.scores import Threshold
from nets import randomise

FIELDS = ("mean", "variance", "logits", "entropy", "mutual_information", "members")
FORMATS = ("onnx", "pt2")
module = sys.modules["masksurgery.export"]


class Net(nn.Module):
    """Two convolutions, a mean over the image, and what `end` makes of the features."""

    def __init__(self, end: str = "one") -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head, self.other, self.end = nn.Linear(16, 5), nn.Linear(16, 2), end
        self.pretrained_cfg = {"input_size": (3, 12, 12), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}
        self.pretrained_cfg["label_names"] = tuple("abcde")

    def forward(self, x: Tensor) -> Any:
        x = self.body(self.stem(x)).mean((2, 3))
        return {"logits": self.head(x), "size": self.other(x)} if self.end == "dict" else self.head(x)


def convert(end: str = "one", **options: Any) -> masksurgery.ConvertedModel:
    return masksurgery.convert(randomise(Net(end)), n=3, example_inputs=(torch.zeros(1, 3, 12, 12),), **options).eval()


def run_onnx(path: Path, *inputs: Tensor) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(path)
    names = [given.name for given in session.get_inputs()]
    found = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    return dict(zip([value.name for value in session.get_outputs()], found, strict=True))


def run_program(path: Path, *inputs: Tensor) -> Any:
    with torch.no_grad():
        return torch.export.load(path).module()(*inputs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["converted", "unrolled", "grouped"])
def test_files_hold_what_the_model_computes(tmp_path: Path, kind: str) -> None:
    converted = convert()
    model: Any = converted if kind == "converted" else masksurgery.pack(converted, kind, dense=kind == "grouped")
    for format in FORMATS:
        found = masksurgery.export(model, tmp_path / f"model.{format}")
        assert (found.path, found.format) == (tmp_path / f"model.{format}", format)
        assert found.inputs == ("x",) and found.outputs == FIELDS
        assert set(found.differences) == {1, 2, 5} and max(found.differences.values()) < 1e-5
    for batch in (1, 3, 8):
        x = torch.randn(batch, 3, 12, 12)
        with torch.no_grad():
            expected = model(x)
        p = run_program(tmp_path / "model.pt2", x)
        assert isinstance(p, masksurgery.Prediction)
        values = run_onnx(tmp_path / "model.onnx", x)
        assert tuple(values) == FIELDS
        for name in FIELDS:
            assert torch.allclose(getattr(p, name), getattr(expected, name), atol=1e-5)
            assert np.allclose(values[name], getattr(expected, name), atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.pt2"]


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_the_temperature_and_what_eval_returns_are_in_it(tmp_path: Path, format: str) -> None:
    model, x = convert(), torch.randn(4, 3, 12, 12)
    model.temperature, model.output = 2.5, "logits"
    with torch.no_grad():
        expected = model(x)
    found = masksurgery.export(model, tmp_path / f"model.{format}")
    assert found.outputs == ("logits",)
    values = run_onnx(found.path, x)["logits"] if format == "onnx" else run_program(found.path, x).numpy()
    assert np.allclose(values, expected, atol=1e-5)


@pytest.mark.slow
def test_several_outputs_have_names_of_their_own(tmp_path: Path) -> None:
    model, x = convert("dict"), torch.randn(2, 3, 12, 12)
    found = masksurgery.export(model, tmp_path / "model.onnx")
    assert found.outputs == (
        *(f"logits.{field}" for field in FIELDS), "size.mean", "size.variance", "size.members",
    )  # fmt: skip
    with torch.no_grad():
        expected = model(x)
    values = run_onnx(found.path, x)
    assert np.allclose(values["logits.mean"], expected["logits"].mean, atol=1e-5)
    assert np.allclose(values["size.variance"], expected["size"].variance, atol=1e-5)


@pytest.mark.slow
def test_a_regression_has_its_three_fields(tmp_path: Path) -> None:
    found = masksurgery.export(convert(task="regression"), tmp_path / "model.onnx")
    assert found.outputs == ("mean", "variance", "members")


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_a_static_file_takes_one_sample(tmp_path: Path, format: str) -> None:
    model = convert()
    found = masksurgery.export(model, tmp_path / f"model.{format}", static=True)
    assert set(found.differences) == {1}
    run: Any = run_onnx if format == "onnx" else run_program
    run(found.path, torch.zeros(1, 3, 12, 12))
    with pytest.raises(Exception, match=r"(?i)dimension|size"):
        run(found.path, torch.zeros(2, 3, 12, 12))


class Words(nn.Module):
    """Numbers of words and a table that has no batch, by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.out = nn.Embedding(20, 8), nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, words: Tensor, *, table: Tensor, scale: float = 1.0) -> Tensor:
        return self.out(self.hidden(self.embed(words) + table * scale).relu().mean(1))


@pytest.mark.slow
def test_integers_keywords_and_inputs_without_a_batch(tmp_path: Path) -> None:
    example = {"words": torch.zeros(1, 6, dtype=torch.long), "table": torch.zeros(6, 8), "scale": 0.5}
    model = masksurgery.convert(randomise(Words()), n=2, example_inputs=example, unbatched=["table"]).eval()
    words, table = torch.randint(20, (3, 6)), torch.randn(6, 8)
    with torch.no_grad():
        expected = model(words=words, table=table).mean
    for format in FORMATS:
        found = masksurgery.export(model, tmp_path / f"model.{format}")
        assert found.inputs == ("words", "table")
    assert np.allclose(run_onnx(tmp_path / "model.onnx", words, table)["mean"], expected, atol=1e-5)
    with torch.no_grad():
        program = torch.export.load(tmp_path / "model.pt2").module()
        assert torch.allclose(program(words, table=table).mean, expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions(tmp_path: Path, dtype: torch.dtype) -> None:
    model = convert()
    masksurgery.recalibrate(model, [torch.randn(32, 3, 12, 12)])
    assert max(masksurgery.export(model.to(dtype), tmp_path / "model.pt2").differences.values()) <= 1e-4
    if dtype == torch.float16:
        assert 0 < max(masksurgery.export(model, tmp_path / "model.onnx").differences.values()) <= 2e-2


@pytest.mark.slow
def test_what_the_runtime_does_not_have_is_said(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"what was exported does not run: .*implementation for Conv.*No file was"):
        masksurgery.export(convert().double(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Odd(nn.Module):
    """Returns what is no tensor too, has children of the names of outputs, and takes a pair."""

    def __init__(self, number: int | None = None) -> None:
        super().__init__()
        self.number = number
        self.hidden, self.out, self.threshold = nn.Linear(4, 8), nn.Linear(8, 3), nn.Threshold(0.1, 0.0)
        self.register_buffer("mean", torch.full((4,), 0.5))
        self.register_buffer("variance", torch.full((4,), 2.0))

    def forward(self, pair: tuple[Tensor, Tensor]) -> Any:
        x = self.hidden((pair[0] + pair[1] - self.mean) / self.variance).relu()
        return {"nothing": None, "answer": [self.out(self.threshold(x)), self.number]}


@pytest.mark.slow
def test_odd_outputs_odd_inputs_and_names_that_are_taken(tmp_path: Path) -> None:
    pair = torch.randn(3, 4), torch.randn(3, 4)
    model = masksurgery.convert(randomise(Odd()), n=2, task="regression", example_inputs=(pair,)).eval()
    with torch.no_grad():
        expected = model(pair)["answer"][0]
    found = masksurgery.export(model, tmp_path / "model.onnx", inputs=(pair,))
    assert found.outputs == ("answer.0.mean", "answer.0.variance", "answer.0.members")
    assert np.allclose(run_onnx(found.path, *pair)["answer.0.variance"], expected.variance, atol=1e-5)
    model = masksurgery.convert(randomise(Odd(7)), n=2, task="regression", example_inputs=(pair,)).eval()
    assert masksurgery.export(model, tmp_path / "model.pt2").outputs == found.outputs
    assert run_program(tmp_path / "model.pt2", pair)["answer"][1] == 7
    with pytest.raises(
        ExportError, match=r"cannot be written as onnx: ConversionError: .*No file was written. Try the"
    ):
        masksurgery.export(model, tmp_path / "number.onnx")  # which ONNX does not have among its outputs


@pytest.mark.slow
def test_a_buffer_may_be_called_as_an_output_is(tmp_path: Path) -> None:
    class Normalising(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))

        def forward(self, x: Tensor) -> Any:
            return super().forward(x - self.mean)

    base = randomise(Normalising())
    model, x = (
        masksurgery.convert(base, n=2, example_inputs=(torch.zeros(1, 3, 12, 12),)).eval(),
        torch.randn(2, 3, 12, 12),
    )
    with torch.no_grad():
        expected = model(x)
    assert np.allclose(
        run_onnx(masksurgery.export(model, tmp_path / "m.onnx").path, x)["mean"], expected.mean, atol=1e-5
    )


def test_it_is_compared_on_what_is_given_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = convert(), []
    compare = module._compare
    monkeypatch.setattr(
        module, "_compare", lambda m, run, args, kw, path: seen.append(args[0]) or compare(m, run, args, kw, path)
    )
    x = torch.arange(2.0)[:, None, None, None].expand(2, 3, 12, 12)
    masksurgery.export(model, tmp_path / "model.pt2", inputs=x)
    assert [len(given) for given in seen] == [1, 2, 5, 1, 2, 5] and seen[5][:, 0, 0, 0].tolist() == [0, 1, 0, 1, 0]
    with pytest.raises(TraceError, match=r"The inputs do not fit Net.forward\(x"):
        masksurgery.export(model, tmp_path / "model.pt2", inputs=(x, x))


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = convert().train()
    model.stem.eval()  # type: ignore[operator]
    flags = [child.training for child in model.modules()]
    before = {name: x.clone() for name, x in model.state_dict().items()}
    masksurgery.export(model, tmp_path / "model.pt2")
    assert [child.training for child in model.modules()] == flags
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert model(torch.zeros(3, 3, 12, 12)).shape == (3, 5)


@pytest.mark.slow
def test_the_file_says_what_a_program_has_to_know(tmp_path: Path) -> None:
    model = convert()
    model.threshold, model.temperature = Threshold("entropy", 0.75), 1.5
    path = masksurgery.export(model, tmp_path / "model.onnx").path
    (entry,) = [p for p in onnx.load(path).metadata_props if p.key == "masksurgery"]
    facts = json.loads(entry.value)
    assert facts["threshold"] == {"score": "entropy", "value": 0.75}
    assert (facts["n"], facts["task"], facts["temperature"]) == (3, "classification", 1.5)
    assert facts["labels"] == list("abcde") and facts["version"] == masksurgery.__version__
    assert facts["preprocessing"]["input_size"] == [3, 12, 12] and facts["preprocessing"]["std"] == [0.25] * 3
    extra = {"masksurgery": ""}
    torch.export.load(masksurgery.export(model, tmp_path / "model.pt2").path, extra_files=extra)
    assert json.loads(extra["masksurgery"]) == {**facts, "outputs": list(FIELDS)}
    model.pretrained_cfg["label_names"] = ("a", "b")  # of another number of classes
    model.threshold = None
    path = masksurgery.export(model, tmp_path / "model.onnx").path
    facts = json.loads(onnx.load(path).metadata_props[0].value)
    assert "labels" not in facts and "threshold" not in facts


# --- errors ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="export takes a converted or packed model, not Net"):
        masksurgery.export(Net(), tmp_path / "model.onnx")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model\.bin: neither \.onnx nor \.pt2"):
        masksurgery.export(convert(), tmp_path / "model.bin")
    with pytest.raises(ConfigError, match="format='tflite'"):
        masksurgery.export(convert(), tmp_path / "model.onnx", format="tflite")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"called \.pt2, but format='onnx'"):
        masksurgery.export(convert(), tmp_path / "model.pt2", format="onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"ONNX needs onnxruntime. Install it: pip install masksurgery\[export\]"):
        masksurgery.export(convert(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written, for there is no folder"):
        masksurgery.export(convert(), tmp_path / "none" / "model.pt2")


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_what_computes_something_else_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    file, other = tmp_path / f"model.{format}", masksurgery.export_program(convert(seed=1))
    file.write_bytes(b"what was there")
    monkeypatch.setattr(module, "export_program", lambda model, static: other)
    with pytest.raises(ExportError, match=r"differs by .* at batch size 1"):
        masksurgery.export(convert(), file)
    assert file.read_bytes() == b"what was there" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_what_does_not_run_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    static = masksurgery.export_program(convert(), static=True)
    monkeypatch.setattr(module, "export_program", lambda model, static_=False, **_: static)
    with pytest.raises(ExportError, match=r"what was exported does not run: .*No file was written"):
        masksurgery.export(convert(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Choosy(nn.Module):
    """Asks for a value, which torch.export cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(x)
        if x.sum() > 0:
            x = x.relu()
        return self.out(x)


def test_what_torch_cannot_follow_is_said(tmp_path: Path) -> None:
    model = masksurgery.convert(Choosy(), n=2, include=["hidden"], example_inputs=(torch.zeros(1, 4),))
    with pytest.raises(ExportError, match=r"torch\.export cannot follow this Choosy: ") as raised:
        masksurgery.export(model, tmp_path / "model.pt2")
    assert "static=True" not in str(raised.value)  # which does not help here


def test_a_wrong_second_output_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = module.READERS["pt2"]

    def wrong(path: Path) -> Any:
        def run(args: Any, kwargs: Any) -> Any:
            found = read(path)(args, kwargs)
            return [found[0], np.full_like(found[1], np.nan), *found[2:]]

        return run

    monkeypatch.setitem(module.READERS, "pt2", wrong)
    with pytest.raises(ExportError, match=r"differs by nan from the model at batch size 1"):
        masksurgery.export(convert(), tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_a_model_without_numbers_proves_nothing(tmp_path: Path) -> None:
    model = convert()
    with torch.no_grad():
        model.get_parameter("head.bias").fill_(float("nan"))
    with pytest.raises(ExportError, match="the model itself returns no finite number"):
        masksurgery.export(model, tmp_path / "model.pt2")


def test_differences_are_of_the_largest_number() -> None:
    one = np.array([1.0, 200.0])
    assert module.difference(one + np.array([0.0, 2.0]), one) == pytest.approx(0.01)
    assert module.difference(np.array([0.5]), np.array([0.25])) == 0.25
    assert module.difference(np.array([np.nan]), np.array([np.nan])) == 0
    assert not module.difference(np.array([np.nan]), np.array([1.0])) <= 1
    assert not module.difference(np.zeros((2, 1)), np.zeros((1, 2))) <= 1
    assert module.difference(np.array([-np.inf, 1.0]), np.array([-np.inf, 1.0])) == 0
    assert not module.largest([0.0, float("nan"), 1e-7]) <= 1


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("batch", [4, 7])
@pytest.mark.parametrize("train_mode", ["split", "repeat"])
def test_compiled_without_graph_breaks_in_training(batch: int, train_mode: Any) -> None:
    torch._dynamo.reset()
    model, x = convert(train_mode=train_mode).train(), torch.randn(batch, 3, 12, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    ours = compiled(x)
    ours.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.manual_seed(0)
    theirs = model(x)
    theirs.square().sum().backward()
    assert torch.allclose(ours, theirs, atol=1e-5)
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["converted", "unrolled", "grouped"])
def test_compiled_without_graph_breaks_in_eval(kind: str) -> None:
    torch._dynamo.reset()
    converted = convert()
    model: Any = converted if kind == "converted" else masksurgery.pack(converted, kind)  # type: ignore[arg-type]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 5):
            x = torch.randn(batch, 3, 12, 12)
            for a, b in zip(tree_leaves(compiled(x)), tree_leaves(model(x)), strict=True):
                assert torch.allclose(a, b, atol=1e-5)


class OneMember(nn.Module):
    """A mask that packing had to leave, in the pass of one member."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = masksurgery.Masksembles1D(8, 4, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        index = x.new_full((x.shape[0],), 3, dtype=torch.long)
        return self.mask(x, Assignment(1, index, True))


def test_masks_that_packing_leaves_do_not_fix_the_batch() -> None:
    batch = torch.export.Dim("batch", min=1)
    model, x = OneMember(), torch.randn(5, 8)
    program = torch.export.export(model, (torch.zeros(2, 8),), dynamic_shapes=({0: batch},), strict=False)
    assert torch.equal(program.module()(x), x * model.mask.masks[3])

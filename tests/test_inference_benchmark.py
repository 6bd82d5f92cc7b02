"""The benchmark of inference: its models compute what they should, and its tables and its verdict are right."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from masksurgery import bench
from masksurgery.macs import count_macs
from masksurgery.pack import PackedModel
from masksurgery.variants import Conditions, Variant, fill_weights
from test_examples import EXAMPLES, load_example

ONE = Conditions(threads=1)


class Reference(nn.Module):
    """What a layer of the reference package does to rows [n*b, ...]."""

    def __init__(self, channels: int, n: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("masks", torch.ones(n, channels))

    def forward(self, x: Tensor) -> Tensor:
        masks = self.masks.repeat_interleave(len(x) // len(self.masks), 0)  # type: ignore[arg-type, operator]
        return x * masks.reshape(*masks.shape, *[1] * (x.dim() - 2))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES / "benchmarks"))
    package = SimpleNamespace(Masksembles1D=Reference, Masksembles2D=Reference)
    monkeypatch.setitem(sys.modules, "masksembles.torch", package)  # type: ignore[arg-type]
    return load_example("benchmarks/inference")


@pytest.fixture
def models(script: ModuleType) -> ModuleType:
    return sys.modules["inference_models"]


# --- the models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_folding_leaves_no_norm_and_changes_nothing(models: ModuleType, name: str) -> None:
    base = fill_weights(timm.create_model(name).eval())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = {key: value.clone() for key, value in base.state_dict().items()}
    folded = models.fold(base, x)
    assert not any(isinstance(module, _BatchNorm) for module in folded.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in folded.modules())
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    with torch.no_grad():
        assert models.largest_difference(base(x), folded(x)) < 1e-5


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        pytest.param("test_resnet", {"heads"}, marks=pytest.mark.slow),
        pytest.param("test_convnext", {"folded", "heads"}, marks=pytest.mark.slow),
        pytest.param("test_vit", {"folded"}, marks=pytest.mark.slow),
    ],
)
def test_variants_that_should_agree_do(script: ModuleType, models: ModuleType, name: str, missing: set[str]) -> None:
    variants = list(models.open_variants(name, [*models.TITLES], ONE))
    assert [variant.name for variant in variants] == [other for other in models.TITLES if other not in missing]
    differences = script.compare(variants, ONE)
    assert len(differences) == 4 - ("folded" in missing)
    assert max(differences.values()) < 1e-5
    made = {variant.name: variant for variant in variants}
    assert all(isinstance(made[packed].model, PackedModel) for packed in models.PACKED if packed in made)
    assert made["packed"].details["packing_seconds"] > 0
    macs = {key: count_macs(variant.model, *ONE.draw(variant.inputs(1))) for key, variant in made.items()}
    for four in ("repeat", "reference", "dropout", "ensemble"):
        assert macs[four] == 4 * macs["base"]
    assert macs["packed"] < macs["late"] <= 4 * macs["base"]


def test_passes_of_dropout_differ_and_so_do_the_networks_of_an_ensemble(models: ModuleType) -> None:
    x = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name in ("dropout", "ensemble"):
            members = models.make(name, "test_resnet")(x).members
            assert members.shape == (2, 4, 1000)
            assert all((members[:, i] - members[:, j]).abs().max() > 1e-2 for i in range(4) for j in range(i))
        assert torch.equal(models.make("ensemble", "test_resnet")(x).members, members)


def test_dropout_is_as_strong_as_the_masks(models: ModuleType) -> None:
    mask = SimpleNamespace(rank=4, channel_dim=1)
    with torch.random.fork_rng(devices=[]):
        kept = models.AlwaysDropout(mask, 0.4)(torch.ones(100, 50, 2, 2), None)
    assert ((kept == 0).flatten(2).all(2) | (kept > 0).flatten(2).all(2)).all()  # whole channels
    assert float((kept == 0).float().mean()) == pytest.approx(0.4, abs=0.03)


def test_variants_that_differ_end_the_benchmark(script: ModuleType) -> None:
    inputs = {"args": [{"shape": [2, 3], "dtype": "float32"}], "kwargs": {}}
    variants = [Variant("base", nn.Identity(), lambda _: inputs), Variant("folded", nn.ReLU(), lambda _: inputs)]
    with pytest.raises(SystemExit, match=r"These should agree to 1e-03, and do not: base, folded: \d"):
        script.compare(variants, ONE)


# --- the tables ------------------------------------------------------------------------------------------------------


def result(**seconds: float) -> dict[str, Any]:
    """Of batches of 1 and 8, so many seconds for one sample of each variant, and as many MiB."""
    rows = [
        {
            "variant": name, "batch": batch, "latency_ms": time * batch * 1e3, "iqr_ms": 0.5,
            "ratio_to_base": time / seconds["base"], "peak_memory_mib": time * batch, "macs": time, "parameters": 10,
            "seconds": [time * batch] * 4,
        }
        for name, time in seconds.items() for batch in (1, 8)
    ]  # fmt: skip
    return {
        "measurements": rows,
        "conditions": {"threads": 2, "device": "cpu", "channels_last": False},
        "machine": {"cpus": 2, "cpu": "a CPU"},
        "versions": {"torch": "2", "timm": "1"},
        "details": {"packed": {"layout": "unrolled", "dense": True, "barriers": 3, "packing_seconds": 1.25}},
    }


def test_document_by_hand(script: ModuleType) -> None:
    text = script.document({"mine": result(base=1.0), "resnet50": result(base=1.0, repeat=4.0, packed=1.5)})
    assert text.index("## resnet50") < text.index("## mine")
    assert "threads: 2, of 2 CPUs (a CPU); torch 2, timm 1. packed: unrolled, dense, 3 barriers, made in 1.2 s." in text
    assert "| packed | 1500.0 ± 0.5 | 1.50 | 2 | 12000.0 ± 0.5 | 1.50 | 12 | 1.50 | 1.00 |\n" in text


def test_readme_table_by_hand(script: ModuleType) -> None:
    results = {
        "vit_small_patch16_224": result(base=1.0, packed=2.0),
        "resnet50": result(base=1.0, repeat=4.0, packed=1.5),
        "mine": result(base=1.0),
    }
    assert script.readme_table(results) == (
        "|  | resnet50 | vit_small |\n| --- | ---: | ---: |\n"
        "| inputs repeated | 4.00 (4.00) |  |\n| packed | 1.50 (1.50) | 2.00 (2.00) |\n"
    )
    text = f"before\n{script.BEGIN}old\n{script.END}after\n"
    assert script.update_readme(text, {}) == f"before\n{script.BEGIN}|  |\n| --- |\n{script.END}after\n"


def test_the_readme_has_a_place_for_it(script: ModuleType) -> None:
    text = script.README.read_text(encoding="utf-8")
    assert text.count(script.BEGIN) == text.count(script.END) == 1 and text.index(script.BEGIN) < text.index(script.END)


# --- the verdict -----------------------------------------------------------------------------------------------------

GOOD = {"base": 1.0, "folded": 0.95, "repeat": 6.5, "packed": 1.8}


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        ({}, []),
        ({"repeat": 5.0}, ["batch 8: times faster than inputs repeated: 2.78, at least 3.3"]),
        ({"packed": 1.95}, ["batch 8: latency to the base model's: 1.95, at most 1.9",
                            "batch 8: latency to that with BatchNorm folded: 2.05, at most 2.0"]),
        ({"repeat": 1.0, "packed": 1.0}, ["batch 8: times faster than inputs repeated: 1.00, at least 3.3",
                                          "batch 1: times faster than inputs repeated: 1.00, at least 1.9",
                                          "batch 8: times less memory than inputs repeated: 1.00, at least 2.0"]),
    ],
)  # fmt: skip
def test_verdict(
    script: ModuleType, capsys: pytest.CaptureFixture[str], change: dict[str, float], failed: list[str]
) -> None:
    assert script.check({"resnet50": result(**{**GOOD, **change})}) == (1 if failed else 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.removeprefix("FAILED  ") for line in lines if line.startswith("FAILED")] == failed
    assert len(lines) == 6


def test_verdict_without_figures(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.check({}) == 1
    assert "resnet50 was not measured." in capsys.readouterr().err
    slow = result(**GOOD)
    slow["details"]["packed"] |= {"packing_seconds": 5.5, "layout": "grouped"}
    slow["measurements"] = [{**row, "peak_memory_mib": None} for row in slow["measurements"]]
    assert script.check({"resnet50": slow}) == 1
    out = capsys.readouterr().out
    assert "FAILED  seconds to pack: 5.50, at most 5.0" in out
    assert "FAILED  batch 8: times less memory than inputs repeated: -, at least 2.0" in out
    assert "memory is that of the layout grouped; the limit is one for unrolled" in out


@pytest.mark.slow
def test_the_script_keeps_what_was_measured_before(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks: Callable[..., list[None]] = lambda make, inputs, conditions: [None] * len(inputs)  # noqa: E731
    monkeypatch.setattr(bench, "cpu_peaks", peaks)
    readme = script.README.read_text(encoding="utf-8")
    (tmp_path / "inference.json").write_text(json.dumps({"resnet50": result(**GOOD)}))
    arguments = ["--models", "test_resnet", "--variants", "base", "packed", "--batch", "1", "--repeats", "4"]
    assert script.main([*arguments, "--threads", "1", "--output", str(tmp_path), "--check"]) == 0
    found = json.loads((tmp_path / "inference.json").read_text())
    assert [*found] == ["resnet50", "test_resnet"] and found["resnet50"] == result(**GOOD)
    rows = found["test_resnet"]["measurements"]
    assert [(row["variant"], row["batch"], len(row["seconds"])) for row in rows] == [("base", 1, 4), ("packed", 1, 4)]
    text = (tmp_path / "inference.md").read_text(encoding="utf-8")
    assert "## test_resnet" in text and "| packed | " in text
    before = (tmp_path / "inference.json").stat().st_mtime_ns
    assert script.main(["--report", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "inference.json").stat().st_mtime_ns == before
    assert (tmp_path / "inference.md").read_text(encoding="utf-8") == text
    assert script.README.read_text(encoding="utf-8") == readme


def test_a_missing_reference_package_is_one_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        script.main([])
    assert "masksembles is not installed: pip install --no-deps masksembles" in capsys.readouterr().err

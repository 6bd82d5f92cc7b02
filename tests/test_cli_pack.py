"""The commands `pack` and `bench`: what they print and write, and what they say of bad input."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch

import masksurgery
from masksurgery import bench, bench_folder, memory
from masksurgery.bench_folder import make_variant, open_variants
from masksurgery.cli import app
from masksurgery.macs import conversion_macs, count_macs
from masksurgery.pack import Barrier, PackedModel
from masksurgery.pack_tables import by_reason
from masksurgery.tables import short
from masksurgery.variants import Conditions, fill_weights

MIB = 2**20
ONE = Conditions(threads=1)
RECIPE = {"source": "timm", "name": "test_resnet", "kwargs": {"num_classes": 10}}
FAST = ("--threads", 1, "--repeats", 4)


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments: Any) -> Result:
        with pytest.raises(SystemExit) as stop:
            app([str(argument) for argument in arguments], prog_name="masksurgery")
        return Result(int(stop.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the folders `converted` and `packed`, of images of 64 pixels."""
    folder = tmp_path_factory.mktemp("models")
    base = fill_weights(timm.create_model("test_resnet", num_classes=10))
    model = masksurgery.convert(base, example_inputs=(torch.zeros(1, 3, 64, 64),)).eval()
    model.recipe = RECIPE
    masksurgery.save(model, folder / "converted")
    masksurgery.save(masksurgery.pack(model, "unrolled"), folder / "packed")
    return folder


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Memory as it would come from the other processes, which are not started; what was asked for."""
    asked: list[Any] = []

    def peaks(make: Any, inputs: list[Any], conditions: Conditions) -> list[int]:
        asked.append((make.args, inputs))
        return [MIB * (k + 1) for k in range(len(inputs))]

    monkeypatch.setattr(bench, "cpu_peaks", peaks)
    return asked


# --- pack ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pack_writes_what_predicts_the_same(run: Callable[..., Result], place: Path, tmp_path: Path) -> None:
    done = run("pack", place / "converted", "-o", tmp_path / "out", "--layout", "unrolled")
    assert (done.status, done.err) == (0, "")
    model, packed = masksurgery.load(place / "converted"), masksurgery.load(tmp_path / "out")
    assert isinstance(packed, PackedModel) and (packed.layout, packed.dense) == ("unrolled", False)
    (x,), _ = ONE.draw({"args": [{"shape": [2, 3, 64, 64], "dtype": "float32"}], "kwargs": {}})
    with torch.no_grad():
        a, b = model(x).members, packed(x).members
    assert (a - b).abs().max() <= 1e-4 * a.abs().max()
    macs = conversion_macs(masksurgery.checkpoint.load_base(place / "converted"), packed)
    lines = [line.split() for line in done.out.replace(str(place / "converted"), "DIR").splitlines()]
    assert ["layout", "unrolled,", "sums", "by", "index"] in lines
    assert f"{short(macs.late_repeat)}, {macs.ratio:.3f} times the base model's {short(macs.base)}" in done.out
    assert 1 < macs.ratio < 2
    assert lines[-1] == ["Next:", "masksurgery", "bench", str(tmp_path / "out")]


@pytest.mark.slow
def test_pack_with_rows_of_zeros(run: Callable[..., Result], place: Path, tmp_path: Path) -> None:
    done = run("pack", place / "converted", "-o", tmp_path / "out", "--layout", "unrolled", "--dense")
    packed = masksurgery.load(tmp_path / "out")
    assert isinstance(packed, PackedModel) and packed.dense
    assert "layout      unrolled, with rows of zeros" in done.out


def test_barriers_by_reason() -> None:
    found = by_reason([Barrier("cat", "no rule"), Barrier("norm", "mixes channels"), Barrier("cat_1", "no rule")])
    assert found == {"no rule": ["cat", "cat_1"], "mixes channels": ["norm"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("packed", "-o", "new"), "packed is packed already. Give the folder of the converted model."),
        (("converted", "-o", "packed"), "packed is not empty. Pass another folder, or --force"),
        (("converted", "-o", "converted", "--force"), "is the converted model itself, which cannot be had back"),
        (("converted", "-o", "new", "--layout", "flat"), "layout='flat' is not one of 'auto', 'unrolled', 'grouped'"),
        (("none", "-o", "new"), "none: does not exist; a folder that masksurgery.save wrote"),
    ],
)
def test_pack_refuses(run: Callable[..., Result], place: Path, arguments: tuple[str, ...], message: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    directory, flag, output, *more = arguments
    done = run("pack", place / directory, flag, place / output, *more)
    assert done.status == 2 and done.out == ""
    assert message in done.err and len(done.err.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


# --- bench -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bench_of_a_converted_model(
    run: Callable[..., Result], place: Path, tmp_path: Path, no_process: list[Any]
) -> None:
    before = torch.get_num_threads()
    done = run("bench", place / "converted", "--batch", "1,3", "--json", tmp_path / "b.json", *FAST)
    assert (done.status, torch.get_num_threads()) == (0, before)
    found = json.loads((tmp_path / "b.json").read_text())
    rows = {(row["variant"], row["batch"]): row for row in found["measurements"]}
    assert list(rows) == [(name, batch) for batch in (1, 3) for name in ("base", "repeat", "late", "packed")]
    macs = {name: rows[name, 1]["macs"] for name, _ in rows}
    assert macs["base"] < macs["packed"] < macs["late"] < macs["repeat"] == 4 * macs["base"]
    for (name, batch), row in rows.items():
        assert len(row["seconds"]) == 4 and row["latency_ms"] > 0
        assert row["images_per_second"] == pytest.approx(1000 * batch / row["latency_ms"])
        assert row["forward_memory_mib"] == {1: 1, 3: 2}[batch]
        assert row["peak_memory_mib"] == row["weights_mib"] + row["forward_memory_mib"]
        assert (row["ratio_to_base"] == 1) == (name == "base")
    assert found["directory"] == str(place / "converted")
    assert found["conditions"] == {"threads": 1, "device": "cpu", "channels_last": False}
    assert found["details"]["packed"]["layout"] in ("unrolled", "grouped")
    details = found["details"]["packed"]
    assert no_process[-1][0] == ("packed", place / "converted", False, details["layout"], details["dense"])
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    row = next(line.split() for line in lines if line.split()[:1] == ["packed"])
    assert row[-2:] == [f"{rows['packed', 1]['parameters'] / 1e3:.2f}", "k"]
    assert row[1] == f"{rows['packed', 1]['latency_ms']:.1f}"


@pytest.mark.slow
def test_bench_chooses_what_to_compare_with(
    run: Callable[..., Result], place: Path, tmp_path: Path, no_process: list[Any]
) -> None:
    done = run("bench", place / "converted", "--against", "late", "--batch", 2, "--json", tmp_path / "b.json", *FAST)
    rows = json.loads((tmp_path / "b.json").read_text())["measurements"]
    assert [(row["variant"], row["batch"], row["ratio_to_base"]) for row in rows] == [
        ("late", 2, None), ("packed", 2, None)
    ]  # fmt: skip
    assert [line.split()[-6] for line in done.out.splitlines()[2:4]] == ["-", "-"]  # no ratio


@pytest.mark.slow
def test_bench_of_a_packed_model(
    run: Callable[..., Result], place: Path, tmp_path: Path, no_process: list[Any]
) -> None:
    done = run("bench", place / "packed", "--batch", 1, "--json", tmp_path / "b.json", *FAST)
    assert done.status == 0
    base, packed = json.loads((tmp_path / "b.json").read_text())["measurements"]
    assert (base["variant"], packed["variant"]) == ("base", "packed")
    real = masksurgery.checkpoint.load_base(place / "converted")
    assert base["macs"] == count_macs(real, (torch.zeros(1, 3, 64, 64),)) < packed["macs"]
    assert base["parameters"] == sum(x.numel() for x in real.parameters())


def test_a_dash_where_memory_cannot_be_measured(
    run: Callable[..., Result], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "none")
    done = run("bench", place / "packed", "--against", "", "--batch", 1, "--json", tmp_path / "b.json", *FAST)
    (row,) = json.loads((tmp_path / "b.json").read_text())["measurements"]
    assert (row["peak_memory_mib"], row["forward_memory_mib"]) == (None, None) and row["weights_mib"] > 0
    assert done.out.splitlines()[2].split()[6:8] == ["-", f"{row['macs'] / 1e6:.2f}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("packed", "--against", "base,late"), "holds a packed model, and 'late' needs the converted one. Give the"),
        (("packed", "--against", "repeat"), "holds a packed model, and 'repeat' needs the converted one."),
        (("converted", "--against", "base,lat"), "against='lat' is not one of 'base', 'repeat', 'late'."),
        (("converted", "--batch", "1,x"), "--batch=1,x is no list of positive numbers. Pass such as --batch 1,8."),
        (("converted", "--batch", "0"), "--batch=0 is no list of positive numbers."),
        (("converted", "--batch", ","), "--batch=, is no list of positive numbers."),
        (("converted", "--device", "abacus"), "device='abacus' cannot be used"),
        (("converted", "--json", "none/b.json"), "none/b.json cannot be written: there is no folder"),
        (("none",), "none: does not exist; a folder that masksurgery.save wrote"),
    ],
)
def test_bench_refuses(
    run: Callable[..., Result], place: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    done = run("bench", *arguments)
    assert (done.status, done.out) == (2, "")
    assert message in done.err and len(done.err.splitlines()) == 1


# --- the variants of a folder ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_variant_is_made_again_as_it_was(place: Path) -> None:
    variants = open_variants(place / "converted", None, ONE)
    outputs = {}
    for variant in variants:
        assert variant.again is not None
        args, kwargs = ONE.draw(variant.inputs(2))
        with torch.no_grad():
            one, other = variant.model(*args, **kwargs), variant.again()(*args, **kwargs)
        outputs[variant.name] = one if variant.name == "base" else one.members
        again = other if variant.name == "base" else other.members
        assert torch.equal(outputs[variant.name], again)
    for name in ("repeat", "packed"):
        assert (outputs[name] - outputs["late"]).abs().max() <= 1e-4 * outputs["late"].abs().max()


@pytest.mark.slow
def test_what_was_chosen_here_is_not_chosen_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def pack(model: Any, layout: str, *, dense: bool | None) -> PackedModel:
        asked.append((layout, dense, torch.get_num_threads()))
        return masksurgery.pack(model, "unrolled", dense=True)

    monkeypatch.setattr(bench_folder, "pack", pack)
    (packed,) = open_variants(place / "converted", [], Conditions(2))
    assert packed.details == {"layout": "unrolled", "dense": True, "barriers": 0}
    assert packed.again is not None
    packed.again()
    assert asked == [("auto", None, 2), ("unrolled", True, 1)]


def test_the_base_of_a_packed_model_has_ordinary_weights(place: Path) -> None:
    state = torch.get_rng_state()
    one, other = (make_variant("base", place / "packed") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        a, b = (model(torch.ones(2, 3, 64, 64)) for model in (one, other))
    assert torch.equal(a, b) and a.isfinite().all() and 1e-3 < a.std() < 1e3


@pytest.mark.slow
@pytest.mark.skipif(not os.access(memory.CLEAR_REFS, os.W_OK), reason="memory cannot be measured on this system")
def test_memory_of_a_folder(run: Callable[..., Result], place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "converted", tmp_path / "model")
    run("bench", tmp_path / "model", "--batch", "2,8", "--json", tmp_path / "b.json", *FAST)
    rows = json.loads((tmp_path / "b.json").read_text())["measurements"]
    peaks = {(row["variant"], row["batch"]): row["forward_memory_mib"] for row in rows}
    assert 3 < peaks["repeat", 8] / peaks["base", 8] < 5
    assert 3 < peaks["repeat", 8] / peaks["repeat", 2] < 5
    assert peaks["packed", 8] < peaks["repeat", 8] / 2

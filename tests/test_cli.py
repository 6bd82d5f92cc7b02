"""The command line: what it prints and writes, and what it says of bad input."""

import csv
import io
import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from timm.data import ImageNetInfo, create_transform, resolve_data_config

import masksurgery
from masksurgery.checkpoint import save_calibration
from masksurgery.cli import app
from masksurgery.predict import Entry, Row
from masksurgery.scores import Threshold
from masksurgery.tables import by_reason, prediction_table, short
from masksurgery.types import Skipped

SMALL = ("test_resnet", "--no-pretrained")

FACTORIES = """
import os, signal, time
import torch, masksurgery
from torch import nn

def vectors():
    model = nn.Sequential()
    model.inner, model.act, model.outer = nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)
    model.example_inputs = (torch.zeros(1, 10),)
    return model

def converted():
    model = masksurgery.convert(vectors(), where="head", example_inputs=(torch.zeros(1, 10),))
    model.example_inputs = (torch.zeros(1, 10),)
    return model

def no_layers():
    model = nn.Sequential(nn.Flatten(), nn.ReLU())
    model.example_inputs = (torch.zeros(1, 10),)
    return model

def no_inputs():
    return nn.Linear(3, 3)

def interrupted():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""


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
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model of 1,000 classes, masked before its output layer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved") / "model"
    with pytest.raises(SystemExit):
        app(["convert", *SMALL, "-o", str(folder), "--where", "head"])
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images in two folders, a hidden one and a text."""
    rng = np.random.default_rng(0)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name in ("b.png", "a.JPG", "more/c.png", ".hidden.png"):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / name, format="PNG" if name.endswith("png") else "JPEG")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's in the working directory."""
    name = f"factories_of_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return name


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_prints_what_convert_does_as_json(run: Callable[..., Result]) -> None:
    options = ("--n", 3, "--scale", 1.5, "--include", "stages.*", "--include", "stem", "--exclude", "stages.0.*")
    result = run("inspect", "test_resnet", "--json", *options, "--after", "Conv2d, BatchNorm2d")
    expected = masksurgery.convert(
        timm.create_model("test_resnet"), 3, 1.5, include=["layer*"], exclude=["layer1.*"], after=["Conv2d"]
    )
    assert result.status == 2  # names of another family
    assert "matches none" in result.err
    options = ("--n", 3, "--scale", 1.5, "--include", "layer*", "--exclude", "layer1.*", "--after", "Conv2d")
    result = run("inspect", "test_resnet", "--json", *options)
    assert (result.status, result.err) == (0, "")
    found = json.loads(result.out)
    macs = found.pop("macs")
    assert found == {
        "model": "test_resnet", "where": "all", "task": "classification", **json.loads(expected.surgery.to_json())
    }  # fmt: skip
    assert macs["input_repeat"] == 3 * macs["base"] > 3 * macs["late_repeat"] / 3 > macs["base"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_inspect_lists_every_layer_in_80_columns(run: Callable[..., Result], name: str) -> None:
    result = run("inspect", name)
    assert (result.status, result.err) == (0, "")
    lines = result.out.splitlines()
    assert max(map(len, lines)) <= 80
    surgery = masksurgery.convert(timm.create_model(name)).surgery
    words = set(result.out.replace(",", " ").split())
    for site in surgery.sites:
        row = [str(word) for word in (site.layer, site.node, site.channels, site.ones)]
        assert row in [line.split() for line in lines]
        assert words.issuperset(site.chain)
    assert words.issuperset(skip.layer for skip in surgery.skipped)
    assert len(surgery.skipped) > 0
    assert f"{len(surgery.sites)} sites, {len(surgery.skipped)} layers skipped, n=4, scale=2" in lines[0]
    assert next(line.split()[-1] for line in lines if "repeated" in line) == "4.000"


@pytest.mark.slow
def test_inspect_shows_heads_and_streams(run: Callable[..., Result]) -> None:
    options = ("--heads", "--tie", "stream", "--multiple-of", 16)
    lines = [line.strip() for line in run("inspect", "test_vit", *options).out.splitlines()]
    row = next(i for i, line in enumerate(lines) if line.startswith("blocks.0.attn.qkv "))
    assert lines[row].split()[2:] == ["64", "32"] and lines[row + 1] == "2 heads"
    assert lines.count("masks of patch_embed.proj") == 12  # proj and fc2 of six blocks
    assert not any(line.startswith("masks of patch_embed.proj") for line in lines[:row])
    sites = json.loads(run("inspect", "test_vit", "--json", *options).out)["sites"]
    assert {(site["heads"], site["ones"]) for site in sites if site["layer"].endswith("qkv")} == {(2, 32)}
    assert [site["layer"] for site in sites if site["stream"] == site["mask"]] == ["patch_embed.proj"]


@pytest.mark.slow
def test_inspect_changes_the_model_as_it_is_told(run: Callable[..., Result]) -> None:
    options = (
        "--num-classes",
        7,
        "--in-chans",
        1,
        "--img-size",
        96,
        "--model-kwargs",
        '{"global_pool": "max"}',
        "--task",
        "multilabel",
    )
    found = json.loads(run("inspect", "test_resnet", "--json", "--where", "head", *options).out)
    assert [site["layer"] for site in found["sites"]] == ["fc"]
    assert (found["where"], found["task"]) == ("head", "multilabel")
    plain = json.loads(run("inspect", "test_resnet", "--json", "--where", "head").out)
    assert found["macs"]["base"] < plain["macs"]["base"] * (96 / 160) ** 2


def test_reasons_that_differ_in_a_number_are_one() -> None:
    skipped = [
        Skipped("a", "reshaped: 'reshape' splits"),
        Skipped("b", "reshaped: 'reshape_12' splits"),
        Skipped("b", "reshaped: 'reshape_14' splits"),
        Skipped("c", "no call: 'blocks.1.attn' reads"),
        Skipped("d", "no call: 'blocks.2.attn' reads"),
    ]
    assert by_reason(skipped) == {
        "reshaped: 'reshape' splits": ["a", "b"],
        "no call: 'blocks.*.attn' reads": ["c", "d"],
    }


@pytest.mark.parametrize(("count", "text"), [(12, "12"), (1500, "1.50 k"), (4089184256, "4.09 G"), (2.5e12, "2.50 T")])
def test_short_counts(count: int, text: str) -> None:
    assert short(count) == text


# --- convert ---------------------------------------------------------------------------------------------------------


def test_convert_head_ends_with_predict(run: Callable[..., Result], tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    result = run("convert", *SMALL, "-o", folder, "--where", "head", "--verify", "--n", 2)
    assert (result.status, result.err) == (0, "")
    text = " ".join(result.out.split())
    assert "members 2 (scale 2, seed 0)" in text
    (site,) = masksurgery.load(folder).surgery.sites
    assert f"sites 1; each member keeps {site.ones / site.channels:.1%} of their channels" in text
    assert "times the base model's" in text
    assert 'not an output layer (where="head" masks only what those read)' in text
    assert "verified relative error" in text and "in float64; masks checked 1 by pre-hook" in text
    assert result.out.splitlines()[-1] == f"Next: masksurgery finetune '{folder}' --data FOLDER -o tuned"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.slow
def test_convert_passes_every_option_on(run: Callable[..., Result], tmp_path: Path) -> None:
    options = (
        "--n", 3, "--scale", 1.7, "--after", "Conv2d", "--include", "layer2.*", "--exclude", "*.conv1", "--seed", 5,
        "--task", "regression", "--train-mode", "repeat", "--no-rescale", "--num-classes", 2, "--in-chans", 1,
        "--model-kwargs", '{"drop_rate": 0.25}', "--multiple-of", 16, "--tie", "stream",
    )  # fmt: skip
    result = run("convert", *SMALL, "-o", tmp_path / "m", *options)
    assert (result.status, result.err) == (0, "")
    model = masksurgery.load(tmp_path / "m")
    config, surgery = model.settings, model.surgery
    assert (config.n, config.scale, config.after, config.seed) == (3, 1.7, (torch.nn.Conv2d,), 5)
    assert (config.task, config.train_mode, config.rescale, config.where) == ("regression", "repeat", False, "all")
    assert model.recipe["kwargs"] == {"num_classes": 2, "in_chans": 1, "drop_rate": 0.25}
    base = timm.create_model("test_resnet", num_classes=2, in_chans=1)
    twin = masksurgery.convert(
        base, 3, 1.7, after="Conv2d", include="layer2.*", exclude="*.conv1", seed=5, task="regression", multiple_of=16,
        tie="stream",
    )  # fmt: skip
    assert (config.multiple_of, config.tie) == (16, "stream") and surgery.sites[0].stream
    assert {site.ones % 16 for site in surgery.sites} == {0}
    assert surgery.sites == twin.surgery.sites and len(surgery.sites) > 0
    assert all(np.array_equal(surgery.masks[site.mask], twin.surgery.masks[site.mask]) for site in surgery.sites)


def test_convert_everywhere_asks_for_fine_tuning_once(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("convert", *SMALL, "-o", tmp_path / "m")
    assert (result.status, result.err) == (0, "")
    assert result.out.count("fine-tune") == 1 and "predict DIR" not in result.out
    assert result.out.splitlines()[-1] == f"Next: masksurgery finetune {tmp_path / 'm'} --data FOLDER -o tuned"
    assert logging.getLogger("masksurgery").handlers == []


@pytest.mark.slow
def test_convert_reads_weights(run: Callable[..., Result], tmp_path: Path) -> None:
    base = timm.create_model("test_resnet").eval()
    torch.save(base.state_dict(), tmp_path / "weights.pth")
    result = run("convert", "test_resnet", "-o", tmp_path / "m", "--checkpoint", tmp_path / "weights.pth")
    assert result.status == 0
    state = masksurgery.load(tmp_path / "m").state_dict()
    head = run(
        "convert", "test_resnet", "-o", tmp_path / "h", "--checkpoint", tmp_path / "weights.pth", "--where", "head"
    )
    assert head.out.splitlines()[-1] == f"Next: masksurgery predict {tmp_path / 'h'} photo.jpg"
    assert all(torch.equal(state[name], x) for name, x in base.state_dict().items())


def test_a_model_of_ones_own(run: Callable[..., Result], factories: str, tmp_path: Path) -> None:
    result = run("convert", f"{factories}:vectors", "-o", "m", "--where", "head")
    assert (result.status, result.err) == (0, "")
    assert result.out.splitlines()[-1] == "Next, in Python: model = masksurgery.load('m')"
    Image.new("RGB", (8, 8)).save("x.png")
    assert "is not run unasked" in run("predict", "m", "x.png").err
    refused = run("predict", "--trust", "m", "x.png")
    assert (refused.status, refused.out) == (2, "")
    assert "for models of one image" in refused.err and "float32[1, 10]" in refused.err


@pytest.mark.slow
def test_a_folder_is_not_overwritten_unasked(run: Callable[..., Result], tmp_path: Path, saved: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(saved, folder)
    before = (folder / "config.json").read_bytes()
    result = run("convert", *SMALL, "-o", folder)
    assert (result.status, result.out) == (2, "")
    assert f"-o {folder} is not empty" in result.err and "--force" in result.err
    assert (folder / "config.json").read_bytes() == before
    assert run("convert", *SMALL, "-o", folder, "--force", "--n", 2).status == 0
    assert masksurgery.load(folder).surgery.n == 2
    (tmp_path / "empty").mkdir()
    assert run("convert", *SMALL, "-o", tmp_path / "empty").status == 0


def test_the_output_is_checked_before_the_model_is_built(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("masksurgery.factory.create_base", lambda *args, **kwargs: pytest.fail("built"))
    (tmp_path / "file").write_text("x")
    assert "file is a file. Pass a folder" in run("convert", *SMALL, "-o", tmp_path / "file").err
    assert "is not a folder that you may write to" in run("convert", *SMALL, "-o", tmp_path / "file" / "m").err
    assert "scale=0.5 is not a finite number" in run("convert", *SMALL, "-o", tmp_path / "m", "--scale", 0.5).err


@pytest.mark.slow
def test_what_cannot_be_verified_is_not_written(
    run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise masksurgery.VerificationError("A member differs\nby 0.5.")

    monkeypatch.setattr(masksurgery, "verify", refuse)
    result = run("convert", *SMALL, "-o", tmp_path / "m", "--verify")
    assert result == (2, "", "masksurgery: error: A member differs by 0.5.\n")
    assert not (tmp_path / "m").exists()


def test_other_exceptions_are_not_swallowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(masksurgery, "convert", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        app(["convert", *SMALL, "-o", str(tmp_path / "m")])
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_a_checkpoint_for_other_classes_and_pixels(run: Callable[..., Result], tmp_path: Path, photos: Path) -> None:
    base, folder = timm.create_model("test_resnet").eval(), tmp_path / "m"
    torch.save(base.state_dict(), tmp_path / "weights.pth")
    options = ("--checkpoint", tmp_path / "weights.pth", "--num-classes", 3, "--img-size", 64, "--where", "head")
    status, _, err = run("convert", "test_resnet", "-o", folder, *options)
    assert (status, err) == (0, "masksurgery: warning: fc: new, 3 classes (the checkpoint has 1000)\n")
    assert run("predict", folder, photos / "b.png", "--json", photos / "out.json").status == 0
    model = masksurgery.load(folder)
    state = model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in base.state_dict().items() if not name.startswith("fc."))
    # By hand: the shorter side of 40 x 50 pixels to 64 / crop_pct, and of that the middle.
    cfg = model.pretrained_cfg
    side = math.floor(64 / cfg["crop_pct"])
    image = Image.open(photos / "b.png").resize((int(side * 50 / 40), side), Image.Resampling.BILINEAR)
    left, top = round((image.width - 64) / 2), round((image.height - 64) / 2)
    pixels = np.asarray(image.crop((left, top, left + 64, top + 64)), dtype=np.float32) / 255
    x = torch.from_numpy((pixels - np.float32(cfg["mean"])) / np.float32(cfg["std"])).permute(2, 0, 1)[None]
    (row,) = json.loads((photos / "out.json").read_text())
    with torch.no_grad():
        means = model(x).mean[0].sort(descending=True).values
    assert [entry["mean"] for entry in row["entries"]] == pytest.approx(means.tolist(), rel=1e-4)
    assert len(row["entries"]) == 3


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("test_resnet --n 0", "n=0 is not a number of members"),
        ("test_resnet --n four", "Invalid value for '--n'"),
        ("test_resnet --scale 0.9", "scale=0.9 is not a finite number of at least 1"),
        ("test_resnet --scale nan", "scale=nan is not a finite number of at least 1"),
        ("test_resnet --heads", "heads=True finds no attention in ResNet"),
        ("test_vit --heads --where head", "heads=True masks attention inside of the network"),
        ("test_resnet --tie block", "tie='block' is not \"stream\""),
        ("test_resnet --multiple-of 0", "multiple_of=0 is not a positive integer"),
        ("test_resnet --where body", "where='body' is not one of 'all', 'head'"),
        ("test_resnet --task sorting", "task='sorting' is not one of 'classification'"),
        ("test_resnet --train-mode all", "train_mode='all' is not one of 'split', 'repeat'"),
        ("test_resnet --seed -1", "seed=-1 is not a non-negative integer"),
        ("test_resnet --after ,", "selects nothing"),
        ("test_resnet --after Conv2b", "after names 'Conv2b'.* Did you mean Conv2d"),
        ("test_resnet --after LSTM", r"after=\(LSTM\) selects nothing in ResNet. It has Conv2d"),
        ("test_resnet --include layre1.*", r"include=\['layre1.\*'\] matches none.*[Cc]losest names: layer1"),
        ("test_resnet --include layer1.* --exclude layer*", r"exclude=\['layer\*'\] leaves nothing"),
        ("test_resnet --model-kwargs {", "--model-kwargs={ is not JSON"),
        ("test_resnet --model-kwargs [1]", r"--model-kwargs=\[1\] is not a JSON object"),
        ('test_resnet --model-kwargs {"depth":3}', "depth"),
        ("test_resnet --num-classes 0", "Invalid value for '--num-classes'"),
        ("test_resnet --img-size 0", "Invalid value for '--img-size'"),
        ("test_vit --img-size 65", "'test_vit' does not take images of 65 x 65 pixels.*Pass 64 or 80"),
        ("FACTORIES:vectors --img-size 8", r"img_size=8 \(--img-size\) is for models of timm and torchvision"),
        ("test_resnet --checkpoint nowhere.pth", "Invalid value for '--checkpoint'.*nowhere.pth"),
        ("resnet5", "There is no timm model 'resnet5'. Did you mean resnet50"),
        ("no_such_module_at_all:f", "no_such_module_at_all"),
        ("FACTORIES:converted", "is converted"),
        ("FACTORIES:no_layers", "no convolution and no Linear"),
        ("FACTORIES:no_inputs", "does not say what it takes"),
        ("FACTORIES:vectors --task classification --nn 3", "No such option: --nn"),
        ("", "Missing argument 'MODEL'"),
    ],
)
def test_bad_input(run: Callable[..., Result], factories: str, tmp_path: Path, arguments: str, message: str) -> None:
    given = arguments.replace("FACTORIES", factories).split()
    result = run("convert", *given, "--no-pretrained", "-o", tmp_path / "m")
    assert (result.status, result.out) == (2, "")
    assert result.err.startswith("masksurgery: error: ") and result.err.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(result.err)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no folder", "{photos}"], "no folder: does not exist"),
        (["{saved}", "nowhere.jpg"], "'nowhere.jpg' does not exist"),
        (["{saved}", "{empty}"], "No image in '.*empty'. Images end in .*.jpg"),
        (["{saved}"], "Missing argument 'PATH'"),
        (["{saved}", "{photos}", "--topk", "0"], "Invalid value for '--topk'"),
        (["{saved}", "{photos}", "--csv", "no/where.csv"], "no/where.csv cannot be written: there is no folder"),
        (["{empty}", "{photos}"], "config.json"),
    ],
)
def test_bad_input_of_predict(
    run: Callable[..., Result], tmp_path: Path, saved: Path, photos: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"saved": saved, "photos": photos, "empty": tmp_path / "empty"}
    result = run("predict", *(argument.format(**places) for argument in arguments))
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    with pytest.raises(ValueError, match=f"^masksurgery: error: .*{message}"):
        raise ValueError(result.err)


def test_help_and_version(run: Callable[..., Result]) -> None:
    assert run("--version") == (0, f"masksurgery {masksurgery.__version__}\n", "")
    for arguments in ((), ("--help",)):
        result = run(*arguments)
        assert (result.status, result.err) == (0, "")
        assert all(f"\n  {command} " in result.out for command in ("inspect", "convert", "predict"))
    assert max(map(len, run("convert", "--help").out.splitlines())) <= 80
    assert run("fit").err == "masksurgery: error: No such command 'fit'.\n"


# --- predict ---------------------------------------------------------------------------------------------------------


def expected(folder: Path, images: list[Path]) -> masksurgery.Prediction:
    """The prediction of a saved model, prepared by timm alone."""
    model = masksurgery.load(folder)
    transform = create_transform(**resolve_data_config({}, pretrained_cfg=model.pretrained_cfg))
    batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in images])
    with torch.no_grad():
        return model(batch)


def test_predict_writes_what_the_model_says(run: Callable[..., Result], saved: Path, photos: Path) -> None:
    names = [photos / "a.JPG", photos / "b.png", photos / "more" / "c.png"]
    files = ("--json", photos / "out.json", "--csv", photos / "out.csv")
    result = run("predict", saved, photos, photos / "b.png", "--topk", 3, *files)
    assert (result.status, result.err) == (0, "")
    p = expected(saved, names)
    labels = ImageNetInfo("imagenet-1k").label_descriptions()
    rows = json.loads((photos / "out.json").read_text())
    assert [row["path"] for row in rows] == [str(name) for name in names]
    for i, row in enumerate(rows):
        best = p.mean[i].argsort(descending=True)[:3].tolist()
        assert [entry["index"] for entry in row["entries"]] == best
        assert [entry["label"] for entry in row["entries"]] == [labels[k] for k in best]
        assert [entry["mean"] for entry in row["entries"]] == pytest.approx(p.mean[i, best].tolist(), rel=1e-4)
        stds = p.variance[i, best].sqrt().tolist()
        assert [entry["std"] for entry in row["entries"]] == pytest.approx(stds, rel=1e-3)
        assert row["entropy"] == pytest.approx(p.entropy[i].item(), rel=1e-5)
        assert row["mutual_information"] == pytest.approx(p.mutual_information[i].item(), rel=1e-2, abs=1e-6)
    with (photos / "out.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [(line["path"], line["rank"]) for line in lines] == [
        (str(name), str(k)) for name in names for k in (1, 2, 3)
    ]
    assert [float(line["mean"]) for line in lines] == [entry["mean"] for row in rows for entry in row["entries"]]
    assert {float(line["entropy"]) for line in lines[:3]} == {rows[0]["entropy"]}


def test_predict_prints_a_table(
    run: Callable[..., Result], saved: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    result = run("predict", saved, "a.JPG", "b.png", "--topk", 2)
    lines = result.out.splitlines()
    assert lines[0].split() == ["image", "label", "mean", "std", "entropy", "mutual", "inf."]
    assert max(map(len, lines)) <= 80
    p = expected(saved, [Path("a.JPG")])
    first = lines[1].split()
    numbers = (p.mean.max(), p.variance[0, p.mean.argmax()].sqrt(), p.entropy, p.mutual_information)
    assert (first[0], first[-4:]) == ("a.JPG", [f"{x.item():.3f}" for x in numbers])


def test_predict_withholds_an_answer_that_is_unsure(
    run: Callable[..., Result], saved: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    entropies = expected(saved, [Path("a.JPG"), Path("b.png")]).entropy
    shutil.copytree(saved, "fitted")
    save_calibration("fitted", temperature=None, threshold=Threshold("entropy", entropies.mean().item()))
    result = run("predict", "fitted", "a.JPG", "b.png", "--topk", 1, "--json", "out.json", "--csv", "out.csv")
    assert (result.status, result.err) == (0, "")
    refused = [x > entropies.mean() for x in entropies.tolist()]
    assert sorted(refused) == [False, True]
    firsts = [line for line in result.out.splitlines() if line.startswith(("a.JPG", "b.png"))]
    assert [line.split()[1] == "unsure" for line in firsts] == refused
    assert [row["unsure"] for row in json.loads(Path("out.json").read_text())] == refused
    with Path("out.csv").open(newline="") as stream:
        assert [line["unsure"] == "true" for line in csv.DictReader(stream)] == refused


@pytest.mark.parametrize("terminal", [False, True])
def test_a_table_of_unsure_images(terminal: bool) -> None:
    sure, other = Entry(0, "cat", 0.9, 0.01), Entry(1, "bee eater", 0.1, 0.02)
    rows = [Row("a.png", (sure, other), 0.3, 0.1, False), Row("b.png", (other, sure), 0.6, 0.2, True)]
    label, number = Entry(2, "tall", 0.5, 0.0, 0.69, 0.02), Entry(0, "output 0", 12.5, 3.25)
    console = Console(width=80, record=True, file=io.StringIO(), force_terminal=terminal, markup=False, highlight=False)

    def show(rows: list[Row]) -> list[list[str]]:
        console.print(prediction_table(rows))
        return [line.split() for line in console.export_text().splitlines()[1:]]

    assert show(rows) == [
        ["a.png", "cat", "0.900", "0.010", "0.300", "0.100"],
        ["bee", "eater", "0.100", "0.020"],
        ["b.png", "unsure", "0.600", "0.200"],
        ["(bee", "eater)", "0.100", "0.020"],
        ["(cat)", "0.900", "0.010"],
    ]
    assert show([Row("c.png", (label,), unsure=True), Row("d.png", (label,), unsure=False)]) == [
        ["c.png", "unsure"],
        ["(tall)", "0.500", "0.000", "0.690", "0.020"],
        ["d.png", "tall", "0.500", "0.000", "0.690", "0.020"],
    ]
    assert show([Row("e.png", (number,), unsure=True)]) == [["e.png", "unsure"], ["(output", "0)", "12.5", "3.25"]]


def test_a_broken_image_is_named_and_the_others_are_predicted(
    run: Callable[..., Result], saved: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    whole = (photos / "a.JPG").read_bytes()
    (photos / "a.JPG").write_bytes(whole[: len(whole) // 2])
    (photos / "more" / "d.png").write_text("no image")
    result = run("predict", saved, ".", "--json", "out.json")
    assert result.status == 1
    errors = result.err.splitlines()
    assert [error.split("'")[1] for error in errors] == ["a.JPG", "more/d.png"]
    assert errors[1].endswith("cannot be read as an image: it is of no format that PIL knows")
    assert [row["path"] for row in json.loads(Path("out.json").read_text())] == ["b.png", "more/c.png"]
    assert [line.split()[0] for line in result.out.splitlines()[1::5]] == ["b.png", "more/c.png"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["regression", "multilabel"])
def test_other_tasks(run: Callable[..., Result], photos: Path, task: str) -> None:
    folder = photos / "model"
    run("convert", *SMALL, "-o", folder, "--where", "head", "--task", task, "--num-classes", 4, "--in-chans", 1)
    result = run("predict", folder, photos / "b.png", "--json", photos / "out.json", "--csv", photos / "out.csv")
    assert (result.status, result.err) == (0, "")
    (row,) = json.loads((photos / "out.json").read_text())
    assert set(row) == {"path", "entries"}
    means = [entry["mean"] for entry in row["entries"]]
    if task == "regression":
        assert [entry["label"] for entry in row["entries"]] == [f"output {k}" for k in range(4)]
        assert set(row["entries"][0]) == {"index", "label", "mean", "std"}
        assert "entropy" not in result.out
    else:
        assert [entry["label"] for entry in row["entries"]] == [f"class {entry['index']}" for entry in row["entries"]]
        assert means == sorted(means, reverse=True)
        for entry in row["entries"]:
            q = entry["mean"]
            assert entry["entropy"] == pytest.approx(-q * math.log(q) - (1 - q) * math.log(1 - q), rel=1e-4)
            assert 0 <= entry["mutual_information"] <= entry["entropy"]
    with (photos / "out.csv").open(newline="") as stream:
        assert [float(line["std"]) for line in csv.DictReader(stream)] == [entry["std"] for entry in row["entries"]]


# --- processes -------------------------------------------------------------------------------------------------------


def start(*arguments: Any) -> Result:
    """A command in a process of its own: output and errors are apart, and only the exit status tells the shell."""
    command = [sys.executable, "-m", "masksurgery", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "80"})
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.mark.slow
def test_a_process_that_predicts(photos: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "more" / "c.png").write_bytes(b"")
    monkeypatch.chdir(photos.parent)
    status, out, err = start("predict", saved, "photos", "--topk", 1)
    assert status == 1 and len(out.splitlines()) >= 3 and err.count("\n") == 1 and "photos/more/c.png" in err


@pytest.mark.slow
def test_a_process_that_is_interrupted(factories: str) -> None:
    assert start("convert", f"{factories}:interrupted", "-o", "other") == (130, "", "")
    assert not Path("other").exists()


@pytest.mark.slow
def test_processes(factories: str) -> None:
    status, out, err = start("convert", *SMALL, "-o", "model", "--where", "head")
    assert (status, err) == (0, "") and out.startswith("test_resnet is now an ensemble in model\n")
    status, out, err = start("inspect", "test_resnet", "--json")
    assert (status, err, json.loads(out)["n"]) == (0, "", 4)
    status, out, err = start("convert", *SMALL, "-o", "other", "--n", 0)
    assert (status, out) == (2, "") and err.count("\n") == 1 and "Traceback" not in err
    assert not Path("other").exists()

"""Damaged, foreign and half-written folders: each gives a CheckpointError that names the file and the key."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import masksurgery
from masksurgery import CheckpointError
from masksurgery.checkpoint import CONFIG, WEIGHTS
from masksurgery.record import Record
from masksurgery.scores import Threshold
from test_checkpoint import GoldenNet, Small, assert_equal, predict, small

MASK = "conv_mask.masks"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _, model = small()
    model.recipe = {"source": "factory", "name": "module:factory", "kwargs": {}}
    model.temperature, model.threshold = 1.5, Threshold("entropy", 0.7)
    return masksurgery.save(model, tmp_path / "saved")


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    with safe_open(folder / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)


def fails(folder: Path, file: str, message: str, base: nn.Module | None = None) -> None:
    with pytest.raises(CheckpointError, match=f"{re.escape(str(folder / file))}: {message}"):
        masksurgery.load(folder, base=base or Small())


# --- config.json -----------------------------------------------------------------------------------------------------


def paths(kind: Any, where: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Every field of a record, and of the records in it; `[0]` stands for any entry of a list."""
    found: list[tuple[str | int, ...]] = []
    for f in fields(kind):
        hint = get_type_hints(kind)[f.name]
        inner = [part for part in (hint, *get_args(hint)) if is_dataclass(part)]
        found.append((*where, f.name))
        for part in inner:
            index: tuple[int, ...] = (0,) if get_origin(hint) is tuple else ()
            found += paths(part, (*where, f.name, *index))
        if get_origin(hint) is tuple and not inner:
            found.append((*where, f.name, 0))
    return found


FIELDS = paths(Record)
# Of lists that are empty in the saved model.
ENTRIES = {
    "skipped": {"layer": "x", "reason": "y"},
    "parts": {"name": "x", "first": {"args": [], "kwargs": {}}, "second": {}, "axes": {}},
}
PACKED = {"layout": "unrolled", "dense": False, "digest": "0123456789abcdef"}  # what only a packed model has


def hint_of(path: tuple[str | int, ...]) -> Any:
    kind: Any = Record
    for step in path:
        if isinstance(step, str):
            (kind,) = [part for part in (kind, *get_args(kind)) if is_dataclass(part)] or [kind]
            kind = get_type_hints(kind)[step]
        else:
            (kind, *_) = [part for part in get_args(kind) if part not in (type(None), Ellipsis)]
            kind = get_args(kind)[0] if get_origin(kind) is tuple else kind
    return kind


def wrong_values(hint: Any) -> list[Any]:
    """Values of JSON that are not of this type; null only where it is not allowed."""
    arguments = get_args(hint) if get_origin(hint) is Union or type(hint).__name__ == "UnionType" else (hint,)
    wrong: list[Any] = [] if type(None) in arguments else [None]
    (kind,) = [argument for argument in arguments if argument is not type(None)]
    return {
        int: [*wrong, True, 1.5, "1", [1]],
        float: [*wrong, True, "1", [1.5], float("nan")],
        str: [*wrong, 1, ["x"], {}],
        bool: [*wrong, 1, 0, "true"],
    }.get(kind, [*wrong, 3, True, "no such choice"])


def name_of(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in FIELDS if hint_of(path) is not Any], ids=name_of)
def test_every_field_has_a_type(path: tuple[str | int, ...], folder: Path) -> None:
    for value in wrong_values(hint_of(path)):

        def put(config: Any, value: Any = value) -> None:
            config.update(after=["torch.nn.modules.conv.Conv2d"], packed=dict(PACKED))
            for step in path[:-1]:
                if config[step] == []:  # a list without an entry so far
                    config[step] = [copy.deepcopy(ENTRIES.get(step, "x"))]
                config = config[step]
            if isinstance(path[-1], int) and not config:
                config.append(None)
            config[path[-1]] = value

        change_config(folder, put)
        fails(folder, CONFIG, f"'{re.escape(name_of(path))}'")


@pytest.mark.parametrize("path", [path for path in FIELDS if isinstance(path[-1], str)], ids=name_of)
def test_a_missing_or_an_unknown_field(path: tuple[str | int, ...], folder: Path) -> None:
    def parent(config: Any) -> Any:
        config.update({key: [copy.deepcopy(entry)] for key, entry in ENTRIES.items()}, packed=dict(PACKED))
        for step in path[:-1]:
            config = config[step]
        return config

    optional = {"pretrained_cfg", "temperature", "threshold", "packed", "tie", "multiple_of", "heads", "stream"}
    optional |= {"fold", "chain", "readers", "part", "parts", "outer"}
    change_config(folder, lambda config: parent(config).pop(path[-1]))
    if path[-1] not in optional:
        fails(folder, CONFIG, f"'{re.escape(name_of(path))}' is missing")
    change_config(folder, lambda config: parent(config).update({path[-1]: None}))
    change_config(folder, lambda config: parent(config).update({"surplus": 1}))
    name = name_of((*path[:-1], "surplus"))
    if path != ("format_version",):
        fails(folder, CONFIG, f"'{re.escape(name)}' is not a key that this masksurgery knows")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("\xff", "not JSON"),
        ("[]", r"holds \[\], not a JSON object"),
        ("null", "holds null, not a JSON object"),
        ("{}", "'format_version' is missing"),
        ('{"format_version": 2}', "'format_version' is 2; this masksurgery reads 1"),
        ('{"format_version": "1"}', "'format_version' is \"1\"; "),
        ('{"format_version": true}', "'format_version' is true; "),
        (
            '{"format_version": 9, "versions": {"masksurgery": "7.0"}}',
            r"'format_version' is 9 \(written by masksurgery 7\.0\)",
        ),
        ('{"architecture": "resnet50", "num_classes": 1000}', "'format_version' is missing"),
    ],
)
def test_a_config_that_is_none(text: str, message: str, folder: Path) -> None:
    (folder / CONFIG).write_text(text, encoding="latin-1")
    fails(folder, CONFIG, message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("n", 0, "n=0 is not a number of members"),
        ("scale", 0.5, "scale=0.5 is not a finite number of at least 1"),
        ("multiple_of", 0, "multiple_of=0 is not a positive integer"),
        ("seed", -1, "seed=-1 is not a non-negative integer"),
        ("heteroscedastic", True, "heteroscedastic=True needs"),
        ("unbatched", ["y"], r"cannot be applied to Small: unbatched=\('y',\) names"),
        ("temperature", 0, "'temperature' is 0, not a number above 0"),
        ("temperature", -1.5, "'temperature' is -1.5, not a number above 0"),
        ("task", "regression", "'threshold': score='entropy' is none of a regression, which has 'variance'"),
        ("class_dim", 7, "cannot be applied to Small: class_dim=7"),
        ("dtype", "load", "'dtype' is \"load\", not the name of a dtype"),
        ("after", ["os.system"], r"'after' names os\.system, which is no class of torch\.nn nor of Small"),
        ("inputs", {"args": [{"shape": [1, -3], "dtype": "float32"}], "kwargs": {}}, r"'inputs\[0\]\.shape'"),
        ("inputs", {"args": [{"shape": [1, 3, 8, 8], "dtype": "save"}], "kwargs": {}}, r"'inputs\[0\]\.dtype'"),
        ("inputs", {"args": [], "kwargs": {}}, "cannot be applied to Small: example_inputs"),
        ("aliases", {"fc.weight": "conv.weight"}, "which 'aliases' in config.json names"),
        ("aliases", {"twin": "conv.weight"}, "the keys are not those of the base model Small. unexpected: twin"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be(key: str, value: Any, message: str, folder: Path) -> None:
    change_config(folder, lambda config: config.update({key: value}))
    fails(folder, WEIGHTS if key == "aliases" else CONFIG, f".*{message}")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layer", "conv9", r"'sites\[0\]\.layer' names 'conv9', which Small does not have"),
        ("node", "relu_9", r"'sites\[0\]\.node' names 'relu_9'.*torch and timm that 'versions' names"),
        ("readers", ["mean_9"], r"'sites\[0\]\.readers' names 'mean_9'"),
        ("mask", "bn", r"'bn\.masks' is missing"),
        ("channels", 11, rf"'{MASK}' is bool of the shape \(3, 12\), not bool of the shape \(3, 11\)"),
        ("ones", 5, rf"'{MASK}' keeps \[\d+, \d+, \d+\] channels, not 5"),
        ("batch_dim", 2, r"'sites\[0\]\.batch_dim', 'fold' and 'outer' are \(2, 1, 1\), but 'mul' has \(0, 1, 1\)"),
        ("fold", 4, r"'sites\[0\]\.batch_dim', 'fold' and 'outer' are \(0, 4, 1\)"),
        ("outer", 2, r"'sites\[0\]\.batch_dim', 'fold' and 'outer' are \(0, 1, 2\)"),
        ("channel_dim", 2, r"'sites\[0\]\.channel_dim' is 2 with 12 channels, but 'mul' is"),
        ("channel_dim", 9, r"'sites\[0\]\.channel_dim' is 9"),
    ],
)
def test_a_site_that_cannot_be(key: str, value: Any, message: str, folder: Path) -> None:
    change_config(folder, lambda config: config["sites"][0].update({key: value}))
    fails(folder, WEIGHTS if "masks" in message or MASK in message else CONFIG, message)


def test_a_mask_that_would_replace_a_module(folder: Path) -> None:
    change_config(folder, lambda config: config["sites"][0].update(mask="fc"))
    change_tensors(folder, lambda tensors: tensors.update({"fc.masks": tensors.pop(MASK)}))
    fails(folder, CONFIG, r"'sites\[0\]\.mask' is 'fc', which is no name for a new module")
    change_config(folder, lambda config: config["sites"].append(config["sites"][0]))
    fails(folder, CONFIG, r"'sites\[1\]\.mask' is 'fc', which another site has")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"source": "timm", "name": "resnet5", "kwargs": {}}, "There is no timm model 'resnet5'"),
        ({"source": "timm", "name": "hf-hub:a/b", "kwargs": {}}, "There is no timm model 'hf-hub:a/b'"),
        (
            {"source": "timm", "name": "test_resnet", "kwargs": {"checkpoint_path": "x.pth"}},
            "'checkpoint_path' is no argument",
        ),
        ({"source": "timm", "name": "test_resnet", "kwargs": {"pretrained": True}}, "'pretrained' is no argument"),
        ({"source": "timm", "name": "test_resnet", "kwargs": {"colour": 1}}, "cannot be built with model_kwargs"),
        ({"source": "torchvision", "name": "resnet18", "kwargs": {"weights": "DEFAULT"}}, "'weights' is no argument"),
        ({"source": "factory", "name": "os:getcwd", "kwargs": {}}, "'os:getcwd', which is not run unasked"),
    ],
)
def test_a_recipe_that_makes_nothing(base: dict[str, Any], message: str, folder: Path) -> None:
    change_config(folder, lambda config: config.update(base=base))
    with pytest.raises(CheckpointError, match=rf"config\.json: 'base' .*{message}"):
        masksurgery.load(folder)


# --- model.safetensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(MASK), f"'{MASK}' is missing, the masks after 'conv'"),
        (
            lambda t: t.update({MASK: t[MASK][:2]}),
            rf"'{MASK}' is bool of the shape \(2, 12\), not bool of the shape \(3, 12\)",
        ),
        (lambda t: t.update({MASK: t[MASK].t().contiguous()}), rf"'{MASK}' is bool of the shape \(12, 3\)"),
        (lambda t: t.update({MASK: t[MASK].float()}), rf"'{MASK}' is float32 of the shape \(3, 12\), not bool"),
        (lambda t: t[MASK][0].fill_(True), rf"'{MASK}' keeps \[12, \d+, \d+\] channels"),
        (lambda t: t.update({MASK: torch.ones_like(t[MASK])}), rf"'{MASK}' keeps \[12, 12, 12\] channels"),
        (lambda t: t.pop("fc.bias"), "the keys are not those of the base model Small. missing: fc.bias"),
        (lambda t: t.update(extra=torch.ones(1)), "the keys are not those of the base model Small. unexpected: extra"),
        (lambda t: t.update({"fc.bias": torch.ones(6)}), r".*of another shape: fc\.bias \(6,\) instead of \(5,\)"),
        (
            lambda t: t.update({"fc.bias": torch.ones(5, dtype=torch.int64)}),
            "'fc.bias' is torch.int64, not torch.float32",
        ),
        (lambda t: t.clear(), f"'{MASK}' is missing"),
    ],
)
def test_a_tensor_that_is_missing_or_wrong(change: Callable[[Any], Any], message: str, folder: Path) -> None:
    change_tensors(folder, change)
    fails(folder, WEIGHTS, message)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_cut_short(keep: int, folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    fails(folder, WEIGHTS, "not a safetensors file, or cut short")


def test_a_pickle_under_this_name_is_not_read(folder: Path, tmp_path: Path) -> None:
    torch.save({"model": Trap(tmp_path / "trapped")}, folder / WEIGHTS)
    fails(folder, WEIGHTS, "not a safetensors file")
    assert not (tmp_path / "trapped").exists()


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_what_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: does not exist; a folder that masksurgery\.save wrote"):
        masksurgery.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: is a file; a folder"):
        masksurgery.load(folder / CONFIG)
    (folder / WEIGHTS).unlink()
    fails(folder, WEIGHTS, "there is no such file")
    (folder / CONFIG).unlink()
    fails(folder, CONFIG, "there is no such file")


def test_a_base_model_that_is_another(folder: Path) -> None:
    message = (
        "the keys are not those of the base model GoldenNet. missing: conv1.weight, conv1.bias, conv2.weight and 3 more"
    )
    fails(folder, WEIGHTS, message, GoldenNet())

    class Sideways(Small):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)) + self.gain)

    fails(folder, CONFIG, r"'sites\[0\]\.node' names 'mul', which Sideways does not have", Sideways())


def test_files_of_two_saves(folder: Path, tmp_path: Path) -> None:
    _, other = small(seed=1)
    shutil.copy(masksurgery.save(other, tmp_path / "other") / WEIGHTS, folder / WEIGHTS)
    fails(folder, WEIGHTS, r"'masksurgery' is \w+, but 'id' in config\.json \w+: of two saves")


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "first replace", "second replace", "save_file"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_leaves_what_was_there(
    call: str, error: BaseException, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    base, other = small(seed=1)
    calls = iter([error, None, None]) if call != "second replace" else iter([None, error, None])
    replace = os.replace

    def fail(*args: Any, **kwargs: Any) -> None:
        failure = next(calls, None)
        if failure is not None:
            raise failure
        replace(*args)

    target = {"fsync": "os.fsync", "save_file": "masksurgery.weights.save_file"}.get(call, "os.replace")
    for place in (folder, tmp_path / "new"):
        with monkeypatch.context() as patch:
            patch.setattr(target, fail)
            with pytest.raises(
                (CheckpointError, KeyboardInterrupt), match="no space left" if isinstance(error, OSError) else None
            ):
                masksurgery.save(other, place)
        calls = iter([error, None, None]) if call != "second replace" else iter([None, error, None])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "new" / CONFIG).exists()
    assert_equal(other, masksurgery.load(masksurgery.save(other, folder), base=base), torch.randn(2, 3, 8, 8))


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    _, model = small()
    (tmp_path / CONFIG).write_text('{"architecture": "resnet50"}')
    with pytest.raises(CheckpointError, match=r"config\.json: exists, and masksurgery\.save did not write it"):
        masksurgery.save(model, tmp_path)
    assert (tmp_path / CONFIG).read_text() == '{"architecture": "resnet50"}'
    (tmp_path / CONFIG).unlink()
    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: exists"):
        masksurgery.save(model, tmp_path)
    (tmp_path / "notes.txt").write_text("kept")
    masksurgery.save(model, tmp_path, force=True)
    assert len(predict(masksurgery.load(tmp_path, base=Small()), torch.zeros(1, 3, 8, 8))) == 6
    assert (tmp_path / "notes.txt").read_text() == "kept"


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    base, model = small()
    with pytest.raises(masksurgery.ConfigError, match="save takes a converted or packed model, not Small"):
        masksurgery.save(base, tmp_path / "a")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: cannot be written"):
        masksurgery.save(model, tmp_path / "file")
    model.inputs["args"][0] = object()
    with pytest.raises(CheckpointError, match=r"config\.json: inputs=.* cannot be written as JSON"):
        masksurgery.save(model, tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: 'conv\.weight' is a tensor without data"):
        masksurgery.save(model.to("meta"), tmp_path / "c")
    assert not any((tmp_path / name).exists() for name in "abc")


def test_masks_that_the_record_does_not_know_are_not_saved(tmp_path: Path) -> None:
    _, model = small()
    model.conv_mask.masks[1, :] = True
    with pytest.raises(CheckpointError, match=rf"'{MASK}' keeps \[\d+, 12, \d+\] channels"):
        masksurgery.save(model, tmp_path)
    assert list(tmp_path.iterdir()) == []

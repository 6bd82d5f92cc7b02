"""Base models by name: every source, what it records, and what can go wrong."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import masksurgery
from masksurgery import CheckpointError, ConfigError
from masksurgery.factory import Recipe, create_base, from_recipe
from masksurgery.rebuild import reproduces

MODULE = """
import torch
from torch import nn

def net(width=4):
    model = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))
    model.example_inputs = torch.zeros(1, 6)
    return model

def silent(): return nn.Linear(2, 2)
def number(): return 3
def broken(): raise RuntimeError("first line\\nsecond line")
constant = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MODULE)
    Path("unfinished.py").write_text("import no_such_package")
    for name in ("mine", "unfinished"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no network\nreally")

    for name in ("load_state_dict_from_hf", "load_state_dict_from_url"):
        monkeypatch.setattr(f"timm.models._builder.{name}", refuse, raising=False)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def check_recipe(recipe: Recipe, base: nn.Module, inputs: Any = None) -> None:
    """It survives JSON, and gives the architecture again."""
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    twin = from_recipe(again)
    assert {k: x.shape for k, x in twin.state_dict().items()} == {k: x.shape for k, x in base.state_dict().items()}
    assert reproduces(masksurgery.convert(base, example_inputs=inputs), again)
    assert all(x.is_meta for x in from_recipe(again, "meta").parameters())


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "recorded"),
    [
        ("test_resnet", {}, Recipe("timm", "test_resnet.r160_in1k", {})),
        ("test_resnet.r160_in1k", {"num_classes": 5}, Recipe("timm", "test_resnet.r160_in1k", {"num_classes": 5})),
        ("test_vit", {"in_chans": 1, "model_kwargs": {"img_size": 64, "drop_path_rate": 0.1}}, None),
        ("test_efficientnet", {"model_kwargs": {"num_classes": 2}, "num_classes": 2}, None),
    ],
)
def test_a_timm_name(name: str, kwargs: dict[str, Any], recorded: Recipe | None) -> None:
    base, recipe, inputs = create_base(name, pretrained=False, **kwargs)
    assert inputs is None and not base.training
    assert recorded in (None, recipe)
    check_recipe(recipe, base)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5", r"no timm model 'resnet5'\. Did you mean resnet50, "),
        ("resnet50.a1_in1", r"no timm model 'resnet50\.a1_in1'\. Did you mean resnet50\.a1_in1k"),
        ("user/repo", r"no timm model 'user/repo'\. For a model of the hub write hf-hub:user/repo"),
        ("qqqqqqqq", r"no timm model 'qqqqqqqq'\. timm\.list_models\(\) lists them all"),
    ],
)
def test_an_unknown_timm_name(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.create_model", lambda *args, **kwargs: pytest.fail("it was built"))
    with pytest.raises(ConfigError, match=message):
        create_base(name)


def test_arguments_that_a_timm_model_does_not_take() -> None:
    with pytest.raises(
        ConfigError, match=r"'test_resnet' cannot be built with model_kwargs=\{'colour': 1\}: TypeError"
    ):
        create_base("test_resnet", model_kwargs={"colour": 1})
    with pytest.raises(ConfigError, match=r"num_classes=3 and model_kwargs\['num_classes'\]=4 contradict each other"):
        create_base("test_resnet", num_classes=3, model_kwargs={"num_classes": 4})
    for key in ("pretrained", "checkpoint_path", "pretrained_cfg_overlay", "weights"):
        with pytest.raises(ConfigError, match=f"model_kwargs: '{key}' is no argument of an architecture"):
            create_base("test_resnet", model_kwargs={key: "x"})


def test_weights_that_cannot_be_had(offline: None) -> None:
    wanted = (
        r"weights of 'test_resnet' cannot be had: OSError: no network\. Pass --no-pretrained .* or --checkpoint FILE"
    )
    with pytest.raises(ConfigError, match=wanted) as caught:
        create_base("test_resnet")
    assert isinstance(caught.value.__cause__, OSError) and "\n" not in str(caught.value)
    with pytest.raises(
        ConfigError, match=r"timm has no pretrained weights for 'resnet10t_missing'|Pass --no-pretrained"
    ):
        create_base("vit_small_patch16_18x2_224")
    with pytest.raises(ConfigError, match=r"config\.json of 'hf-hub:user/repo' cannot be had: OSError: no network\."):
        create_base("hf-hub:user/repo")


def write_hub_folder(folder: Path) -> nn.Module:
    """A repository as timm writes them, with arguments of its own."""
    model = timm.create_model("test_vit", num_classes=3, img_size=32, depth=2, embed_dim=16, num_heads=2)
    folder.mkdir()
    cfg = {"input_size": [3, 32, 32], "fixed_input_size": True, "num_classes": 3, "classifier": "head"}
    cfg |= {"first_conv": "patch_embed.proj", "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    arguments = {"img_size": 32, "depth": 2, "embed_dim": 16, "num_heads": 2}
    config = {"architecture": "test_vit", "num_classes": 3, "model_args": arguments, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


def test_a_hub_model_is_loaded_again_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_hub_folder(tmp_path / "repo")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *args, **kwargs: fetch(*args, **kwargs))

    def fetch(repo_id: str, filename: str, **kwargs: Any) -> str:
        assert repo_id == "user/repo"
        return str(tmp_path / "repo" / filename)

    base, recipe, inputs = create_base("hf-hub:user/repo")
    assert same_tensors(base, model) and inputs is None
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda *args, **kwargs: pytest.fail("the hub was asked"))
    check_recipe(recipe, base)
    converted = masksurgery.convert(base)
    converted.recipe = recipe.to_dict()
    loaded = masksurgery.load(masksurgery.save(converted, tmp_path / "saved"))
    assert same_tensors(converted, loaded)
    assert loaded.pretrained_cfg["hf_hub_id"] == "user/repo" and loaded.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)


@pytest.mark.skipif(not hasattr(timm.models._hub, "load_model_config_from_path"), reason="this timm reads no folders")
def test_a_folder_of_timms(tmp_path: Path) -> None:
    model = write_hub_folder(tmp_path / "repo")
    base, recipe, _ = create_base(f"local-dir:{tmp_path / 'repo'}")
    assert same_tensors(base, model)
    assert str(tmp_path) not in json.dumps(recipe.to_dict())
    check_recipe(recipe, base)
    with pytest.raises(ConfigError, match=r"config\.json of 'local-dir:nowhere' cannot be had: FileNotFoundError"):
        create_base("local-dir:nowhere")


# --- torchvision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [("resnet18", (1, 3, 224, 224)), ("squeezenet1_1", (1, 3, 224, 224)), ("r3d_18", (1, 3, 16, 112, 112))],
)
def test_a_torchvision_name(name: str, shape: tuple[int, ...]) -> None:
    base, recipe, inputs = create_base(f"torchvision:{name}", pretrained=False)
    assert isinstance(inputs, tuple) and inputs[0].shape == shape
    assert recipe == Recipe("torchvision", name, {})
    check_recipe(recipe, base, inputs)


def test_what_weights_of_torchvision_choose_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: {})
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "load_state_dict", lambda *args, **kwargs: None)
        base, recipe, inputs = create_base("torchvision:googlenet")
    assert recipe.kwargs == {"transform_input": True, "aux_logits": False, "init_weights": False}
    assert base.pretrained_cfg["mean"] == (0.485, 0.456, 0.406) and len(base.pretrained_cfg["label_names"]) == 1000
    check_recipe(recipe, base, inputs)


def test_torchvision_errors(offline: None) -> None:
    for name, kwargs, message in [
        ("resnet51", {}, r"no torchvision model 'resnet51'\. Did you mean resnet50"),
        ("resnet18", {"num_classes": 3}, r"num_classes=3: the pretrained weights of 'torchvision:resnet18' have 1000"),
        (
            "resnet18",
            {"in_chans": 1, "pretrained": False},
            r"cannot be built with model_kwargs=\{'in_chans': 1\}: TypeError",
        ),
        (
            "resnet18",
            {},
            r"weights of 'torchvision:resnet18' cannot be had: OSError: no network\. Pass --no-pretrained",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            create_base(f"torchvision:{name}", **kwargs)


def test_no_part_of_a_torchvision_model_is_downloaded(offline: None) -> None:
    from_recipe(Recipe("torchvision", "lraspp_mobilenet_v3_large", {}), "meta")
    base, _, _ = create_base("torchvision:lraspp_mobilenet_v3_large", pretrained=False)
    assert base.backbone is not None


# --- factories of one's own ------------------------------------------------------------------------------------------


def test_a_factory(module: None) -> None:
    base, recipe, inputs = create_base("mine:net", model_kwargs={"width": 7})
    assert isinstance(inputs, tuple) and inputs[0].shape == (1, 6) and base[0].out_features == 7
    assert recipe == Recipe("factory", "mine:net", {"width": 7})
    assert from_recipe(recipe)[0].out_features == 7
    assert os.getcwd() not in sys.path


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("mine:", {}, "'mine:' is not of the form module:factory"),
        ("nowhere:net", {}, "'nowhere:net': there is no module 'nowhere' in "),
        ("unfinished:net", {}, "importing 'unfinished' raised ModuleNotFoundError: No module named 'no_such_package'"),
        ("mine:nett", {}, r"no factory in 'mine' called 'nett'\. Did you mean net"),
        ("mine:constant", {}, "'mine:constant' is int, not a function"),
        ("mine:number", {}, "'mine:number' returned int, not a torch.nn.Module"),
        ("mine:broken", {}, r"'mine:broken' raised RuntimeError: first line\. Call"),
        ("mine:silent", {}, "Linear does not say what it takes. Set model.example_inputs"),
        ("mine:net", {"num_classes": 3}, r"'mine:net' takes \(width=4\), not model_kwargs=\{'num_classes': 3\}"),
    ],
)
def test_factory_errors(name: str, kwargs: dict[str, Any], message: str, module: None) -> None:
    with pytest.raises(ConfigError, match=message):
        create_base(name, **kwargs)


@pytest.mark.parametrize(
    "record",
    [None, {}, {"source": "timm", "name": "x"}, {"source": "pip", "name": "x", "kwargs": {}},
     {"source": "timm", "name": 3, "kwargs": {}}, {"source": "timm", "name": "x", "kwargs": {1: 2}}],
)  # fmt: skip
def test_a_recipe_that_is_none(record: Any) -> None:
    with pytest.raises(ConfigError, match="recipe"):
        Recipe.from_dict(record)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "nesting"),
    [(".safetensors", ""), (".safetensors", "module."), (".pt", ""), (".bin", "")]
    + [(".pth", nesting) for nesting in ("", "module.", "state_dict", "model", "model_ema")],
)
def test_a_checkpoint_is_loaded(suffix: str, nesting: str, tmp_path: Path, offline: None) -> None:
    source = timm.create_model("test_resnet", num_classes=4)
    state: Any = source.state_dict()
    if nesting == "module.":
        state = {f"module.{name}": value for name, value in state.items()}
    elif nesting:
        state = {"epoch": 3, nesting: state}
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    base, _, _ = create_base("test_resnet", checkpoint=path, num_classes=4)
    assert same_tensors(base, source)


def test_averaged_weights_go_first(tmp_path: Path) -> None:
    plain, averaged = (timm.create_model("test_resnet", num_classes=2) for _ in range(2))
    torch.save({"state_dict": plain.state_dict(), "state_dict_ema": averaged.state_dict()}, tmp_path / "x.pth")
    assert same_tensors(create_base("test_resnet", checkpoint=tmp_path / "x.pth", num_classes=2)[0], averaged)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_code_in_a_checkpoint_is_never_run(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"trap{suffix}"
    torch.save({"state_dict": Trap(tmp_path / "sprung")}, path)
    refusal = "not a safetensors file" if suffix == ".safetensors" else r"refused, .*torch\.load\(weights_only=True\)"
    with pytest.raises(CheckpointError, match=rf"trap{suffix}: {refusal}"):
        create_base("test_resnet", checkpoint=path)
    assert not (tmp_path / "sprung").exists()


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    def fails(state: Any, message: str, name: str = "x.pth") -> None:
        path = tmp_path / name
        if isinstance(state, bytes):
            path.write_bytes(state)
        else:
            torch.save(state, path)
        with pytest.raises(CheckpointError, match=rf"{name}: {message}"):
            create_base("test_resnet", checkpoint=path)

    state = timm.create_model("test_resnet").state_dict()
    fails(
        timm.create_model("test_resnet", num_classes=4).state_dict(),
        r".*classifier 'fc' has 4 classes, the model's 1000: pa",
    )
    fails(
        {k: v for k, v in state.items() if k != "fc.bias"},
        "the keys are not those of the model. missing: fc.bias",
    )
    fails({**state, "surplus": torch.ones(1)}, "the keys are not those of the model. unexpected: surplus")
    fails({**state, "bn1.bias": torch.ones(7)}, r".*of another shape: bn1\.bias \(7,\) instead of \(\d+,\)")
    fails(
        timm.create_model("test_vit").state_dict(),
        r".*missing: conv1.* and \d+ more; unexpected: cls_token.* more",
    )
    fails({"epoch": 3}, r"holds no state dict \(it has keys 'epoch'\)")
    fails([1, 2], r"holds no state dict \(it has list\)")
    fails(b"", "not a file of torch.save|refused")
    fails(b"PK\x03\x04 and so on", "not a file of torch.save|refused")
    fails(b"abc", "not a safetensors file, or cut short", "x.safetensors")
    fails(state, r"a file of weights ends in \.safetensors, \.pth, \.pt or \.bin, not in '\.zip'", "x.zip")
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: there is no such file"):
        create_base("test_resnet", checkpoint="nowhere.pth")

"""Models to evaluate, from wherever they come."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from torch import Tensor, nn

import masksurgery
from finetuning import NAMES, make_converted, make_images, metrics_of
from masksurgery import CheckpointError, ConfigError, DataConfig, DataError, FinetuneConfig
from masksurgery.checkpoint import CONFIG, WEIGHTS, load_base, read_base, save_base
from masksurgery.data import eval_batches, open_evaluation
from masksurgery.evaluation_data import match_classes
from masksurgery.factory import create_base
from masksurgery.subjects import Subject, open_subject
from nets import randomise
from test_checkpoint import FACTORY


def make_base(name: str = "test_resnet", **kwargs: Any) -> nn.Module:
    return randomise(timm.create_model(name, **{"num_classes": 5, **kwargs}), 0).eval()


class Net(nn.Module):
    """What a factory of one's own returns: here two numbers, maps, a dict, or probabilities."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.answer = nn.Conv2d(3, 4, 3, padding=1), answer
        self.example_inputs = (torch.zeros(1, 3, 16, 16),)

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.conv(x))


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def predict(subject: Subject, seed: int = 0) -> tuple[Tensor, Any]:
    size = subject.preprocessing.size
    x = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return x, subject.model(x)


# --- where they come from --------------------------------------------------------------------------------------------


def test_a_converted_folder(tmp_path: Path) -> None:
    model = masksurgery.convert(make_base(), n=3, example_inputs=(torch.zeros(1, 3, 48, 32),)).eval()
    model.output = "logits"
    folder = masksurgery.save(model, tmp_path / "dir")
    for place in (folder, str(folder)):
        subject = open_subject(place)
        assert (subject.name, subject.kind, subject.folder) == (str(folder), "converted", folder)
        assert (subject.n, subject.task, subject.class_dim, subject.outputs) == (3, "classification", 1, 5)
        assert not (subject.segmentation or subject.heteroscedastic or subject.label_names or subject.display_names)
        assert (subject.preprocessing.size, subject.preprocessing.channels) == ((48, 32), 3)
        x, p = predict(subject)
        assert torch.equal(p.logits, model(x)) and p.members.shape == (3, 3, 5)
        assert subject.ensemble is not None and not subject.model.training
    assert open_subject(folder, name="ours").name == "ours"


def test_a_hub_repository_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    masksurgery.save(masksurgery.convert(make_base(), example_inputs=(torch.zeros(1, 3, 32, 32),)), tmp_path / "a")
    save_base(make_base(), tmp_path / "b", {"source": "timm", "name": "test_resnet", "kwargs": {"num_classes": 5}})
    asked = []

    def download(repository: str, **_: Any) -> str:
        asked.append(repository)
        return str(tmp_path / repository.rpartition("/")[2])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = {name: open_subject(f"hf-hub:user/{name}") for name in "ab"}
    assert [(s.kind, s.folder) for s in found.values()] == [("converted", None), ("base", None)]
    assert asked == ["user/a", "user/b"]


@pytest.mark.slow
def test_a_base_model_that_was_fine_tuned(tmp_path: Path) -> None:
    images, converted = make_images(tmp_path / "images", 8, 4), make_converted(tmp_path / "converted")
    config = FinetuneConfig(epochs=1, batch_size=8, workers=0)
    data = DataConfig(str(images))
    folder = masksurgery.finetune(converted, data, tmp_path / "base", config=config, base_only=True)
    subject = open_subject(folder)
    assert (subject.kind, subject.n, subject.outputs, subject.folder) == ("base", 1, 3, None)
    assert subject.label_names == NAMES and subject.display_names == list(NAMES)
    assert subject.preprocessing.size == (32, 32)  # of the conversion; the architecture's own is 160
    own = json.loads((folder / CONFIG).read_text())["pretrained_cfg"]
    resolved = timm.data.resolve_data_config(pretrained_cfg=own)
    assert tuple(resolved["input_size"]) == (3, 32, 32) and "test_input_size" not in own
    trained = open_subject(converted).preprocessing.config
    assert {key: list(value) if isinstance(value, (list, tuple)) else value for key, value in trained.items()} == {
        key: list(value) if isinstance(value, (list, tuple)) else value for key, value in resolved.items()
    }
    x, p = predict(subject)
    by_timm = timm.create_model("test_resnet", num_classes=3, checkpoint_path=folder / WEIGHTS).eval()
    with torch.no_grad():
        assert torch.allclose(p.mean, by_timm(x).softmax(1), atol=1e-6)
    if hasattr(timm.models._hub, "load_model_config_from_path"):
        again = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert timm.data.resolve_model_data_config(again)["input_size"] in ((3, 32, 32), [3, 32, 32])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit"])
def test_a_folder_that_timm_wrote(tmp_path: Path, architecture: str, legacy: bool) -> None:
    size = {"img_size": 32} if architecture == "test_vit" else {}
    base = make_base(architecture, in_chans=1, **size)
    base.pretrained_cfg = {**base.pretrained_cfg, "input_size": (1, 32, 32), "mean": (0.3,), "std": (0.2,)}
    names = {"label_names": ["a", "b", "c", "d", "e"], "label_descriptions": {"a": "an ape"}}
    save_for_hf(base, str(tmp_path), model_config=dict(names), safe_serialization=True)
    if legacy:  # before there was an object for it
        content = json.loads((tmp_path / CONFIG).read_text())
        content = {**content.pop("pretrained_cfg"), **content}
        (tmp_path / CONFIG).write_text(json.dumps(content))
    subject = open_subject(f"local-dir:{tmp_path}")
    assert (subject.label_names, subject.display_names) == (tuple("abcde"), ["an ape", "b", "c", "d", "e"])
    preprocessing = subject.preprocessing
    assert (preprocessing.size, preprocessing.channels, preprocessing.config["mean"]) == ((32, 32), 1, (0.3,))
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        p = subject.model(x)
        assert torch.allclose(p.logits, base(x).log_softmax(1), atol=1e-6)
    assert (p.variance == 0).all() and p.members.shape == (2, 1, 5)


def test_a_base_model_of_torchvision_is_read_back(tmp_path: Path) -> None:
    base, recipe, _ = create_base("torchvision:squeezenet1_1", pretrained=False, num_classes=4, img_size=64)
    save_base(base, tmp_path, recipe.to_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(read_base(tmp_path)(x), base(x))
    assert open_subject(tmp_path).preprocessing.size == (64, 64)


def test_a_number_of_outputs_without_names_is_kept(tmp_path: Path) -> None:
    kwargs = {"num_classes": 2}
    save_base(make_base(**kwargs), tmp_path, {"source": "timm", "name": "test_resnet", "kwargs": kwargs})
    assert json.loads((tmp_path / CONFIG).read_text())["num_classes"] == 2
    assert open_subject(tmp_path, task="regression").outputs == 2


def test_a_function_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("subject_nets.py").write_text(FACTORY)
    base, recipe, inputs = create_base("subject_nets:net", model_kwargs={"width": 6})
    model = masksurgery.convert(base, example_inputs=inputs)
    model.recipe = recipe.to_dict()
    masksurgery.save(model, "converted")
    save_base(base, "base", recipe.to_dict())
    for folder in ("converted", "base"):
        with pytest.raises(CheckpointError, match=r"'subject_nets:net', which is not run unasked.*trust=True"):
            open_subject(folder)
        read = load_base(folder, trust=True) if folder == "converted" else read_base(folder, trust=True)
        assert all(torch.equal(x, base.state_dict()[name]) for name, x in read.state_dict().items())


def test_names_of_timm_and_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def create(name: str) -> tuple[nn.Module, None, None]:
        asked.append(name)
        return make_base(), None, None

    monkeypatch.setattr("masksurgery.subjects.create_base", create)
    assert open_subject("test_resnet.r160_in1k").kind == open_subject("torchvision:resnet18").kind == "base"
    assert asked == ["test_resnet.r160_in1k", "torchvision:resnet18"]


def test_a_model_is_not_changed() -> None:
    base = make_base().train()
    subject = open_subject(base)
    assert base.training and not subject.model.training and subject.name == "test_resnet"
    assert subject.preprocessing.size == (160, 160) and subject.ensemble is None
    converted = masksurgery.convert(base, example_inputs=(torch.zeros(1, 3, 32, 32),))
    converted.output = "mean"
    other = open_subject(converted)
    other.temperature = 3
    assert converted.training and converted.output == "mean" and converted.head_module.temperature == 1
    assert (other.kind, other.temperature, other.folder) == ("converted", 3, None)


@pytest.mark.slow
@pytest.mark.parametrize("base_only", [False, True])
def test_the_figures_are_those_of_the_run(tmp_path: Path, base_only: bool) -> None:
    images, converted = make_images(tmp_path / "images", 8, 4) / "train", make_converted(tmp_path / "converted")
    config = FinetuneConfig(epochs=1, batch_size=8, workers=0)
    data = DataConfig(str(images), val_fraction=0.3, seed=3, max_val=5)
    folder = masksurgery.finetune(converted, data, tmp_path / "run", config=config, base_only=base_only)
    subject = open_subject(folder)
    found = open_evaluation(data, task=subject.task, num_classes=subject.outputs)
    assert match_classes(subject, found.classes) is None
    with torch.inference_mode():
        batches = eval_batches(found.source, subject.preprocessing.evaluation(), batch_size=3, workers=0)
        nll = sum(nn.functional.cross_entropy(subject.model(x).logits, y, reduction="sum") for x, y in batches)
    (row,) = [row for row in metrics_of(folder) if row["val_nll"]]
    assert len(found.source) == 5 and nll / 5 == pytest.approx(float(row["val_nll"]), rel=1e-4)


# --- what they predict -----------------------------------------------------------------------------------------------


def test_tasks_of_a_base_model() -> None:
    x = torch.randn(2, 3, 16, 16)
    net = Net(pooled)
    z = net(x).detach()
    with torch.no_grad():
        assert torch.allclose(open_subject(net).model(x).mean, z.softmax(1))
        many = open_subject(net, task="multilabel")
        assert torch.allclose(many.model(x).mean, z.sigmoid()) and many.outputs == 4
        numbers = open_subject(net, task="regression").model(x)
        assert torch.equal(numbers.mean, z) and (numbers.variance == 0).all() and numbers.members.shape == (2, 1, 4)
        ends = open_subject(Net(lambda x: pooled(x).softmax(1)), task="probabilities")
        ends.model.model.load_state_dict(net.state_dict())
        assert torch.allclose(ends.model(x).mean, z.softmax(1), atol=1e-6)
        pair = Net(lambda x: (pooled(x)[:, :2], pooled(x)[:, 2:]))
        both = open_subject(pair, task="regression", heteroscedastic=True)
        p = both.model(x)
        assert torch.equal(p.mean, pair(x)[0]) and torch.allclose(p.variance, pair(x)[1].exp())
        assert both.outputs == 2 and both.heteroscedastic


def test_the_answer_is_found_among_several_outputs() -> None:
    subject = open_subject(Net(lambda x: {"aux": x[:, :2], "out": x}))
    assert subject.segmentation and (subject.outputs, subject.class_dim) == (4, 1)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(subject.model(x).mean, subject.model.model(x)["out"].softmax(1))
    last = open_subject(Net(lambda x: x.permute(0, 2, 3, 1)), class_dim=-1)
    assert last.segmentation and (last.outputs, last.class_dim) == (4, 3)
    net = Net(lambda x: {"out": x * 2, "aux": x})
    converted = open_subject(masksurgery.convert(net, include=["conv"], example_inputs=(x,)))
    assert converted.segmentation and converted.model(x).members.shape == (2, 4, 4, 16, 16)


@pytest.mark.parametrize("kind", ["base", "converted"])
def test_a_temperature(kind: str) -> None:
    base = make_base()
    model = base if kind == "base" else masksurgery.convert(base, example_inputs=(torch.zeros(1, 3, 32, 32),))
    subject = open_subject(model)
    assert subject.temperature == 1
    _, before = predict(subject)
    subject.temperature = 4
    assert torch.allclose(predict(subject)[1].members, before.members / 4) and subject.temperature == 4
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=rf"temperature={wrong!r} is not a (positive )?finite number"):
            subject.temperature = wrong
    assert subject.temperature == 4


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        (pooled, {"task": "nonsense"}, "task='nonsense' is not one of"),
        (pooled, {"heteroscedastic": True}, 'heteroscedastic=True needs task="regression"'),
        (pooled, {"task": "regression", "heteroscedastic": True}, "Net: heteroscedastic=True needs two outputs"),
        (pooled, {"class_dim": 2}, r"Net: class_dim=2 is not in the output's shape \(2, 4\)"),
        (pooled, {"class_dim": 0}, "Net: class_dim=0 is where the samples are"),
        (pooled, {"task": "probabilities"}, "Net: The model returns negative numbers, which are no probabilities"),
        (lambda x: pooled(x)[:, :1], {}, r"Net: The output \(2, 1\) has one class"),
        (lambda x: x.argmax(1), {}, "Net: The model returns no floating-point tensor with a batch dimension"),
        (lambda x: x.view(7, 7), {}, r"Net: The model cannot run on images \[3, 16, 16\]: RuntimeError"),
    ],
)
def test_outputs_that_do_not_suit_the_task(answer: Any, options: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ConfigError, match=message):
        open_subject(Net(answer), **options)


def test_inputs_that_are_no_images() -> None:
    with pytest.raises(ConfigError, match=r"Linear: Linear does not say what it takes.*model\.example_inputs ="):
        open_subject(nn.Linear(3, 3))
    net = Net(pooled)
    net.example_inputs = (torch.zeros(1, 5, 16, 16),)
    with pytest.raises(ConfigError, match=r"Net: .*one image .* this one takes float32\[1, 5, 16, 16\]"):
        open_subject(net)


def test_places_where_nothing_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"runs/tuned: does not exist; a folder"):
        open_subject("runs/tuned")
    with pytest.raises(CheckpointError, match=r"tuned: does not exist; a folder"):
        open_subject(Path("tuned"))
    with pytest.raises(ConfigError, match=r"'resnet5O' is no folder here.*Did you mean resnet50.*hf-hub:user/repo"):
        open_subject("resnet5O")
    with pytest.raises(ConfigError, match=r"'torchvision:nothing' is no folder here.*no torchvision model 'nothing'"):
        open_subject("torchvision:nothing")
    with pytest.raises(ConfigError, match=r"timm has no pretrained weights for 'cs3darknet_s'\. A folder") as info:
        open_subject("cs3darknet_s")
    assert "--checkpoint" not in str(info.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty/config\.json: there is no such file"):
        open_subject("empty")


def spoil(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CONFIG).write_text("{"), r"config\.json: not JSON"),
        (lambda f: (f / CONFIG).write_text("{}"), r"config\.json: 'architecture' is missing.*Pass it itself"),
        (
            lambda f: spoil(f, recipe=None, architecture="resnet5O"),
            r"config\.json: the model cannot be made: .*resnet50",
        ),
        (lambda f: spoil(f, recipe=None, model_args=[1]), r"config\.json: 'model_args' is \[1\], not an object"),
        (
            lambda f: spoil(f, recipe={"name": 1}),
            r"config\.json: recipe=.* is not an object of source, name and kwargs",
        ),
        (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), r"model\.safetensors: .*safe_serialization=True"),
        (lambda f: (f / WEIGHTS).write_bytes(b"x"), r"model\.safetensors: not a safetensors file"),
        (lambda f: save_file({"a": torch.ones(1)}, f / WEIGHTS), r"not those of the model\. missing: .*unexpected: a"),
    ],
)
def test_damaged_folders(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    save_base(make_base(), tmp_path, {"source": "timm", "name": "test_resnet", "kwargs": {"num_classes": 5}})
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_subject(tmp_path)


# --- classes ---------------------------------------------------------------------------------------------------------


def named(*names: str, outputs: int | None = None) -> Subject:
    net = Net(pooled)
    net.pretrained_cfg = {"label_names": names} if names else {}
    return replace(open_subject(net, name="mine"), label_names=names or None, outputs=outputs or len(names))


def matched(subject: Subject, *classes: str) -> list[int] | None:
    found = match_classes(subject, classes)
    return None if found is None else found.tolist()


def test_classes_are_matched_by_name() -> None:
    subject = named("ant", "bee", "cat")
    assert match_classes(subject, None) is None
    assert matched(subject, "ant", "bee", "cat") is None
    assert matched(subject, "ant", "cat", "bee") == [0, 2, 1]
    assert matched(subject, "cat") == [2]
    assert matched(named(outputs=3), "ant", "bee", "cat") is None
    with pytest.raises(DataError, match=r"other classes than mine: class 2 is 'cow' in the data and 'cat' in the mod"):
        match_classes(subject, ("ant", "bee", "cow"))
    with pytest.raises(ConfigError, match="mine has 3 outputs, the data 2 classes"):
        match_classes(subject, ("ant", "cow"))
    with pytest.raises(ConfigError, match="mine has 3 outputs, the data 1 class"):
        match_classes(named(outputs=3), ("ant",))
    with pytest.raises(ConfigError, match="mine has 3 outputs, the data 4 classes"):
        match_classes(subject, ("0", "1", "2", "3"))
    with pytest.raises(DataError, match="other classes than mine"):  # columns are not put in another order
        match_classes(replace(subject, task="multilabel"), ("ant", "cat", "bee"))


def test_indices_and_the_many_names_of_imagenet() -> None:
    assert matched(named("ant", "bee", "cat"), "0", "1") is None  # of a CSV file, whose largest index is 1
    assert matched(named("0", "1", "2"), "ant", "bee", "cat") is None
    assert matched(named("0", "1", "2"), "2") == [2]
    words = tuple(f"word {k}" for k in range(1000))
    assert matched(named(*words), *(f"n{k:08}" for k in range(1000))) is None
    assert matched(named(*words), words[1], words[0], *words[2:]) == [1, 0, *range(2, 1000)]
    assert match_classes(replace(named(outputs=3), task="regression"), ("a",)) is None


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({"0": "a", "1": "b", "2": "c", "3": "d"}, tuple("abcd")),
        ({"0": "a", "2": "b", "3": "c", "4": "d"}, None),
        (["a", "b"], None),
        ((1, 2, 3, 4), ("1", "2", "3", "4")),
    ],
)
def test_forms_of_names(names: Any, found: tuple[str, ...] | None) -> None:
    net = Net(pooled)
    net.pretrained_cfg = {"label_names": names}
    subject = open_subject(net)
    assert subject.label_names == found and subject.display_names == (list(found) if found else None)

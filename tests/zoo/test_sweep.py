"""coverage.md is what a sweep gives, and the README says what coverage.md says."""

from __future__ import annotations

import pytest
import timm
import torchvision

import coverage_report as coverage
from selection import in_part
from sweep import architectures, check, run_quietly

ROWS = {(row.library, row.name): row for row in coverage.parse(coverage.COVERAGE.read_text(encoding="utf-8"))}
TEXT = coverage.COVERAGE.read_text(encoding="utf-8")
VERSIONS = [module.__version__.partition("+")[0] for module in (timm, torchvision)]
CURRENT = f"timm {VERSIONS[0]}, torchvision {VERSIONS[1]}," in TEXT


def test_the_readme_is_current() -> None:
    text = coverage.README.read_text(encoding="utf-8")
    assert coverage.update_readme(text, list(ROWS.values())) == text, "run tests/zoo/coverage_report.py --readme"


def test_every_architecture_is_converted() -> None:
    failed = {which: row.error for which, row in ROWS.items() if row.error}
    assert failed == {}
    assert sum(library == "timm" for library, _ in ROWS) >= 1371
    assert {row.family for row in ROWS.values() if row.excluded} == {"detection", "quantization"}


def test_layers_that_have_no_mask_have_a_reason_that_holds() -> None:
    """A ratchet: a rule that masks less has to be looked at."""
    layers, sites, chain = (
        next(int(line.split("|")[3]) for line in TEXT.splitlines() if line.startswith(f"| {name} |"))
        for name in ("layers", "sites", "chain")
    )
    assert (sites + chain) / layers > 0.73
    total = sum(row.layers for row in ROWS.values())
    other = sum(row.skipped.get("other", 0) for row in ROWS.values())
    assert other / total < 0.012


@pytest.mark.zoo
@pytest.mark.skipif(not CURRENT, reason="coverage.md is of other versions of timm or torchvision")
def test_nothing_is_missing() -> None:
    assert set(ROWS) == set(architectures())


@pytest.mark.zoo
@pytest.mark.parametrize("which", [which for which in architectures() if in_part(which[1], 80)], ids=":".join)
def test_an_eightieth(which: tuple[str, str]) -> None:
    """Another one with each commit."""
    run_quietly()
    row = check(*which)
    assert row.error is None
    if CURRENT:
        assert coverage.cells(row)[:-2] == coverage.cells(ROWS[which])[:-2], "run tests/zoo/sweep.py"

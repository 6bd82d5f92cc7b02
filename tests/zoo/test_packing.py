"""The smallest architecture of every family of timm, packed; and packing.md is what packing gives.

With random parameters, at the smallest images, in float32; six minutes on one core, of which CI takes a twelfth with
each commit.
"""

from __future__ import annotations

from typing import Any

import pytest
import timm

import masksurgery
import packing_report as report
from families import FAMILIES, cases, prepare
from packing import assert_packed

FAILURES: dict[str, str] = {}
# With random parameters a float32 forward of the converted model is that far from the same in float64, relative to the
# largest member: rounding proves nothing there, and they are compared in float64.
ROUNDING = {"halonet_h1": 0.4, "starnet_s050": 0.04, "efficientformerv2_s0": 0.002}
TEXT = report.PACKING.read_text(encoding="utf-8")
ROWS = {row.family: row for row in report.parse(TEXT)}
CURRENT = f"timm {timm.__version__}," in TEXT


def test_every_family_is_packed() -> None:
    assert ROWS.keys() == FAMILIES.keys()
    assert [row.name for row in ROWS.values()] == [entry["name"] for entry in FAMILIES.values()]
    assert {row.name: row.barriers for row in ROWS.values() if row.failed} == {}
    assert report.summary(list(ROWS.values())) in TEXT


def test_packing_saves() -> None:
    """A ratchet: a rule that saves less has to be looked at."""
    packed, converted = (
        {row.name: float(getattr(row, state)) for row in ROWS.values() if not row.failed}
        for state in ("packed", "converted")
    )
    assert {name: ratio for name, ratio in packed.items() if ratio > converted[name]} == {}
    assert sorted(packed.values())[len(packed) // 2] < 2


@pytest.mark.zoo
@pytest.mark.timeout(900)
@pytest.mark.parametrize("entry", cases(FAILURES, "packed ", parts=12))
def test_packed_is_converted(entry: dict[str, Any]) -> None:
    base, many = prepare(entry)
    rounds = entry["name"] in ROUNDING
    base, x = (base, many[:2]) if rounds else (base.float(), many[:2].float())
    model = masksurgery.convert(base, example_inputs=(x[:1],))
    packed = masksurgery.pack(model, "unrolled", dense=False)
    for form in (packed, masksurgery.pack(model, "unrolled", dense=True)):
        assert_packed(form, model, (x,), 1e-8 if rounds else None)
    if CURRENT:
        family = next(family for family, other in FAMILIES.items() if other is entry)
        assert report.measure(entry, family, base, model, packed) == ROWS[family], "run tests/zoo/packing_report.py"

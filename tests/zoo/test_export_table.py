"""The tables of what can be exported are those that export_report.py writes, and all families are in them."""

from __future__ import annotations

import export_report as report
from families import FAMILIES

TEXT = report.EXPORT.read_text(encoding="utf-8")
ROWS = report.parse(TEXT)


def test_every_family_was_tried() -> None:
    assert {row.family: row.architecture for row in ROWS} == {
        family: entry["name"] for family, entry in report.candidates().items()
    }
    assert report.candidates().keys() < FAMILIES.keys()


def test_the_summaries_count_the_rows() -> None:
    assert report.summary(ROWS) in TEXT
    readme = report.README.read_text(encoding="utf-8")
    assert report.in_readme(readme, ROWS) == readme


def test_what_works_is_not_lost() -> None:
    """A ratchet: what was ok when the table was made is looked at again before it may fail."""
    failed = {(row.architecture, name) for row in ROWS for name, text in row.checks.items() if text != report.OK}
    assert failed == set()

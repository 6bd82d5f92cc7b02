"""Reports in headless Chromium, as a phone and as a screen, light and dark; and pages that the check has to refuse."""

from collections.abc import Callable
from pathlib import Path

import pytest

from browser import check_page, read_text
from evaluations import ALL, HOSTILE, hostile
from masksurgery.evaluation import Evaluation
from masksurgery.report import write_report

pytestmark = pytest.mark.slow

SOUND = """<!doctype html><title>t</title><meta name="viewport" content="width=device-width">
<style>body {{ background: #fff; color: #000 }}
@media (prefers-color-scheme: dark) {{ body {{ background: #000; color: #fff }} }}</style>
<body><p>text</p>{}</body>"""

DRAWING = (
    '<figure><svg viewBox="0 0 100 50" role="img" aria-label="l">{}'
    '<text x="{}" y="20" style="font-size: {}px; fill: currentColor">text</text></svg></figure>'
)
PATHS = '<path d="M0 0L9 9z"/>' * 5


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_a_report_is_shown_as_it_should(make: Callable[[], Evaluation], tmp_path: Path) -> None:
    check_page(write_report(make(), tmp_path / "report.html"))


def test_names_are_shown_as_text(tmp_path: Path) -> None:
    file = write_report(hostile(), tmp_path / "report.html")
    shown = read_text(file, "bdi")
    assert HOSTILE[0] == "<script>alert(1)</script>"
    assert {name.encode(errors="backslashreplace").decode() for name in HOSTILE} <= set(shown)
    assert read_text(file, "script") == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<div style="width: 2000px">wide</div>', "px too wide: .*wide"),
        ('<p style="color: #999">faint</p>', r"contrast of 2\.8.: .*faint"),
        ('<p style="background: #d33"><span style="color: #d00">red</span></p>', "contrast of 1.*red"),
        ('<p style="font-size: 9px">small</p>', r"letters of 9\.0 px"),
        ('<figure style="display: none">gone</figure>', "not visible: .*gone"),
        ('<figure style="position: absolute; left: -50px">left</figure>', "beyond the edge: .*left"),
        ('<img alt="none" src="data:image/png;base64,AAAA" width="50" height="50">', "no picture: none"),
        ('<img alt="none" src="other.png" width="50" height="50">', "no picture: none"),
        ('<link rel="stylesheet" href="http://127.0.0.1:9/a.css">', "127.0.0.1"),
        ("<script>1</script>", "the page has a script"),
        ("<script>console.error('oops'); document.currentScript.remove()</script>", "oops"),
        ('<b id="a">1</b><b id="a">2</b>', "ids that are not unique: a"),
        ("<style>body { background: #888 !important; color: #000 !important }</style>", "no dark scheme"),
        (DRAWING.format("", 10, 12), "a drawing of 0 paths: l"),
        (DRAWING.format(PATHS, 95, 12), "cut off in a drawing: .*text"),
        (DRAWING.format(PATHS, 10, 1), "letters of .* px: .*text"),
        (DRAWING.format(PATHS + '<use href="#none"/>', 10, 12), "a drawing lacks #none"),
        (DRAWING.format(PATHS.replace("/>", ' style="fill: none"/>'), 10, 12), "a drawing of 0 paths"),
    ],
)
def test_the_check_can_fail(body: str, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(SOUND.format(body))
    with pytest.raises(AssertionError, match=fault):
        check_page(file)


def test_the_check_passes_a_sound_page(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(SOUND.format(DRAWING.format(PATHS, 10, 12)))
    check_page(file, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"page-{width}-{scheme}.png" for width in (390, 1280) for scheme in ("light", "dark")
    }

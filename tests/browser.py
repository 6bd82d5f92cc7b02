"""Opens a page in headless Chromium, as a phone and as a screen, light and dark, and finds what is wrong with it."""

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")

# Finds, in the page: where boxes are, how large letters are, and how far they stand out from what is behind them.
INSPECT = r"""
const width = document.documentElement.clientWidth, faults = [];
const name = e => `<${e.tagName.toLowerCase()} class="${e.getAttribute('class') || ''}"> ${(e.textContent || '').trim().slice(0, 40)}`;
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const paint = colors => {  // the colour, 0 to 255, of one over the other
  canvas.clearRect(0, 0, 1, 1);
  for (const color of colors) { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const luminance = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map(c => c / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
  return .2126 * x + .7152 * y + .0722 * z;
};
const contrast = (a, b) => { const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
const behind = e => {
  const colors = [];
  for (; e; e = e.parentElement) {
    const style = getComputedStyle(e);
    if (style.backgroundImage !== 'none') colors.unshift(style.getPropertyValue('--bar'));  // the only picture behind text
    colors.unshift(style.backgroundColor);
  }
  return paint(['white', ...colors]);
};
const scrolls = e => { for (; e; e = e.parentElement) if (getComputedStyle(e).overflowX === 'auto') return true; return false; };

const overflow = document.documentElement.scrollWidth - width;
if (overflow > 0) {
  const wide = [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > width + .5 && !scrolls(e));
  faults.push(`the page is ${overflow} px too wide: ` + wide.slice(-3).map(name).join('; '));
}
for (const e of document.querySelectorAll('figure, figure > svg, img, table')) {
  const box = e.getBoundingClientRect(), shown = e.checkVisibility({checkOpacity: true, checkVisibilityCSS: true});
  if (!shown || box.width < 16 || box.height < 16) faults.push('not visible: ' + name(e));
  if (!scrolls(e) && (box.left < -.5 || box.right > width + .5)) faults.push('beyond the edge: ' + name(e));
  if (e.tagName === 'IMG' && !(e.complete && e.naturalWidth)) faults.push('no picture: ' + e.alt);
  if (e.tagName === 'svg') {
    const drawn = [...e.querySelectorAll('path')].filter(p => {
      const style = getComputedStyle(p), b = p.getBoundingClientRect();
      return (style.stroke !== 'none' || style.fill !== 'none') && b.width + b.height > 0;
    });
    if (drawn.length < 5) faults.push(`a drawing of ${drawn.length} paths: ` + e.getAttribute('aria-label'));
    if (!e.getAttribute('aria-label')) faults.push('a drawing without a label');
    for (const p of e.querySelectorAll('[clip-path], use')) {
      const id = (p.getAttribute('clip-path') || p.getAttribute('href')).replace(/^url\(|\)$/g, '').slice(1);
      if (!e.querySelector(`[id="${id}"]`)) faults.push('a drawing lacks #' + id);
    }
  }
}
const ids = [...document.querySelectorAll('[id]')].map(e => e.id), twice = ids.filter((id, k) => ids.indexOf(id) !== k);
if (twice.length) faults.push('ids that are not unique: ' + twice.slice(0, 5));
const ratios = new Map();
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
for (let node; node = walker.nextNode();) {
  const e = node.parentElement, style = getComputedStyle(e);
  if (!node.data.trim() || !e.checkVisibility()) continue;
  const drawing = e.closest('figure > svg');
  const box = drawing && drawing.getBoundingClientRect(), view = drawing && drawing.viewBox.baseVal;
  const size = parseFloat(style.fontSize) * (drawing ? box.width / view.width : 1);
  if (size < 10) faults.push(`letters of ${size.toFixed(1)} px: ` + name(e));
  if (drawing) {
    const b = e.getBoundingClientRect();
    if (b.left < box.left - 1 || b.right > box.right + 1 || b.top < box.top - 1 || b.bottom > box.bottom + 1)
      faults.push('cut off in a drawing: ' + name(e));
  }
  const front = drawing ? style.fill : style.color, back = behind(drawing ? drawing.parentElement : e);
  const ratio = contrast(paint([`rgb(${back.slice(0, 3)})`, front]), back);
  if (ratio < 4.5) faults.push(`contrast of ${ratio.toFixed(2)}: ` + name(e));
}
if (document.scripts.length) faults.push('the page has a script');
return {faults: [...new Set(faults)], background: behind(document.body).slice(0, 3).join()};
"""


def check_page(file: Path, screenshots: Path | None = None) -> None:
    """Assert that a page is whole in each width and scheme.

    That is: no errors in the console, no request but for the file itself and data: addresses, every figure, picture and
    table visible and inside of the page, no overflow, letters of at least 10 px, all text with a contrast of at least
    4.5, unique ids, no script, and a background that is another one in the dark.

    Args:
        file: The page.
        screenshots: A folder for pictures of the whole page.
    """
    with _chromium() as browser:
        backgrounds = {}
        for width in WIDTHS:
            for scheme in SCHEMES:
                _emulate(browser, width, scheme)
                browser.get(file.absolute().as_uri())
                found = browser.execute_script(INSPECT)
                if screenshots is not None:
                    _screenshot(browser, width, screenshots / f"{file.stem}-{width}-{scheme}.png")
                where = f"{file.name}, {width} px, {scheme}"
                assert found["faults"] == [], f"{where}: " + "\n".join(found["faults"])
                assert (_failures(browser, file), _console(browser)) == ([], []), where
                backgrounds[width, scheme] = found["background"]
    for width in WIDTHS:
        assert backgrounds[width, "light"] != backgrounds[width, "dark"], f"{file.name}: no dark scheme at {width} px"


def read_text(file: Path, selector: str) -> list[str]:
    """What the elements say that a CSS selector finds."""
    with _chromium() as browser:
        browser.get(file.absolute().as_uri())
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)"
        return list(browser.execute_script(script, selector))


@contextmanager
def _chromium() -> Iterator[webdriver.Chrome]:
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in programs:
        pytest.fail("chromium and chromedriver are needed. Install them: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, Service(programs[1]))
    try:
        yield browser
    finally:
        browser.quit()


def _emulate(browser: webdriver.Chrome, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 844 if width < 800 else 800, "deviceScaleFactor": 1, "mobile": width < 800}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )


def _failures(browser: webdriver.Chrome, file: Path) -> list[str]:
    """Requests that failed, and those for anything else than the file itself or what it holds."""
    failures, seen = [], False
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        if event["method"] == "Network.loadingFailed":
            failures.append(str(event["params"]))
        if event["method"] == "Network.requestWillBeSent":
            url = event["params"]["request"]["url"]
            seen = seen or url == file.absolute().as_uri()
            if url != file.absolute().as_uri() and not url.startswith("data:"):
                failures.append(url)
    return failures if seen else ["the log does not have the request of the page"]


def _console(browser: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def _screenshot(browser: webdriver.Chrome, width: int, file: Path) -> None:
    height = browser.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    done = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    file.write_bytes(base64.b64decode(done["data"]))

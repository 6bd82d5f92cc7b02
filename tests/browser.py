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
from selenium.webdriver.support.wait import WebDriverWait

WIDTHS = (390, 1280)
SCHEMES = ("light", "dark")

INSPECT = Path(__file__).with_suffix(".js")
"""Run in the page, this lists what is wrong with it."""


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
                _open(browser, file)
                found = browser.execute_script(INSPECT.read_text(encoding="utf-8"))
                if screenshots is not None:
                    _screenshot(browser, width, screenshots / f"{file.stem}-{width}-{scheme}.png")
                where = f"{file.name}, {width} px, {scheme}"
                assert found["faults"] == [], f"{where}: " + "\n".join(found["faults"])
                troubles = _failures(browser, file) + _console(browser)
                assert troubles == [], f"{where}: " + "\n".join(troubles)
                backgrounds[width, scheme] = found["background"]
    for width in WIDTHS:
        assert backgrounds[width, "light"] != backgrounds[width, "dark"], f"{file.name}: no dark scheme at {width} px"


def read_text(file: Path, selector: str) -> list[str]:
    """What the elements say that a CSS selector finds."""
    with _chromium() as browser:
        _open(browser, file)
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


def _open(browser: webdriver.Chrome, file: Path) -> None:
    """Open a page, and wait until all of it is there: for the driver may take the page before for this one."""
    address = file.absolute().as_uri()
    browser.get("about:blank")
    browser.get(address)
    ready = "return document.readyState === 'complete' && location.href === arguments[0]"
    WebDriverWait(browser, 60).until(lambda _: browser.execute_script(ready, address))


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
            if url not in (file.absolute().as_uri(), "about:blank") and not url.startswith("data:"):
                failures.append(url)
    return failures if seen else ["the log does not have the request of the page"]


def _console(browser: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def _screenshot(browser: webdriver.Chrome, width: int, file: Path) -> None:
    height = browser.execute_script("return document.documentElement.scrollHeight")
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    done = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    file.write_bytes(base64.b64decode(done["data"]))

"""Reports as text: what is on the page, what is not, and that nothing in it can be taken for code."""

import base64
import builtins
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from skimage.color import rgb2lab

from evaluation_parts import photo
from evaluations import (
    ALL,
    HOSTILE,
    broken,
    classification,
    four,
    hostile,
    many,
    multilabel,
    regression,
    segmentation,
    single,
)
from masksurgery import plots, report
from masksurgery.evaluation import Curve, Evaluation, Histogram, ModelEvaluation, Reliability, Sample, Vote
from masksurgery.panels import write_number
from masksurgery.report import render_report, write_report
from masksurgery.scores import Threshold
from masksurgery.types import CheckpointError, ConfigError, EvaluationError

DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"


@cache
def render(make: Callable[[], Evaluation]) -> str:
    return render_report(make())


class Page(HTMLParser):
    """The elements of a page, each as its name and attributes; its texts; and what opens and never closes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.texts.append(" ".join(data.split()))

    def count(self, tag: str, **attrs: str) -> int:
        return sum(name == tag and attrs.items() <= found.items() for name, found in self.elements)

    def labels(self) -> list[str]:
        """The first word of what each drawing is."""
        return [found["aria-label"].split()[0] for name, found in self.elements if name == "svg" and "role" in found]

    def headings(self) -> list[str]:
        return [found["id"] for name, found in self.elements if name == "h2"]


@pytest.fixture
def whole() -> str:
    return render(classification)


@pytest.mark.parametrize(
    "make", [pytest.param(f, id=name, marks=[pytest.mark.slow] * (name != "single")) for name, f in ALL.items()]
)
def test_a_page_is_whole_and_asks_for_nothing(make: Callable[[], Evaluation]) -> None:
    page = render(make)
    parsed = Page(page)
    assert parsed.open == [] and parsed.count("html", lang="en") == 1
    ids = [found["id"] for _, found in parsed.elements if "id" in found]
    assert len(ids) == len(set(ids))
    assert not re.search(r"url\((?!#[mp][0-9a-f]{10}\))|@import|https?:", re.sub(r"<meta http-equiv[^>]*>", "", page))
    for name, found in parsed.elements:
        assert name not in ("script", "iframe", "object", "base", "form")
        assert not [key for key in found if key.startswith("on")]
        assert found.get("src", "data:").startswith("data:")
        assert found.get("href", "#").startswith("#") or (name == "link" and found["href"] == "data:,")
        if name == "img":
            assert found["alt"]
    assert "default-src 'none'" in page and "prefers-color-scheme: dark" in page


@pytest.mark.slow
def test_names_are_text() -> None:
    page = render(hostile)
    texts = Page(page).texts
    assert all(name in texts for name in HOSTILE if name != "")
    assert "<script" not in page and "onerror=alert(2)>" not in page


def test_everything_is_there(whole: str) -> None:
    page = Page(whole)
    assert page.headings() == [
        "headline",
        "figures",
        "reliability",
        "risk",
        "ood",
        "corruption",
        "members",
        "galleries",
    ]
    # Two sets: by max probability and entropy two histograms and a ROC, by the two other scores those of the ensemble.
    assert (
        page.labels()
        == ["Reliability"] * 2
        + ["Risk-coverage"]
        + (["Histograms", "Histograms", "ROC"] * 2 + ["Histograms", "ROC"] * 2) * 2
        + ["accuracy", "NLL", "ECE"] * 4
    )
    assert page.count("figure") == 2 + 1 + 2 * 10 + 12 + 2 * 4 * 8
    assert page.count("img") == 2 * 4 * 8
    assert page.count("table") == 1 + 2 + 1 and page.count("caption") == 4
    assert page.count("td", **{"class": "heat"}) == 12


@pytest.mark.slow
def test_the_headline_says_what_changed(whole: str) -> None:
    texts = Page(whole).texts
    assert ", of 6 figures 6 got better." in " ".join(texts)
    assert "better by 4.00 points" in " ".join(texts)  # accuracy from 92.4% to 96.4%
    assert "better by 29.4%" in " ".join(texts)  # NLL from 0.34 to 0.24
    worse = classification()
    worse = replace(worse, models=(worse.models[0], replace(worse.models[1], figures={"accuracy": 0.5, "nll": 0.34})))
    text = " ".join(Page(render_report(replace(worse, models=worse.models[::-1]))).texts)
    assert ", of 4 figures 2 got better, 1 got worse and 1 stayed the same." in text  # base first, whatever the order
    assert "worse by 42.4 points" in text


def test_the_best_is_marked(whole: str) -> None:
    cells = re.findall(r'<td data-model="([^"]*)"( class="best")?>([^<]*)</td>', whole)
    assert ("runs/resnet10t-masked", ' class="best"', "0.240") in cells and ("resnet10t", "", "0.340") in cells
    assert ("runs/resnet10t-masked", ' class="best"', "96.4%") in cells and ("resnet10t", "", "92.4%") in cells
    assert ("runs/resnet10t-masked", "", "88.0%") in cells  # agreement is neither good nor bad
    assert ("runs/resnet10t-masked", "", "entropy ≤ 0.620") in cells and ("resnet10t", "", "1.87") in cells
    assert 'class="best"' not in render(single)


def test_the_best_of_each_score_is_marked(whole: str) -> None:
    rows = re.findall(r'<th scope="row"><bdi>([^<]*)</bdi></th>((?:<td[^/]*/td>)+)</tr>', whole)
    entropy = [(name, re.findall(r"<td( class=.best.)?>([^<]*)<", cells)) for name, cells in rows[2:4]]
    best = ' class="best"'
    assert entropy == [
        ("resnet10t", [("", "78.0%"), ("", "68.0%"), ("", "32.0%")]),
        ("runs/resnet10t-masked", [(best, "88.0%"), (best, "78.0%"), (best, "22.0%")]),
    ]
    assert "best" not in rows[4][1]  # the base model has no mutual information


def test_the_sentence_of_a_reliability_diagram(whole: str) -> None:
    assert "81.3% sure on average, 71.5% right: surer than right." in Page(whole).texts
    bins = Reliability((0.25, 0.75), (0.5, 0.75), (0.0, 1.0))
    model = replace(single().models[0], reliability=bins)
    page = Page(render_report(replace(single(), models=(model,))))
    assert "75.0% sure on average, 75.0% right: as it should be." in page.texts
    model = replace(model, reliability=replace(bins, accuracy=(0.5, 1.0)))
    page = Page(render_report(replace(single(), models=(model,))))
    assert "75.0% sure on average, 100% right: less sure than right." in page.texts


def test_sections_without_data_do_not_appear() -> None:
    page = Page(render(single))
    assert page.headings() == ["headline", "figures"]
    assert page.labels() == [] and page.count("img") == 0 and page.count("th") == 2 + 2
    assert "In short" in page.texts and "1 image, classification." in page.texts
    assert Page(render(regression)).headings() == [
        "headline", "figures", "reliability", "risk", "corruption", "members", "galleries"
    ]  # fmt: skip


def test_figures_that_are_no_numbers_are_dashes() -> None:
    page = render(broken)
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"base64,[^\"]*", "", page), re.IGNORECASE)
    assert f">{DASH}</td>" in page
    labels = Page(page).labels()
    assert labels.count("Reliability") == 1 and labels.count("Risk-coverage") == 1  # those of the sound model
    assert "Histograms" not in labels and "ROC" not in labels


def test_segmentation_shows_maps() -> None:
    page = Page(render(segmentation))
    alts = [found["alt"] for name, found in page.elements if name == "img"]
    assert alts[:4] == ["image", "prediction", "truth", "variance"] and len(alts) == 2 * (8 + 3) * 4


def test_votes_are_listed_or_counted() -> None:
    votes = tuple(Vote("cat" if i % 3 else "dog", 0.9) for i in range(12))
    sample = Sample("a.png", photo(0), "cat", "cat", True, {"max_probability": 0.1, "entropy": 0.3}, votes, unsure=True)

    def text(n: int) -> str:
        shown = replace(sample, votes=votes[:n])
        model = ModelEvaluation("m", "converted", n, {"accuracy": 1.0}, galleries={"surest": (shown,)})
        return " ".join(Page(render_report(Evaluation("d", 1, "classification", (model,)))).texts)

    assert "probability 0.900 entropy 0.300 1 ≠ dog 0.900 2 cat 0.900 3 cat 0.900 4 ≠ dog 0.900" in text(4)
    assert text(12).endswith("unsure probability 0.900 entropy 0.300 cat 8 dog 4")


def test_votes_without_probabilities() -> None:
    text = " ".join(Page(render(multilabel)).texts)
    assert "entropy 0.300 1 sunny, beach 2 ≠ sunny 3 sunny, beach 4 ≠ none" in text
    assert "Each bar holds the labels of a confidence" in text
    assert "1 30 2 31 3 32 4 33" in " ".join(Page(render(regression)).texts)  # numbers always differ


def test_a_single_point_and_an_empty_range_are_drawn() -> None:
    model = replace(
        classification().models[1],
        risk_coverage={"max_probability": Curve((1.0,), (0.0,))},
        histograms={"variance": {"": Histogram((0.0, 0.0), (1.0,)), "noise": Histogram((0.0, 0.0), (1.0,))}},
    )
    labels = Page(render_report(Evaluation("d", 1, "classification", (model,)))).labels()
    assert "Risk-coverage" in labels and "Histograms" in labels


@pytest.mark.parametrize(
    ("values", "limits"),
    [
        ([(0.5, 1.0), (2.0,)], (0, 2.12)),
        ([(-1.0, 1.0)], (-1.06, 1.06)),  # the NLL of a regression
        ([(-2.0, -1.0)], (-2.12, 0)),
        ([(0.0,)], (0, 1)),
        ([(float("nan"), float("inf"))], (0, 1)),
        ([], (0, 1)),
    ],
)
def test_axes_hold_all_numbers(values: list[tuple[float, ...]], limits: tuple[float, float]) -> None:
    assert plots.limits_of(values) == pytest.approx(limits)


@pytest.mark.slow
def test_the_same_evaluation_gives_the_same_page(whole: str) -> None:
    assert render_report(classification()) == whole


@pytest.mark.slow
def test_the_users_settings_of_matplotlib_are_not_used_and_not_changed(whole: str) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 33, "axes.facecolor": "red", "text.usetex": True}):
        before = dict(matplotlib.rcParams)
        assert render_report(classification()) == whole
        assert dict(matplotlib.rcParams) == before


def test_drawings_take_their_colours_from_the_page(whole: str) -> None:
    css = (Path(report.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    drawings = re.findall(r'<svg viewBox="0 0 340.*?</svg>', whole, re.DOTALL)
    used = set(re.findall(r"var\(--([\w-]+)\)", "".join(drawings)))
    assert {"ink", "muted", "line", "bar", "known", "unknown", "series-0", "series-1"} == used
    assert all(css.count(f"--{role}: #") == 2 for role in plots.ROLES)  # in light and in dark
    assert not re.search(r"(?<!url\()#[0-9a-f]{6}\b|font-family|DejaVu", re.sub(r'href="#\w+"', "", "".join(drawings)))
    assert all("<text" in drawing for drawing in drawings)


# From linear RGB to what is seen without one of the three kinds of cones: Machado et al. 2009, severity 1.
BLINDNESS = {
    "none": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("kind", BLINDNESS)
def test_models_differ_for_the_colour_blind(kind: str, scheme: int) -> None:
    css = (Path(report.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    found = re.findall(r"--series-\d: #(\w{6})", css)[6 * scheme : 6 * scheme + 6]
    rgb = np.array([list(bytes.fromhex(color)) for color in found]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(BLINDNESS[kind]), 0, 1)
    lab = rgb2lab(np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055))
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(6, 1)]
    assert len(distances) == 15 and distances.min() > 15


def test_models_differ_in_more_than_colour() -> None:
    looks = [plots.series(k) for k in range(12)]
    assert len({(look.role, look.dashes) for look in looks}) == 12
    assert len({(look.dashes, look.marker) for look in looks}) == 12


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [
        (0.97345, True, "97.3%"), (1.0, True, "100%"), (0.0, True, "0%"), (0.00012, True, "0.0120%"),
        (0.5, False, "0.500"), (7, False, "7.00"), (0.0, False, "0"), (12345.6, False, "12,346"),
        (999.7, False, "1,000"), (3.2e-6, False, "3.20·10⁻⁶"), (2.5e9, False, "2.50·10⁹"),
        (-1.5, False, f"{MINUS}1.50"), (float("nan"), True, DASH), (float("inf"), False, DASH), (None, False, DASH),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | None, percent: bool, text: str) -> None:
    assert write_number(value, percent) == text


@pytest.mark.slow
@pytest.mark.parametrize("make", [four, many])
def test_many_models_stay_small(make: Callable[[], Evaluation]) -> None:
    """Four models with eight images in each gallery, and twelve without."""
    assert 1e6 < len(render(make).encode()) < 5e6


@pytest.mark.slow
def test_a_report_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text("old")
    assert write_report(hostile(), str(file)) == file  # one name is not UTF-8
    assert file.read_text(encoding="utf-8").endswith("</html>") and "not\\udcffutf-8" in file.read_text(
        encoding="utf-8"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"report\.html: cannot be written \(.*No such file"):
        write_report(single(), tmp_path / "none" / "report.html")


def test_no_models(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"photos: there is no model to report\. Evaluate one first"):
        write_report(replace(single(), models=()), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_of_another_kind(tmp_path: Path) -> None:
    sample = Sample("a.gif", b"GIF89a...", None, "cat", None, {})
    model = replace(single().models[0], galleries={"surest": (sample,)})
    with pytest.raises(
        EvaluationError, match=r"'a.gif': the picture begins with b'GIF89a..', and is neither PNG nor JPEG"
    ):
        write_report(replace(single(), models=(model,)), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_those_that_were_given() -> None:
    sample = Sample("a.jpg", photo(1), None, "cat", None, {})
    model = replace(single().models[0], galleries={"surest": (sample,)})
    page = Page(render_report(replace(single(), models=(model,))))
    (address,) = [found["src"] for name, found in page.elements if name == "img"]
    assert address.startswith("data:image/jpeg;base64,") and base64.b64decode(address.split(",")[1]) == photo(1)


@pytest.mark.parametrize(("package", "title"), [("matplotlib", "matplotlib"), ("jinja2", "Jinja2")])
def test_a_package_that_is_missing(package: str, title: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def fail(name: str, *args: object, **more: object) -> object:
        if name.split(".")[0] == package:
            raise ImportError(f"No module named '{name}'")
        return original(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(
        ConfigError, match=rf"A report needs {title} \(No module .*pip install \"masksurgery\[evaluate\]\""
    ):
        render_report(classification())


def test_a_threshold_of_a_probability_is_a_least() -> None:
    assert report.write_threshold(Threshold("max_probability", 0.8)) == "max probability ≥ 0.800"
    assert report.write_threshold(Threshold("entropy", 0.5)) == "entropy ≤ 0.500"


@pytest.mark.slow
def test_imports_are_light() -> None:
    """A report imports matplotlib when it is drawn, and never pyplot, which has a global state."""
    code = """
import sys, masksurgery.report
print(*({"matplotlib", "jinja2"} & set(sys.modules)), end=";")
import evaluations
masksurgery.report.render_report(evaluations.regression())
print(*({"matplotlib", "matplotlib.pyplot"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ";matplotlib"), done.stderr

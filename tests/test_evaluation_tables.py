"""Tables of evaluations at 80 columns, and the plain data behind them."""

import io
import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from evaluations import ALL
from masksurgery.evaluation import METRICS
from masksurgery.evaluation_tables import evaluation_tables, number, rule
from masksurgery.scores import Threshold


def draw(name: str, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    console.print(evaluation_tables(ALL[name]()))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_evaluation_fits_a_terminal(name: str) -> None:
    text = draw(name)
    assert max(map(len, text.splitlines())) <= 80
    evaluation = ALL[name]()
    for key in evaluation.models[0].figures:
        assert METRICS[key].title in text
    json.loads(evaluation.to_json())  # NaN and infinity are null there
    assert "nan" not in text and "inf" not in text.replace("information", "")


def test_the_figures_stand_under_their_model() -> None:
    evaluation = ALL["classification"]()
    line = next(line for line in draw("classification").splitlines() if line.startswith("NLL"))
    assert line.split()[1:] == [f"{model.figures['nll']:.3f}" for model in evaluation.models]


def test_more_models_than_columns_get_tables_of_their_own() -> None:
    text = draw("many", 120)
    assert len([line for line in text.splitlines() if line.startswith("accuracy ")]) >= 3


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (1.0, "1.000"), (math.nan, "-"), (None, "-"), (math.inf, "-"), (0.0, "0.000")],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value, METRICS["nll"]) == text


def test_small_and_large_numbers_keep_their_digits() -> None:
    assert number(0.000012345, METRICS["aurc"]) == "1.23e-05" and number(123456.0, METRICS["rmse"]) == "1.23e+05"


def test_a_threshold_in_words() -> None:
    assert rule(Threshold("max_probability", 0.8)) == "max probability is at least 0.800"
    assert rule(Threshold("max_probability", 1 - 7.1e-5)) == "max probability is at least 0.999929"
    assert rule(Threshold("max_probability", 1.0)) == "max probability is at least 1.00"
    assert rule(Threshold("mutual_information", 0.25)) == "mutual information is at most 0.250"


def test_equal_figures_are_not_marked() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard")
    evaluation = ALL["classification"]()
    first = evaluation.models[0]
    console.print(evaluation_tables(replace(evaluation, models=(first, replace(first, name="other")))))
    line = next(x for x in console.file.getvalue().splitlines() if x.startswith("NLL"))  # type: ignore[attr-defined]
    assert "\x1b[1m" not in line

"""Temperatures against a minimiser over all T, thresholds against the images themselves."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from masksurgery.calibration import TemperatureFit, fit_threshold
from masksurgery.metrics import RankedScores, Suite
from masksurgery.prediction import Head, Prediction, RegressionPrediction, classification, regression
from masksurgery.scores import Score, image_scores
from masksurgery.types import ConfigError, EvaluationError
from scoring import classes, draw, draw_classes, feed

SEEDS = range(3)


def nll_by_hand(members: Tensor, y: Tensor, temperature: float) -> float:
    p = (members / temperature).softmax(-1).mean(1)
    return -p[range(len(y)), y].log().mean().item()


# --- temperature -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("sharpness", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("n", [1, 3])
def test_temperature_of_classes(seed: int, sharpness: float, n: int) -> None:
    members, y = draw_classes(seed, 400, n, 5)
    members = members * sharpness
    found = feed(TemperatureFit("classification"), classes(members), y, seed).compute_temperature()
    best = minimize_scalar(
        lambda t: nll_by_hand(members, y, math.exp(t)), bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}
    )
    assert found == pytest.approx(math.exp(best.x), rel=2e-3)
    assert nll_by_hand(members, y, found) == pytest.approx(best.fun, abs=1e-5)


def test_the_head_takes_the_temperature_for_what_it_was_fitted_as() -> None:
    members, y = draw_classes(0, 300, 3, 4, scale=6)
    head = Head(3, [0], ["classification"])
    outputs = members.movedim(1, 0).flatten(0, 1)
    fit = TemperatureFit("classification")
    fit.update(head.aggregate(outputs), y)
    before = torch.nn.functional.cross_entropy(head.aggregate(outputs).logits, y)
    head.temperature = fit.compute_temperature()
    assert head.temperature > 1
    after = torch.nn.functional.cross_entropy(head.aggregate(outputs).logits, y)
    assert after < before and after.item() == pytest.approx(nll_by_hand(members, y, head.temperature))


def test_temperature_of_probabilities() -> None:
    members, y = draw_classes(1, 300, 2, 4, scale=4)
    p = classification(members.softmax(-1), 2, "probabilities")
    found = feed(TemperatureFit("probabilities"), p, y).compute_temperature()
    of_logits = feed(TemperatureFit("classification"), classes(members), y).compute_temperature()
    assert found == pytest.approx(of_logits, rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(400, 3), (400,)])
def test_temperature_of_labels(seed: int, shape: tuple[int, ...]) -> None:
    members = draw(seed, shape[0], 2, *shape[1:], scale=4)
    y = (draw(seed + 5, *shape, scale=3) + members.mean(1) > 0).long()
    found = feed(TemperatureFit("multilabel"), classification(members, 2, "multilabel"), y).compute_temperature()

    def nll(t: float) -> float:
        p = torch.sigmoid(members / math.exp(t)).mean(1)
        return -torch.where(y == 1, p, 1 - p).log().mean().item()

    best = minimize_scalar(nll, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9})
    assert found == pytest.approx(math.exp(best.x), rel=2e-3)


@pytest.mark.parametrize("size", [(40, 60), (5, 7), (1, 900), (11, 12, 13)])
def test_temperature_of_pixels(size: tuple[int, ...]) -> None:
    """On a grid in each image, however images are put into batches."""
    members = draw(0, 6, 2, 3, *size, scale=3)
    y = (members.mean(1) + draw(1, 6, 3, *size, scale=3)).argmax(1)
    y[draw(2, *y.shape) > 0.5] = 255
    fits = [TemperatureFit("classification", segmentation=True) for _ in range(2)]
    p = classes(members)
    fits[0].update(p, y)
    feed(fits[1], p, y)
    found = [fit.compute_temperature() for fit in fits]
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    kept = int(fits[0].items) / 6 / (y != 255).double().mean().item()
    pixels = math.prod(size)
    assert min(pixels, 256) / 2 <= kept <= 512
    known = y != 255
    flat = members.movedim(2, -1).movedim(1, -2)[known]
    best = minimize_scalar(lambda t: nll_by_hand(flat, y[known], math.exp(t)), bounds=(-3, 3), method="bounded")
    assert found[0] == pytest.approx(math.exp(best.x), rel=0.15)


def test_labels_of_pixels_and_classes_at_the_end() -> None:
    members = draw(0, 4, 2, 3, 8, 8, scale=3)
    y = (members.mean(1) + draw(1, 4, 3, 8, 8, scale=3)).argmax(1)
    first = TemperatureFit("classification", segmentation=True)
    last = TemperatureFit("classification", segmentation=True, class_dim=-1)
    first.update(classes(members), y)
    last.update(classification(members.movedim(2, -1), 4, "classification"), y)
    assert first.compute_temperature() == pytest.approx(last.compute_temperature(), rel=1e-12)
    labels = (draw(2, 4, 3, 8, 8) + members.mean(1) > 0).long()
    pixels = TemperatureFit("multilabel", segmentation=True)
    pixels.update(classification(members, 2, "multilabel"), labels)
    images = TemperatureFit("multilabel")
    images.update(classification(members, 2, "multilabel"), labels)
    assert pixels.compute_temperature() == pytest.approx(images.compute_temperature(), rel=1e-12)


@pytest.mark.parametrize("heteroscedastic", [False, True])
def test_temperature_of_numbers_is_the_best(heteroscedastic: bool) -> None:
    members = draw(0, 300, 3, 2)
    p = regression(members, draw(1, 300, 3, 2) if heteroscedastic else None)
    y = p.mean + 2.5 * p.variance.sqrt() * draw(2, 300, 2)
    found = feed(TemperatureFit("regression"), p, y.flatten(1)).compute_temperature()
    assert found == pytest.approx(2.5, rel=0.1)

    def nll(t: float) -> float:
        suite = Suite("regression", n=3, outputs=2, detail=False)
        suite.update(p._replace(variance=p.variance * t**2), y)
        return suite.compute().figures["nll"]

    best = minimize_scalar(nll, bounds=(0.5, 5), method="bounded", options={"xatol": 1e-9})
    assert found == pytest.approx(best.x, rel=1e-6)


@pytest.mark.parametrize(("right", "why"), [(True, "all right, however confident"), (False, "no better than chance")])
def test_no_temperature_is_made_up(right: bool, why: str, caplog: pytest.LogCaptureFixture) -> None:
    members = draw(0, 50, 1, 3)
    y = members[:, 0].argmax(1) if right else members[:, 0].argmin(1)
    fit = TemperatureFit("classification")
    fit.update(classes(members), y)
    with caplog.at_level(logging.WARNING):
        assert fit.compute_temperature() == 1
    assert "determine no temperature, and it stays 1" in caplog.text and why in caplog.text


@pytest.mark.parametrize("logits", [(0.0, 0.0, 0.0), (0.7, 0.7, 0.7), (90.0, 0.0, 0.0)])
def test_where_no_temperature_matters_it_is_1(logits: tuple[float, ...], caplog: pytest.LogCaptureFixture) -> None:
    """Equal logits; and a certainty that has no more digits to gain."""
    fit = TemperatureFit("classification")
    fit.update(classes(torch.tensor(logits).expand(8, 2, 3)), torch.zeros(8, dtype=torch.int64))
    assert fit.compute_temperature() == 1
    assert not caplog.records


def test_what_no_temperature_can_be_fitted_to() -> None:
    with pytest.raises(EvaluationError, match=r"There is nothing to fit a temperature to: no images were held out"):
        TemperatureFit("classification").compute_temperature()
    impossible = TemperatureFit("classification")
    impossible.update(classes(torch.tensor([[[0.0, -torch.inf]]])), torch.tensor([1]))
    with pytest.raises(EvaluationError, match=r"gives a truth the probability 0 at every temperature"):
        impossible.compute_temperature()
    members = draw(0, 6, 2, 1)
    members[2] = 1
    blind = TemperatureFit("regression")
    blind.update(regression(members), draw(1, 6, 1))
    with pytest.raises(EvaluationError, match=r"1 of 6 predictions have a variance of 0, .* heteroscedastic=True"):
        blind.compute_temperature()
    exact = TemperatureFit("regression")
    exact.update(regression(draw(0, 6, 2, 1)), draw(0, 6, 2, 1).mean(1))
    with pytest.raises(EvaluationError, match=r"All 6 predictions are exactly right"):
        exact.compute_temperature()


@pytest.mark.parametrize(
    ("task", "p", "y", "message"),
    [
        ("classification", classes(torch.full((2, 1, 3), torch.nan)), torch.tensor([0, 1]), r"of 2 of 2 images .* NaN"),
        ("classification", classes(torch.zeros(2, 1, 3)), torch.tensor([0, 7]), r"1 of 2 targets are no class"),
        ("multilabel", classification(torch.zeros(1, 1, 2), 2, "multilabel"), torch.tensor([[2, 1]]), r"neither 0 nor"),
        ("regression", regression(torch.zeros(2, 1)), torch.tensor([0.0, torch.inf]), r"targets of 1 of 2 images"),
    ],
)
def test_what_is_refused(task: Any, p: Prediction | RegressionPrediction, y: Tensor, message: str) -> None:
    fit = TemperatureFit(task)
    with pytest.raises(EvaluationError, match=message):
        fit.update(p, y)
    assert int(fit.items) == 0


# --- threshold -------------------------------------------------------------------------------------------------------


def ranked_classes(seed: int, b: int = 500) -> tuple[RankedScores, Prediction, Tensor]:
    members, y = draw_classes(seed, b, 3, 5)
    p = classes(members)
    wrong = (p.mean.argmax(1) != y).double()
    ranked = RankedScores("classification", n=3)
    ranked.update(p, wrong)
    return ranked, p, wrong


ALL: tuple[Score, ...] = ("max_probability", "entropy", "mutual_information", "variance")


@pytest.mark.parametrize("score", ALL)
@pytest.mark.parametrize("coverage", [0.002, 0.5, 0.9, 1.0])
def test_a_coverage_is_reached_and_hardly_passed(score: Score, coverage: float) -> None:
    ranked, p, _ = ranked_classes(0)
    threshold = fit_threshold(ranked, score, coverage=coverage)
    answered = (~threshold.unsure(p, "classification")).double().mean().item()
    assert coverage <= answered <= coverage + 0.01


@pytest.mark.parametrize("score", ALL)
@pytest.mark.parametrize("risk", [0.02, 0.1, 0.9])
def test_a_risk_is_kept_and_no_larger_share_would_keep_it(score: Score, risk: float) -> None:
    ranked, p, wrong = ranked_classes(1)
    threshold = fit_threshold(ranked, score, risk=risk)
    answered = ~threshold.unsure(p, "classification")
    assert wrong[answered].mean() <= risk
    order = image_scores(p, "classification")[score].argsort()
    risks = wrong[order].cumsum(0) / torch.arange(1, len(wrong) + 1)
    largest = int((risks <= risk).nonzero().max()) + 1
    assert largest - 5 <= int(answered.sum()) <= largest


@pytest.mark.parametrize("score", ["max_probability", "entropy"])
def test_images_without_any_doubt_are_answered(score: Score) -> None:
    members = torch.zeros(10, 2, 2)
    members[:4, :, 0] = 200  # their doubt is exactly 0
    p = classes(members)
    ranked = RankedScores("classification", n=2)
    ranked.update(p, torch.tensor([0.0] * 4 + [1.0] * 6))
    threshold = fit_threshold(ranked, score, risk=0)
    assert threshold.unsure(p, "classification").tolist() == [False] * 4 + [True] * 6


@pytest.mark.parametrize("unsure", [1e-17, 3e-16, 1e-12, 0.3, 0.5])
def test_rounding_of_1_less_u_refuses_none_of_the_bin(unsure: float) -> None:
    logits = torch.tensor([[math.log1p(-unsure), -30]], dtype=torch.float64)
    p = classes(logits.unsqueeze(1))._replace(logits=logits)
    ranked = RankedScores("classification", n=1)
    ranked.update(p)
    threshold = fit_threshold(ranked, "max_probability", coverage=1.0)
    assert not threshold.unsure(p, "classification").any()
    assert threshold.value == pytest.approx(1 - unsure, abs=1e-3)


def test_a_threshold_on_numbers() -> None:
    variance = torch.tensor([1.0, 2.0, 4.0, 8.0])
    p = RegressionPrediction(torch.zeros(4), variance, torch.zeros(4, 2))
    ranked = RankedScores("regression", n=2)
    ranked.update(p, torch.tensor([1.0, 3.0, 5.0, 100.0]))
    threshold = fit_threshold(ranked, "variance", risk=3)
    assert threshold.score == "variance" and threshold.value == pytest.approx(4, rel=1e-3)
    assert threshold.unsure(p, "regression").tolist() == [False, False, False, True]
    # 2 opens its bin, and the one below it ends just before
    assert 1 <= fit_threshold(ranked, "variance", coverage=0.25).value < 1.001


def test_what_no_threshold_can_be_fitted_to() -> None:
    ranked, _, _ = ranked_classes(0)
    for arguments in ({}, {"coverage": 0.5, "risk": 0.1}):
        with pytest.raises(ConfigError, match=r"Pass coverage= or risk=, one of the two"):
            fit_threshold(ranked, "entropy", **arguments)
    for coverage in (0, 1.1, math.nan):
        with pytest.raises(ConfigError, match=r"coverage=.* is no share of the images\. Pass a number in \(0, 1\]"):
            fit_threshold(ranked, "entropy", coverage=coverage)
    for risk in (-0.1, math.nan):
        with pytest.raises(ConfigError, match=r"risk=.* is no error\. Pass a number from 0 on"):
            fit_threshold(ranked, "entropy", risk=risk)
    one = RankedScores("classification", n=1)
    one.update(classes(torch.zeros(3, 1, 2)), torch.ones(3))
    with pytest.raises(EvaluationError, match=r"The score 'variance' means nothing here"):
        fit_threshold(one, "variance", coverage=0.5)
    with pytest.raises(
        EvaluationError, match=r"at most 0\.25: the smallest that can be had is 1, of the surest 100\.0%"
    ):
        fit_threshold(one, "entropy", risk=0.25)
    with pytest.raises(EvaluationError, match=r"There are no images"):
        fit_threshold(RankedScores("regression", n=1), "variance", coverage=0.5)


def test_the_smallest_risk_is_named() -> None:
    p = RegressionPrediction(torch.zeros(4), torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.zeros(4, 2))
    ranked = RankedScores("regression", n=2)
    ranked.update(p, torch.tensor([1.0, 0.5, 0.0, 9.0]))
    with pytest.raises(EvaluationError, match=r"smallest that can be had is 0\.5, of the surest 75\.0% of the images"):
        fit_threshold(ranked, "variance", risk=0.4)
    assert np.isclose(fit_threshold(ranked, "variance", risk=0.5).value, 4, rtol=1e-3)

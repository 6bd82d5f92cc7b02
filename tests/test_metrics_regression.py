"""The figures of numbers against scikit-learn, scipy, torchmetrics and integrals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.metrics import mean_absolute_error, root_mean_squared_error
from torch import Tensor

from masksurgery.evaluation import METRICS
from masksurgery.metrics import Found, Suite
from masksurgery.metrics.normal import LEVELS, crps_of_members, crps_of_normal
from masksurgery.prediction import regression
from masksurgery.types import ConfigError, EvaluationError
from scoring import aurc_by_hand, draw, feed

SEEDS = range(4)


def evaluate(members: Tensor, y: Tensor, log_variance: Tensor | None = None, **settings: Any) -> Found:
    suite = Suite("regression", n=members.shape[1], outputs=2, heteroscedastic=log_variance is not None, **settings)
    return feed(suite, regression(members, log_variance), y).compute()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("heteroscedastic", [False, True])
@pytest.mark.parametrize("shape", [(300, 2), (300,)])
def test_numbers_against_scipy_and_scikit_learn(seed: int, heteroscedastic: bool, shape: tuple[int, ...]) -> None:
    members = draw(seed, shape[0], 3, *shape[1:], scale=3)
    log_variance = draw(seed + 10, *members.shape) if heteroscedastic else None
    y = draw(seed + 20, *shape, scale=2)
    found = evaluate(members, y.reshape(300, 1, *shape[1:]), log_variance)
    p = regression(members, log_variance)
    mean, sigma, truth = p.mean.numpy(), p.variance.sqrt().numpy(), y.numpy()
    low, high = norm.interval(0.9, mean, sigma)
    flat = members.movedim(1, -1).flatten(0, -2).numpy()
    of_normal = crps_of_normal(p.mean.flatten(), p.variance.flatten(), y.flatten()).mean().item()
    expected = {
        "rmse": root_mean_squared_error(truth, mean),
        "nll": -norm.logpdf(truth, mean, sigma).mean(),
        "coverage90": ((low <= truth) & (truth <= high)).mean(),
        "crps": of_normal if heteroscedastic else crps_by_pairs(flat, truth.ravel()),
        "spread": np.sqrt(np.mean(sigma**2)),
    }
    if len(shape) == 2:
        expected["rmse"] = np.sqrt(np.mean((truth - mean) ** 2))  # scikit-learn takes the mean of the roots
    loss, unsure = ((mean - truth) ** 2).reshape(300, -1).mean(1), (sigma**2).reshape(300, -1).mean(1)
    assert found.figures["aurc"] == pytest.approx(aurc_by_hand(unsure, loss), rel=1e-2)
    assert {name: x for name, x in found.figures.items() if name != "aurc"} == pytest.approx(expected, abs=1e-9)
    assert list(found.figures) == [name for name in METRICS if name in found.figures]
    each = [np.sqrt(np.mean((members[:, i].numpy() - truth) ** 2)) for i in range(3)]
    assert found.members == pytest.approx(each)
    assert found.disagreement == ()
    assert found.reliability is not None
    inside = [np.mean(np.abs(truth - mean) <= norm.ppf((1 + level) / 2) * sigma) for level in LEVELS]
    assert found.reliability.confidence == LEVELS
    assert found.reliability.accuracy == pytest.approx(inside)
    assert found.reliability.shares == pytest.approx([1 / 11] * 11)
    assert tuple(found.risk_coverage) == ("variance",)
    assert found.risk_coverage["variance"].y[-1] == pytest.approx(np.mean((truth - mean) ** 2))


def crps_by_pairs(members: np.ndarray, y: np.ndarray) -> float:
    pairs = np.abs(members[:, :, None] - members[:, None, :]).mean((1, 2))
    return float(np.mean(np.abs(members - y[:, None]).mean(1) - pairs / 2))


def test_crps_is_the_integral_that_defines_it() -> None:
    mean, variance, y = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, -2.0], [0.25, 4.0], [1.7, 3.0]))
    found = crps_of_normal(mean, variance, y)
    for i in range(2):
        m, s, t = mean[i].item(), variance[i].sqrt().item(), y[i].item()
        below, _ = quad(lambda x, m=m, s=s: norm.cdf(x, m, s) ** 2, -30, t)
        above, _ = quad(lambda x, m=m, s=s: norm.sf(x, m, s) ** 2, t, 30)
        assert found[i].item() == pytest.approx(below + above, abs=1e-7)


def test_crps_of_members_is_that_of_torchmetrics() -> None:
    theirs = pytest.importorskip("torchmetrics.functional.regression.crps", reason="torchmetrics has it from 1.7 on")
    members, y = draw(0, 50, 4), draw(1, 50)
    expected = theirs.continuous_ranked_probability_score(members, y)
    assert crps_of_members(members, y).mean().item() == pytest.approx(expected.item(), abs=1e-12)


# --- degenerate ------------------------------------------------------------------------------------------------------


def test_one_member_without_a_variance_says_nothing_of_its_error() -> None:
    members, y = draw(0, 40, 1, 2), draw(1, 40, 2)
    found = evaluate(members, y)
    assert found.figures == pytest.approx(
        {
            "rmse": math.sqrt((members[:, 0] - y).square().mean()),
            "crps": mean_absolute_error(y, members[:, 0]),
        }
    )
    assert (found.members, found.reliability, found.risk_coverage) == ((), None, {})
    assert evaluate(members, y, detail=False).figures == {"rmse": found.figures["rmse"]}


def test_one_member_with_a_variance_of_its_own_has_all() -> None:
    members, y = draw(0, 40, 1, 2), draw(1, 40, 2)
    found = evaluate(members, y, draw(2, 40, 1, 2))
    assert set(found.figures) == {"rmse", "nll", "aurc", "coverage90", "crps", "spread"}
    assert found.members == ()


def test_members_that_agree_somewhere_make_the_likelihood_zero() -> None:
    members, y = draw(0, 40, 3, 2), draw(1, 40, 2)
    members[5] = members[5, :1]
    y[5] = members[5, 0]  # exactly right: still no density
    found = evaluate(members, y).figures
    assert found["nll"] == math.inf
    assert all(math.isfinite(value) for name, value in found.items() if name != "nll")
    constant = evaluate(torch.zeros(40, 3, 2, dtype=torch.float64), y).figures
    assert constant["nll"] == math.inf
    assert (constant["coverage90"], constant["spread"]) == (0, 0)
    assert constant["crps"] == pytest.approx(y.abs().mean().item())
    assert constant["aurc"] == pytest.approx(y.square().mean().item())


def test_all_right_and_one_item() -> None:
    members = draw(0, 30, 3, 2)
    found = evaluate(members, members.mean(1)).figures
    assert (found["rmse"], found["aurc"], found["coverage90"]) == (0, 0, 1)
    one = evaluate(members[:1, :, :1], torch.zeros(1)).figures
    assert one["rmse"] == pytest.approx(members[0, :, 0].mean().abs().item())
    assert one["aurc"] == pytest.approx(one["rmse"] ** 2)


def test_large_numbers_keep_their_digits() -> None:
    members, y = draw(0, 200, 2, 1), draw(1, 200, 1)
    near, far = evaluate(members, y).figures, evaluate(members + 1e6, y + 1e6).figures
    assert far == pytest.approx(near, rel=1e-6)


def test_without_detail_the_few_figures_are_the_same() -> None:
    members, y = draw(0, 200, 2, 2), draw(1, 200, 2)
    full, few = evaluate(members, y), evaluate(members, y, detail=False)
    assert few.figures == {name: full.figures[name] for name in ("nll", "rmse")}


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_refused() -> None:
    members, y = draw(0, 6, 2, 2), draw(1, 6, 2)
    members[1, 0, 0], members[4, 1, 1] = torch.inf, torch.nan
    with pytest.raises(EvaluationError, match=r"The predictions of 2 of 6 images in a batch are NaN or infinite"):
        evaluate_at_once(members, y)
    y[0, 1] = -torch.inf
    with pytest.raises(EvaluationError, match=r"The targets of 1 of 6 images in a batch are NaN or infinite"):
        evaluate_at_once(draw(0, 6, 2, 2), y)


def evaluate_at_once(members: Tensor, y: Tensor) -> None:
    Suite("regression", n=2, outputs=2).update(regression(members), y)


def test_another_number_of_targets_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"The targets are \(6, 3\), the model's output is \(6, 2\)"):
        evaluate_at_once(draw(0, 6, 2, 2), draw(1, 6, 3))

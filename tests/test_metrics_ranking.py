"""Ranks of scores in fine bins: against exact figures on random scores, and exactly where scores are tied."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from masksurgery.metrics import RankedScores, detect, histograms, roc
from masksurgery.metrics.bins import BINS, bin_edges, bin_index
from masksurgery.prediction import RegressionPrediction, regression
from masksurgery.scores import image_scores
from masksurgery.types import EvaluationError
from scoring import aurc_by_hand, classes, cut, draw, draw_classes

SEEDS = range(4)


def ranked(unsure: Tensor | np.ndarray, loss: Tensor | np.ndarray | None = None, seed: int = 0) -> RankedScores:
    """Any scores, as the variances of a regression, in batches of unequal sizes."""
    unsure = torch.as_tensor(unsure, dtype=torch.float64)
    found = RankedScores("regression", n=2)
    for batch in cut(len(unsure), seed):
        u = unsure[batch]
        p = RegressionPrediction(torch.zeros_like(u), u, torch.zeros(len(u), 2))
        found.update(p, None if loss is None else torch.as_tensor(loss)[batch])
    return found


# --- bins ------------------------------------------------------------------------------------------------------------


def test_bins_keep_the_order_of_numbers_and_are_narrow() -> None:
    u = torch.cat(
        [torch.zeros(1).double(), torch.logspace(-30, 30, 5000, dtype=torch.float64), torch.tensor([torch.inf])]
    )
    index = bin_index(u)
    assert (index.diff() >= 0).all() and index[0] == 0 and index[-1] == BINS - 1
    edges = bin_edges()
    assert (np.diff(edges) > 0).all() and edges[0] == 0 and edges[-1] == 2.0**32
    assert (edges[2:] / edges[1:-1]).max() <= 1.00025
    usual = (u >= 2.0**-64) & (u < 2.0**32)
    inside, at = u[usual].numpy(), index[usual].numpy()
    assert ((edges[at] <= inside) & (inside < edges[at + 1])).all()
    assert bin_index(torch.tensor([-0.0, -1e-9])).tolist() == [0, 0]
    assert (bin_index(torch.from_numpy(edges[1:-1])) == torch.arange(1, BINS)).all()  # an edge opens its bin


# --- risk and coverage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_aurc_of_random_scores(seed: int) -> None:
    unsure, loss = draw(seed, 5000).exp().numpy(), (draw(seed + 9, 5000) > 0.5).numpy().astype(float)
    found = ranked(unsure, loss, seed)
    assert found.aurc("variance") == pytest.approx(aurc_by_hand(unsure, loss), abs=1e-4)


def test_aurc_of_ties_is_the_mean_over_all_orders() -> None:
    unsure, loss = np.array([0.1, 0.1, 0.1, 0.4, 0.7, 0.7]), np.array([1.0, 0.0, 0.5, 0.25, 1.0, 0.0])
    by_order = [
        aurc_by_hand(np.arange(6), loss[[*first, 3, *last]])
        for first in permutations([0, 1, 2])
        for last in permutations([4, 5])
    ]
    assert ranked(unsure, loss).aurc("variance") == pytest.approx(np.mean(by_order), abs=1e-12)


@pytest.mark.parametrize("count", [1, 2, 200_000])
def test_aurc_of_constant_scores_is_the_mean_loss(count: int) -> None:
    loss = np.linspace(0, 1, count) if count > 1 else np.array([0.3])
    assert ranked(np.full(count, 0.25), loss).aurc("variance") == pytest.approx(loss.mean(), rel=1e-9)


def test_the_curve_of_few_images_has_a_point_for_each() -> None:
    curve = ranked([0.3, 0.1, 0.2, 0.4], np.array([1.0, 0.0, 0.0, 1.0])).curve("variance")
    assert curve.x == (0.25, 0.5, 0.75, 1.0)
    assert curve.y == pytest.approx((0, 0, 1 / 3, 1 / 2))


def test_quantiles() -> None:
    found = ranked(np.arange(1, 101) / 8)
    for share in (0.01, 0.5, 0.9, 1.0):
        exact = np.quantile(np.arange(1, 101) / 8, share, method="inverted_cdf")
        assert exact < found.quantile("variance", share) <= exact * 1.001


# --- detection -------------------------------------------------------------------------------------------------------


def exact_fpr95(known: np.ndarray, unknown: np.ndarray) -> float:
    threshold = np.sort(known)[int(np.ceil(0.95 * len(known))) - 1]
    return float(np.mean(unknown <= threshold))


@pytest.mark.parametrize("seed", SEEDS)
def test_detection_of_random_scores(seed: int) -> None:
    known, unknown = draw(seed, 5000).exp().numpy(), (draw(seed + 9, 4000) + 1).exp().numpy()
    found = detect(ranked(known), ranked(unknown, seed=seed))["variance"]
    truth, score = np.repeat([0, 1], [5000, 4000]), np.concatenate([known, unknown])
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, score), abs=1e-4)
    assert found["aupr"] == pytest.approx(average_precision_score(truth, score), abs=1e-4)
    one_bin = np.histogram(unknown, bin_edges())[0].max() / 4000
    assert found["fpr95"] == pytest.approx(exact_fpr95(known, unknown), abs=one_bin)
    u, y = torch.from_numpy(score), torch.from_numpy(truth)
    squeezed = u / (1 + u)  # torchmetrics takes what is above 1 for logits
    assert found["auroc"] == pytest.approx(binary_auroc(squeezed, y).item(), abs=1e-4)
    assert found["aupr"] == pytest.approx(binary_average_precision(squeezed, y).item(), abs=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_detection_of_ties_is_exact(seed: int) -> None:
    generator = np.random.default_rng(seed)
    known, unknown = generator.integers(0, 9, 200) / 8, generator.integers(3, 12, 70) / 8
    found = detect(ranked(known), ranked(unknown))["variance"]
    truth, score = np.repeat([0, 1], [200, 70]), np.concatenate([known, unknown])
    assert found["auroc"] == pytest.approx(roc_auc_score(truth, score), abs=1e-12)
    assert found["aupr"] == pytest.approx(average_precision_score(truth, score), abs=1e-12)
    assert found["fpr95"] == exact_fpr95(known, unknown)
    curve = roc(ranked(known), ranked(unknown))["variance"]
    for x, y in zip(*roc_curve(truth, score)[:2], strict=True):
        assert np.hypot(np.array(curve.x) - x, np.array(curve.y) - y).min() < 0.01


@pytest.mark.parametrize(
    ("known", "unknown", "expected"),
    [
        ([0.0, 0.1], [0.2, 0.3], {"auroc": 1, "aupr": 1, "fpr95": 0}),
        ([0.2, 0.3], [0.0, 0.1], {"auroc": 0, "aupr": (1 / 3 + 2 / 4) / 2, "fpr95": 1}),
        ([0.5] * 3, [0.5] * 5, {"auroc": 0.5, "aupr": 5 / 8, "fpr95": 1}),
        ([0.1], [0.2], {"auroc": 1, "aupr": 1, "fpr95": 0}),
        ([0.1] * 19 + [0.9], [0.2] * 4, {"auroc": 0.95, "aupr": 4 / 5, "fpr95": 0}),
        ([0.1] * 18 + [0.9] * 2, [0.2] * 4, {"auroc": 0.9, "aupr": 4 / 6, "fpr95": 1}),
    ],
)
def test_detection_by_hand(known: list[float], unknown: list[float], expected: dict[str, float]) -> None:
    assert detect(ranked(np.array(known)), ranked(np.array(unknown)))["variance"] == pytest.approx(expected)


def test_the_area_under_the_roc_is_the_auroc() -> None:
    known, unknown = ranked(draw(0, 3000).exp()), ranked((draw(1, 2000) + 1).exp())
    curve = roc(known, unknown)["variance"]
    assert len(curve.x) <= 200
    assert (curve.x[0], curve.y[0], curve.x[-1], curve.y[-1]) == (0, 0, 1, 1)
    area = torch.trapezoid(torch.tensor(curve.y), torch.tensor(curve.x)).item()
    assert area == pytest.approx(detect(known, unknown)["variance"]["auroc"], abs=1e-3)


def test_all_scores_of_an_ensemble_and_those_of_one_member() -> None:
    members, _ = draw_classes(0, 60, 3, 4)
    p = classes(members)
    known, unknown = RankedScores("classification", n=3), RankedScores("classification", n=3)
    known.update(p)
    unknown.update(classes(members / 3))
    assert tuple(detect(known, unknown)) == ("max_probability", "entropy", "mutual_information", "variance")
    for score, unsure in image_scores(p, "classification").items():
        assert known.counted(score).nonzero()[0].tolist() == sorted(set(bin_index(unsure).tolist()))
    one = RankedScores("classification", n=1)
    one.update(classes(members[:, :1]))
    assert tuple(detect(known, one)) == one.scores == ("max_probability", "entropy")


# --- histograms ------------------------------------------------------------------------------------------------------


def test_histograms_have_edges_in_common() -> None:
    known, unknown = draw(0, 3000).exp().numpy(), (draw(1, 2000) + 1).exp().numpy()
    found = histograms({"": ranked(known), "far": ranked(unknown)}, bins=40)["variance"]
    edges = np.array(found[""].edges)
    assert found["far"].edges == found[""].edges and len(edges) == 41
    assert edges[0] == 0 and np.diff(edges) == pytest.approx(edges[-1] / 40)
    assert edges[-1] == pytest.approx(np.quantile(unknown, 0.999), rel=0.05)
    for name, scores in (("", known), ("far", unknown)):
        exact = np.histogram(scores.clip(max=edges[-1]), edges)[0] / len(scores)
        assert sum(found[name].shares) == pytest.approx(1)
        assert np.abs(exact - found[name].shares).max() < 3e-3


def test_a_histogram_of_one_value() -> None:
    found = histograms({"": ranked(np.zeros(5)), "one": ranked(np.full(3, 2.0))}, bins=4)["variance"]
    assert found[""].shares == (1, 0, 0, 0) and found["one"].shares == (0, 0, 0, 1)
    nothing = histograms({"": ranked(np.zeros(5))}, bins=4)["variance"][""]
    assert nothing.shares == (1, 0, 0, 0) and nothing.edges[-1] > 0


# --- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"The scores of 2 of 3 images are NaN: the model returned NaN"):
        ranked_at_once(torch.tensor([[[0.0], [1.0]], [[torch.nan], [0.0]], [[torch.inf], [0.0]]]))
    found = ranked(np.ones(3))
    with pytest.raises(EvaluationError, match=r"The score 'entropy' means nothing here, where there are 'variance'\."):
        found.curve("entropy")
    with pytest.raises(EvaluationError, match=r"3 images have no loss: the error needs targets\."):
        found.aurc("variance")
    empty = RankedScores("regression", n=2)
    for figure in (lambda: detect(found, empty), lambda: roc(empty, found), lambda: histograms({"": empty})):
        with pytest.raises(EvaluationError, match=r"There are no images: nothing was evaluated"):
            figure()


def ranked_at_once(members: Tensor) -> None:
    RankedScores("regression", n=2).update(regression(members))

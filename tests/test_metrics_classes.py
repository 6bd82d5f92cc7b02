"""The figures of classes, pixels and labels against scikit-learn, torchmetrics' exact ones, and numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, brier_score_loss, jaccard_score, log_loss, top_k_accuracy_score
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from masksurgery.evaluation import METRICS
from masksurgery.metrics import Found, Suite
from masksurgery.prediction import classification
from masksurgery.scores import Threshold, image_scores
from masksurgery.types import ConfigError, EvaluationError
from scoring import (
    adaptive_ece_by_hand,
    aurc_by_hand,
    classes,
    draw,
    draw_classes,
    ece_by_hand,
    feed,
    figures_by_hand,
    figures_of_labels_by_hand,
)

SEEDS = range(4)


def evaluate(members: Tensor, y: Tensor, **settings: Any) -> Found:
    suite = Suite("classification", n=members.shape[1], outputs=members.shape[2], **settings)
    return feed(suite, classes(members), y).compute()


def assert_close(found: dict[str, float], expected: dict[str, float], tolerance: float = 1e-9) -> None:
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("seed", SEEDS)
def test_classes_against_numpy_and_scikit_learn(seed: int) -> None:
    members, y = draw_classes(seed, 300, 3, 8)
    found = evaluate(members, y)
    p = members.softmax(-1).mean(1).numpy()
    assert found.images == 300
    assert tuple(found.figures) == tuple(name for name in METRICS if name in found.figures)
    assert_close(found.figures, figures_by_hand(members.numpy(), y.numpy()))
    assert found.figures["accuracy"] == accuracy_score(y, p.argmax(1))
    assert found.figures["nll"] == pytest.approx(log_loss(y, p, labels=range(8)), abs=1e-9)
    assert found.figures["top5"] == top_k_accuracy_score(y, p, k=5, labels=range(8))
    assert found.members == tuple(accuracy_score(y, members[:, i].argmax(1)) for i in range(3))
    for i in range(3):
        for j in range(3):
            assert found.disagreement[i][j] == (members[:, i].argmax(1) != members[:, j].argmax(1)).double().mean()


def test_sums_of_float32_predictions_are_precise() -> None:
    members, y = draw_classes(0, 500, 2, 4)
    found = evaluate(members.float(), y)
    assert_close(found.figures, figures_by_hand(members.float().double().numpy(), y.numpy()), 2e-6)


def test_small_losses_after_many_are_not_lost() -> None:
    """In float32 a sum of 2^24 swallows each 0.5 that is added to it."""
    for task, name in (("classification", "nll"), ("regression", "rmse")):
        part = Suite(task, n=1, outputs=2, detail=False)._figures.parts[name]  # type: ignore[arg-type]
        zeros = torch.zeros(1, dtype=torch.float64)
        for value in [2.0**12] + [0.5**0.5] * 64:
            part.update(*((zeros + value, zeros) if name == "rmse" else (zeros + value**2,)))
        mean = part.compute().item() ** (2 if name == "rmse" else 1)
        assert mean == pytest.approx((2**24 + 32) / 65, rel=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_ece_is_that_of_torchmetrics_where_no_confidence_is_on_an_edge(seed: int) -> None:
    members, y = draw_classes(seed, 400, 2, 5)
    p = members.softmax(-1).mean(1)
    exact = multiclass_calibration_error(p, y, num_classes=5, n_bins=15)
    assert evaluate(members, y).figures["ece"] == pytest.approx(exact.item(), abs=1e-6)


def test_bins_are_closed_on_the_right() -> None:
    p = torch.tensor([[0.6, 0.4], [0.8, 0.2], [1.0, 0.0], [0.95, 0.05]], dtype=torch.float64)  # 0.6 = 9 / 15
    suite = Suite("probabilities", n=1, outputs=2)
    suite.update(classification(p.unsqueeze(1), 2, "probabilities"), torch.tensor([0, 1, 0, 0]))
    found = suite.compute()
    assert found.reliability is not None
    occupied = {i: c for i, c in enumerate(found.reliability.confidence) if c is not None}
    assert occupied == pytest.approx({8: 0.6, 11: 0.8, 14: 0.975})
    assert [found.reliability.accuracy[i] for i in occupied] == [1, 0, 1]
    assert [found.reliability.shares[i] for i in occupied] == [0.25, 0.25, 0.5]
    assert found.figures["ece"] == pytest.approx((0.4 + 0.8 + 2 * 0.025) / 4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("count", [1, 7, 15, 16, 150, 163])
def test_adaptive_ece_cuts_as_array_split(seed: int, count: int) -> None:
    """Confidences that no two of which share a bin, so that the cut is exact."""
    generator = np.random.default_rng(seed)
    unsure = 0.49 * 1.004 ** -generator.permutation(count)
    right = generator.random(count) < 0.7
    p = torch.from_numpy(np.stack([1 - unsure, unsure], 1))
    suite = Suite("probabilities", n=1, outputs=2)
    feed(suite, classification(p.unsqueeze(1), 2, "probabilities"), torch.from_numpy(np.where(right, 0, 1)), seed)
    expected = adaptive_ece_by_hand(1 - unsure, right)
    assert suite.compute().figures["adaptive_ece"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_adaptive_ece_and_aurc_of_many_images(seed: int) -> None:
    members, y = draw_classes(seed, 5000, 2, 4)
    found = evaluate(members, y)
    p = members.softmax(-1).mean(1).numpy()
    right = p.argmax(1) == y.numpy()
    assert found.figures["adaptive_ece"] == pytest.approx(adaptive_ece_by_hand(p.max(1), right), abs=1e-3)
    assert found.figures["aurc"] == pytest.approx(aurc_by_hand(1 - p.max(1), ~right), abs=1e-4)


# --- degenerate ------------------------------------------------------------------------------------------------------


def degenerate(case: str) -> tuple[Tensor, Tensor]:
    members, y = draw_classes(7, 60, 2, 3)
    answers = members.softmax(-1).mean(1).argmax(1)
    return {
        "one class in the targets": (members, torch.zeros_like(y)),
        "all right": (members, answers),
        "all wrong": (members, (answers + 1) % 3),
        "one item": (members[:1], y[:1]),
        "one item, right": (members[:1], answers[:1]),
        "constant": (torch.tensor([0.3, 0.1, 0.2]).expand(60, 2, 3).double(), y),
        "confident": (members.sign() * 60 + members, y),
    }[case]


CASES = (
    "one class in the targets",
    "all right",
    "all wrong",
    "one item",
    "one item, right",
    "constant",
    "confident",
)


@pytest.mark.parametrize("case", CASES)
def test_degenerate_classes(case: str) -> None:
    members, y = degenerate(case)
    found = evaluate(members, y).figures
    expected = figures_by_hand(members.numpy(), y.numpy())
    assert_close(found, expected)
    assert all(map(np.isfinite, found.values()))
    assert ("diversity" in found) == ("diversity" in expected)
    if case == "constant":
        right = (y == 0).double().mean().item()
        assert found["adaptive_ece"] == pytest.approx(abs(members[0, 0].softmax(0)[0].item() - right))
        assert found["aurc"] == pytest.approx(1 - right)
    if case.startswith(("all", "one item")):
        assert found["aurc"] == 1 - found["accuracy"]


def test_one_member_has_no_one_to_agree_with() -> None:
    members, y = draw_classes(0, 40, 1, 3)
    found = evaluate(members, y)
    assert set(found.figures) == {"accuracy", "nll", "brier", "ece", "adaptive_ece", "aurc"}
    assert (found.members, found.disagreement) == ((), ())
    assert tuple(found.risk_coverage) == ("max_probability", "entropy")


def test_probabilities_of_exactly_0_and_1() -> None:
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    suite = Suite("probabilities", n=1, outputs=2)
    suite.update(classification(p.unsqueeze(1), 2, "probabilities"), torch.tensor([0, 0, 1, 0]))
    found = suite.compute().figures
    tiny = torch.finfo(torch.float64).tiny  # what the head makes of a probability of 0
    expected = {"accuracy": 0.75, "brier": 0.5, "ece": 0.25, "adaptive_ece": 0.25, "aurc": 0.25}
    assert_close(found, {**expected, "nll": -np.log(tiny) / 4})


def test_a_truth_of_probability_0_makes_the_likelihood_infinite() -> None:
    logits = torch.tensor([[[0.0, -torch.inf]], [[0.0, 0.0]]])
    found = evaluate(logits, torch.tensor([1, 0])).figures
    assert found["nll"] == torch.inf and found["accuracy"] == 0.5


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("class_dim", [1, -1])
def test_pixels_against_numpy_and_scikit_learn(class_dim: int) -> None:
    members = draw(0, 5, 2, 4, 6, 3)
    y = torch.randint(0, 3, (5, 6, 3), generator=torch.Generator().manual_seed(0))  # class 3 is only predicted
    y[draw(1, 5, 6, 3) > 0.8] = 255
    y[2] = 255
    moved = members if class_dim == 1 else members.movedim(2, -1)
    p = classification(moved, 2 if class_dim == 1 else 4, "classification")
    suite = Suite("classification", n=2, outputs=4, segmentation=True, class_dim=class_dim)
    found = feed(suite, p, y).compute()
    known = y != 255
    flat, truth = members.movedim(2, -1).movedim(1, -2)[known], y[known]
    assert_close(found.figures, figures_by_hand(flat.numpy(), truth.numpy()))
    answers = flat.softmax(-1).mean(1).argmax(1)
    jaccard = jaccard_score(truth, answers, average="macro", labels=[0, 1, 2, 3])
    assert found.figures["miou"] == pytest.approx(jaccard, abs=1e-6)
    assert "top5" not in found.figures
    assert found.images == 4  # one has no known pixel
    p_all = members.softmax(2).mean(1)
    wrong, unsure = (p_all.argmax(1) != y) & known, 1 - p_all.amax(1)
    loss = np.array([wrong[i].sum().item() / known[i].sum().item() for i in (0, 1, 3, 4)])
    order = unsure.flatten(1).mean(1).numpy()[[0, 1, 3, 4]]
    assert found.figures["aurc"] == pytest.approx(aurc_by_hand(order, loss), abs=1e-9)


def test_a_class_that_never_occurs_is_left_out_of_the_mean() -> None:
    logits = torch.zeros(1, 1, 3, 1, 4, dtype=torch.float64)
    logits[0, 0, 0, 0, :2] = 5
    logits[0, 0, 1, 0, 2:] = 5
    y = torch.tensor([[[0, 1, 1, 1]]])
    suite = Suite("classification", n=1, outputs=3, segmentation=True, detail=False)
    suite.update(classes(logits), y)
    assert suite.compute().figures["miou"] == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_class_255_of_images_is_a_class() -> None:
    members = torch.zeros(4, 1, 300)
    members[:, :, 255] = 9
    assert evaluate(members, torch.tensor([255, 255, 255, 1])).figures["accuracy"] == 0.75


# --- labels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shape", [(200, 4), (200,)])
def test_labels_against_numpy_and_scikit_learn(seed: int, shape: tuple[int, ...]) -> None:
    members = draw(seed, shape[0], 3, *shape[1:], scale=2)
    y = (draw(seed + 50, *shape) + members.mean(1) > 0.3).double()
    suite = Suite("multilabel", n=3, outputs=4)
    found = feed(suite, classification(members, 2, "multilabel"), y).compute()
    assert_close(found.figures, figures_of_labels_by_hand(members.numpy(), y.numpy()))
    p = torch.sigmoid(members).mean(1).flatten()
    truth = y.flatten().long()
    assert found.figures["brier"] == pytest.approx(brier_score_loss(truth, p))
    assert found.figures["nll"] == pytest.approx(log_loss(truth, torch.stack([1 - p, p], 1)))
    right = (p > 0.5) == truth
    exact = binary_calibration_error(torch.maximum(p, 1 - p), right.long(), n_bins=15)
    assert found.figures["ece"] == pytest.approx(exact.item(), abs=1e-6)
    assert "top5" not in found.figures


def test_very_confident_labels() -> None:
    members = torch.tensor([[[60.0, -60.0]], [[60.0, 60.0]]])
    suite = Suite("multilabel", n=1, outputs=2)
    suite.update(classification(members, 2, "multilabel"), torch.tensor([[1, 0], [1, 0]]))
    expected = {"accuracy": 0.75, "nll": 15, "brier": 0.25, "ece": 0.25, "adaptive_ece": 0.25}
    assert_close(suite.compute().figures, expected)


# --- a threshold -----------------------------------------------------------------------------------------------------


def test_what_a_threshold_answers() -> None:
    members, y = draw_classes(3, 200, 2, 4)
    p = classes(members)
    found = evaluate(members, y, threshold=Threshold("max_probability", 0.6)).figures
    sure = p.mean.amax(1) >= 0.6
    assert found["answered"] == sure.double().mean()
    assert found["answered_risk"] == pytest.approx((p.mean.argmax(1) != y)[sure].double().mean().item())
    none = evaluate(members, y, threshold=Threshold("entropy", -1.0)).figures
    assert none["answered"] == 0 and "answered_risk" not in none
    assert "answered" not in evaluate(members, y).figures


def test_without_detail_the_few_figures_are_the_same() -> None:
    members, y = draw_classes(3, 200, 2, 9)
    full, few = evaluate(members, y), evaluate(members, y, detail=False, threshold=Threshold("entropy", 1.0))
    assert few.figures == {name: full.figures[name] for name in ("accuracy", "nll", "ece")}
    assert few.risk_coverage == {} and few.images == 200


def test_the_risk_coverage_curve_ends_at_the_error() -> None:
    members, y = draw_classes(3, 900, 2, 4)
    found = evaluate(members, y)
    unsure = image_scores(classes(members), "classification")["entropy"].numpy()
    wrong = (classes(members).mean.argmax(1) != y).numpy()
    curve = found.risk_coverage["entropy"]
    assert len(curve.x) == 200 and curve.x[-1] == 1 and curve.y[-1] == pytest.approx(wrong.mean())
    k = np.round(np.array(curve.x) * 900).astype(int)
    exact = wrong[np.argsort(unsure)].cumsum()[k - 1] / k
    assert np.abs(exact - curve.y).max() < 0.02 and np.abs(exact - curve.y)[50:].max() < 3e-3


# --- refusals --------------------------------------------------------------------------------------------------------


def test_nothing_evaluated_is_an_error() -> None:
    for task in ("classification", "multilabel", "regression"):
        with pytest.raises(EvaluationError, match=r"There are no images: nothing was evaluated"):
            Suite(task, n=2, outputs=3).compute()
    suite = Suite("classification", n=1, outputs=2, segmentation=True)
    suite.update(classes(draw(0, 2, 1, 2, 3, 3)), torch.full((2, 3, 3), 255))
    with pytest.raises(EvaluationError, match=r"There are no images"):
        suite.compute()


def test_what_is_no_number_is_refused_before_anything_is_counted() -> None:
    members, y = draw_classes(0, 6, 2, 3)
    suite = Suite("classification", n=2, outputs=3)
    broken = members.clone()
    broken[1, 0, 2], broken[4] = torch.nan, torch.inf
    with pytest.raises(EvaluationError, match=r"The predictions of 2 of 6 images in a batch are NaN\. Look at"):
        suite.update(classes(broken), y)
    labels = torch.ones(6, 3)
    labels[2, 1] = torch.nan
    with pytest.raises(EvaluationError, match=r"The targets of 1 of 6 images in a batch are NaN\. Leave"):
        Suite("multilabel", n=2, outputs=3).update(classification(members, 2, "multilabel"), labels)
    with pytest.raises(EvaluationError, match=r"There are no images"):
        suite.compute()


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 3, 1, -1]), r"2 of 4 targets are no class: they go from -1 to 3, .* classes 0 to 2\."),
        (torch.tensor([0.0, 1.0, 1.0, 2.0]), r"targets are float32 \(4,\), the predictions \(4, 3\) with 3 classes in"),
        (torch.zeros(4, 3, dtype=torch.int64), r"int64 \(4, 3\), .* have to be the indices of classes \(4,\)\."),
    ],
)
def test_targets_that_are_no_classes(y: Tensor, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        Suite("classification", n=2, outputs=3).update(classes(draw(0, 4, 2, 3)), y)


def test_targets_that_are_no_labels() -> None:
    suite, p = Suite("multilabel", n=2, outputs=3), classification(draw(0, 4, 2, 3), 2, "multilabel")
    with pytest.raises(EvaluationError, match=r"12 of 12 targets are neither 0 nor 1"):
        suite.update(p, torch.full((4, 3), 0.5))
    with pytest.raises(ConfigError, match=r"The targets are \(4, 2\), the model's output is \(4, 3\)"):
        suite.update(p, torch.ones(4, 2))


def test_another_number_of_members_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"The predictions are of 2 members, n=4 was said\."):
        Suite("classification", n=4, outputs=3).update(classes(draw(0, 4, 2, 3)), torch.zeros(4, dtype=torch.int64))


def test_ece_by_hand_is_the_definition() -> None:
    confidence, right = np.array([0.5, 0.5, 0.9]), np.array([True, False, False])
    assert ece_by_hand(confidence, right) == pytest.approx(0.3)

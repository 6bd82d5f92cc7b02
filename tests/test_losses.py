"""Losses and scores against the same thing written out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from masksurgery.losses import AUXILIARY, Objective, choose_loss
from masksurgery.prediction import classification, regression
from masksurgery.types import ConfigError


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


LOGITS, CLASSES = draw(6, 3), torch.tensor([0, 2, 1, 1, 0, 2])


def mean(scores: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    return {name: (total / count).item() for name, (total, count) in scores.items()}


@pytest.mark.parametrize(
    ("task", "heteroscedastic", "wanted", "found"),
    [
        ("classification", False, None, "cross-entropy"),
        ("classification", False, "bce", "bce"),
        ("probabilities", False, None, "cross-entropy"),
        ("multilabel", False, None, "bce"),
        ("regression", False, None, "mse"),
        ("regression", True, None, "gaussian-nll"),
    ],
)
def test_each_task_has_its_loss(task: Any, heteroscedastic: bool, wanted: Any, found: str) -> None:
    assert choose_loss(task, heteroscedastic, wanted) == found


def test_a_loss_of_another_task_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss='bce' does not suit task='regression'\. Pass 'mse'"):
        choose_loss("regression", False, "bce")
    with pytest.raises(ConfigError, match=r"does not suit a mean and a log-variance\. Pass 'gaussian-nll'"):
        choose_loss("regression", True, "mse")


# --- training --------------------------------------------------------------------------------------------------------


def test_cross_entropy_and_its_smoothing() -> None:
    log_p = LOGITS.log_softmax(1)
    plain = -log_p[range(6), CLASSES]
    assert torch.allclose(Objective("classification", "cross-entropy")(LOGITS, CLASSES), plain.mean())
    smooth = (0.9 * plain - 0.1 * log_p.mean(1)).mean()
    assert torch.allclose(Objective("classification", "cross-entropy", label_smoothing=0.1)(LOGITS, CLASSES), smooth)
    assert torch.allclose(Objective("probabilities", "cross-entropy")(log_p.exp(), CLASSES), plain.mean(), atol=1e-6)


@pytest.mark.parametrize("loss", ["cross-entropy", "bce"])
def test_mixed_targets_are_not_smoothed_again(loss: Any) -> None:
    shares = draw(6, 3, seed=1).softmax(1)
    found = [Objective("classification", loss, label_smoothing=s)(LOGITS, shares) for s in (0.0, 0.3)]
    p = LOGITS.sigmoid()
    by_hand = {
        "cross-entropy": -(shares * LOGITS.log_softmax(1)).sum(1).mean(),
        "bce": -(shares * p.log() + (1 - shares) * (1 - p).log()).mean(),
    }
    assert torch.equal(found[0], found[1]) and torch.allclose(found[0], by_hand[loss])


def test_classes_as_independent_labels() -> None:
    shares = torch.eye(3)[CLASSES] * 0.8 + 0.2 / 3
    p = LOGITS.sigmoid()
    by_hand = -(shares * p.log() + (1 - shares) * (1 - p).log()).mean()
    assert torch.allclose(Objective("classification", "bce", label_smoothing=0.2)(LOGITS, CLASSES), by_hand)


def test_auxiliary_outputs_count_less() -> None:
    objective, aux = Objective("classification", "cross-entropy"), draw(6, 3, seed=2)
    by_hand = F.cross_entropy(LOGITS, CLASSES) + AUXILIARY * F.cross_entropy(aux, CLASSES)
    features = draw(6, 17)  # neither answer nor auxiliary
    for outputs in (
        (LOGITS, aux),
        {"aux": aux, "out": LOGITS},
        [LOGITS, features, aux],
        {"logits": LOGITS, "aux": aux},
    ):
        assert torch.allclose(objective(outputs, CLASSES), by_hand)


def test_pixels_of_no_class_are_left_out() -> None:
    x, y = draw(2, 3, 4, 4), torch.randint(3, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    y[0, :2] = 255
    known = y != 255
    objective = Objective("classification", "cross-entropy")
    by_hand = -x.log_softmax(1).gather(1, y.where(known, 0)[:, None])[:, 0][known].mean()
    assert torch.allclose(objective(x, y), by_hand)
    assert objective.correct(x, y) == ((x.argmax(1) == y) & known).sum() / known.sum()
    last = Objective("classification", "cross-entropy", class_dim=3)
    assert torch.allclose(last(x.movedim(1, 3), y), by_hand)


def test_an_image_of_no_known_pixel_counts_nothing() -> None:
    x, y = draw(1, 3, 4, 4).requires_grad_(), torch.full((1, 4, 4), 255)
    objective = Objective("classification", "cross-entropy")
    loss = objective(x, y)
    loss.backward()
    assert loss == 0 and torch.equal(x.grad, torch.zeros_like(x))  # type: ignore[arg-type]
    assert objective.count_known([y, y - 254]).tolist() == [0, 16]  # type: ignore[union-attr]
    assert objective.count_known([CLASSES]) is None and Objective("regression", "mse").count_known([y]) is None


def test_the_class_255_of_images_is_a_class() -> None:
    x, y = draw(4, 300), torch.tensor([255, 3, 255, 7])
    objective = Objective("classification", "cross-entropy")
    assert torch.allclose(objective(x, y), -x.log_softmax(1)[range(4), y].mean())
    assert mean(objective.score(x, y))["nll"] == pytest.approx(objective(x, y).item(), rel=1e-6)


def test_numbers() -> None:
    x, y = draw(5, 1), draw(5, seed=3)
    assert torch.allclose(Objective("regression", "mse")(x, y), ((x[:, 0] - y) ** 2).mean())
    log_variance = draw(5, 1, seed=4)
    by_hand = (((x[:, 0] - y) ** 2 / log_variance[:, 0].exp() + log_variance[:, 0]) / 2).mean()
    assert torch.allclose(Objective("regression", "gaussian-nll")((x, log_variance), y), by_hand)


def test_accuracy_means_nothing_for_numbers_and_mixed_targets() -> None:
    assert Objective("regression", "mse").correct(LOGITS, LOGITS) is None
    assert Objective("classification", "cross-entropy").correct(LOGITS, LOGITS.softmax(1)) is None
    labels = (draw(6, 3, seed=5) > 0).float()
    share = ((LOGITS > 0) == (labels > 0)).float().mean()
    assert torch.allclose(Objective("multilabel", "bce").correct(LOGITS, labels), share)  # type: ignore[arg-type]


def test_targets_that_do_not_suit_the_output() -> None:
    with pytest.raises(ConfigError, match=r"The targets are \(5, 2\), the model's output is \(5, 3\)"):
        Objective("regression", "mse")(draw(5, 3), draw(5, 2))
    with pytest.raises(ConfigError, match="The model returned tuple without a floating-point tensor"):
        Objective("classification", "cross-entropy")((torch.tensor([1]),), CLASSES)


# --- validation ------------------------------------------------------------------------------------------------------


def test_scores_of_an_ensemble_and_of_its_base() -> None:
    members = draw(6, 4, 3)
    p = classification(members, 2, "classification")
    objective = Objective("classification", "cross-entropy", label_smoothing=0.3)  # not in the scores
    mixture = members.softmax(2).mean(1)
    right = (mixture.argmax(1) == CLASSES).float().mean().item()
    found = mean(objective.score(p, CLASSES))
    assert found == pytest.approx({"nll": -mixture[range(6), CLASSES].log().mean().item(), "accuracy": right}, rel=1e-5)
    assert mean(objective.score({"aux": p, "logits": p}, CLASSES)) == found
    base = mean(objective.score(LOGITS, CLASSES))
    assert base["nll"] == pytest.approx(F.cross_entropy(LOGITS, CLASSES).item())
    assert tuple(found) == objective.scores and objective.criterion == "nll"


def test_scores_of_labels() -> None:
    members, labels = draw(6, 4, 3), (draw(6, 3, seed=5) > 0).float()
    objective = Objective("multilabel", "bce")
    p = members.sigmoid().mean(1)
    nll = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean().item()
    found = mean(objective.score(classification(members, 2, "multilabel"), labels))
    assert found == pytest.approx({"nll": nll, "accuracy": ((p > 0.5) == (labels > 0)).float().mean().item()}, rel=1e-5)


def test_scores_of_numbers() -> None:
    members, y = draw(6, 4, 1), draw(6, seed=6)
    square = ((members.mean(1)[:, 0] - y) ** 2).mean().item()
    plain = Objective("regression", "mse")
    assert mean(plain.score(regression(members), y)) == pytest.approx({"mse": square})
    assert mean(plain.score(members.mean(1), y)) == pytest.approx({"mse": square})
    assert plain.criterion == "mse" and plain.scores == ("mse",)
    log_variance = draw(6, 4, 1, seed=7)
    variance = (members.var(1, correction=0) + log_variance.exp().mean(1))[:, 0]
    nll = (((members.mean(1)[:, 0] - y) ** 2 / variance + variance.log() + math.log(2 * math.pi)) / 2).mean().item()
    both = Objective("regression", "gaussian-nll")
    found = mean(both.score(regression(members, log_variance), y))
    assert found == pytest.approx({"nll": nll, "mse": square}, rel=1e-5)
    single = mean(both.score((members[:, 0], log_variance[:, 0]), y))
    expected = F.gaussian_nll_loss(members[:, 0, 0], y, log_variance[:, 0, 0].exp(), full=True).item()
    assert single["nll"] == pytest.approx(expected, rel=1e-5)

"""Predictions against plain formulas in float64, and the head that makes them of any output."""

from __future__ import annotations

import copy
import io
import math
from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import masksurgery
from masksurgery import ConfigError, LayoutError, Prediction, RegressionPrediction
from masksurgery.layers import Assignment
from masksurgery.prediction import Head, check_outputs, classification, leaf_tasks, regression

N, B, K = 4, 3, 5
EVERYONE = Assignment(N, None, True)


def logits_of(*shape: int, spread: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def entropy_of(p: Tensor, dim: int | None) -> Tensor:
    terms = torch.special.entr(p)
    return terms if dim is None else terms.sum(dim)


def assert_is(prediction: Prediction, p: Tensor, members: Tensor, dim: int | None) -> None:
    """Compare with the definition, given the probabilities p [b, n, ...]; `dim` is where the classes are in them."""
    mean = sum(p[:, i] for i in range(p.shape[1])) / p.shape[1]
    variance = sum((p[:, i] - mean) ** 2 for i in range(p.shape[1])) / p.shape[1]
    if dim is None:
        entropy = entropy_of(mean, None) + entropy_of(1 - mean, None)
        expected = (entropy_of(p, None) + entropy_of(1 - p, None)).mean(1)
    else:
        entropy, expected = entropy_of(mean, dim - 1), entropy_of(p, dim).mean(1)
    close = {"rtol": 1e-12, "atol": 1e-12} if p.dtype == members.dtype else {"rtol": 1e-5, "atol": 1e-6}
    options = {**close, "check_dtype": False}
    torch.testing.assert_close(prediction.mean, mean, **options)
    torch.testing.assert_close(prediction.variance, variance, **options)
    torch.testing.assert_close(prediction.entropy, entropy, **options)
    torch.testing.assert_close(prediction.mutual_information, entropy - expected, **options)
    torch.testing.assert_close(prediction.expected_entropy, expected, **options)
    torch.testing.assert_close(prediction.members, members, rtol=0, atol=0)


# --- the formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4, 7])
@pytest.mark.parametrize(("shape", "dim"), [((K,), 2), ((K, 3, 2), 2), ((3, K), 3), ((3, 2, K), 4)])
def test_classification(shape: tuple[int, ...], dim: int, n: int) -> None:
    members = logits_of(B, n, *shape)
    p = members.exp() / members.exp().sum(dim, keepdim=True)
    assert_is(classification(members, dim, "classification"), p, members, dim)


@pytest.mark.parametrize("n", [1, 2, 4, 7])
@pytest.mark.parametrize("shape", [(K,), (K, 3, 2), ()])
def test_multilabel(shape: tuple[int, ...], n: int) -> None:
    members = logits_of(B, n, *shape)
    assert_is(classification(members, 2, "multilabel"), 1 / (1 + (-members).exp()), members, None)


@pytest.mark.parametrize("n", [1, 4])
def test_probabilities(n: int) -> None:
    p = logits_of(B, n, K).softmax(2)
    assert_is(classification(p, 2, "probabilities"), p, p.log(), 2)
    assert_is(classification(7 * p, 2, "probabilities"), p, (7 * p).log(), 2)  # of any sum


@pytest.mark.parametrize("n", [1, 2, 4])
def test_regression(n: int) -> None:
    members, log_variance = logits_of(B, n, 2), logits_of(B, n, 2, spread=0.5) - 1
    plain = regression(members)
    mean = sum(members[:, i] for i in range(n)) / n
    between = sum((members[:, i] - mean) ** 2 for i in range(n)) / n
    torch.testing.assert_close(plain.mean, mean)
    torch.testing.assert_close(plain.variance, between)
    assert plain.members is members
    mixture = regression(members, log_variance)
    torch.testing.assert_close(mixture.mean, mean)
    # law of total variance, by the second moment of the mixture
    second = sum(members[:, i] ** 2 + log_variance[:, i].exp() for i in range(n)) / n
    torch.testing.assert_close(mixture.variance, second - mean**2)


@pytest.mark.parametrize("task", ["classification", "multilabel", "probabilities"])
def test_one_member_has_no_variance_and_nothing_to_disagree_with(task: Any) -> None:
    members = logits_of(B, 1, K, dtype=torch.float32)
    members = members.softmax(2) if task == "probabilities" else members
    prediction = classification(members, 2, task)
    assert prediction.variance.tolist() == torch.zeros(B, K).tolist()
    assert not prediction.mutual_information.any()
    assert torch.equal(prediction.expected_entropy, prediction.entropy) and prediction.entropy.min() > 0.01
    assert not regression(members).variance.any()


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("task", ["classification", "multilabel", "probabilities"])
def test_a_temperature_divides_the_logits_of_each_member(task: Any, n: int) -> None:
    x = logits_of(n * B, K).softmax(1) if task == "probabilities" else logits_of(n * B, K)
    head = Head(n, [0], [task])
    head.temperature = 2.0
    members = torch.stack([x[i * B : (i + 1) * B] for i in range(n)], 1)
    logits = (members.log() if task == "probabilities" else members) / 2
    odds = logits.exp()
    p = odds / (1 + odds) if task == "multilabel" else odds / odds.sum(2, keepdim=True)
    assert_is(head(x, Assignment(n, None, True)), p, logits, None if task == "multilabel" else 2)
    if task == "probabilities":  # the root of each, divided by their sum
        torch.testing.assert_close(p, members.sqrt() / members.sqrt().sum(2, keepdim=True))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("paired", [False, True])
def test_a_temperature_multiplies_the_standard_deviation_of_a_regression(paired: bool, n: int) -> None:
    mean, log_variance = logits_of(n * B, 2), logits_of(n * B, 2, spread=0.5) - 1
    head = Head(n, [0] * (1 + paired), ["regression"] * (1 + paired), heteroscedastic=paired)
    outputs, everyone = (mean, log_variance) if paired else mean, Assignment(n, None, True)
    before = head(outputs, everyone)
    head.temperature = 2.0
    after = head(outputs, everyone)
    by_member = mean.unflatten(0, (n, B))
    torch.testing.assert_close(after.mean, by_member.mean(0))
    assert torch.equal(after.members, by_member.movedim(0, 1))
    between = by_member.var(0, correction=0)
    within = log_variance.exp().unflatten(0, (n, B)).mean(0) if paired else 0.0
    torch.testing.assert_close(after.variance.sqrt(), 2 * (between + within).sqrt())
    assert torch.equal(after.variance, 4 * before.variance) and bool(before.variance.any()) == (paired or n > 1)


def test_a_temperature_of_a_classification_is_for_the_classes_alone() -> None:
    outputs = {"logits": logits_of(N * B, K), "features": logits_of(N * B, 2), "aux": logits_of(N * B, 3)}
    head = Head(N, [0] * 3, leaf_tasks(outputs, "classification"))
    before = head(outputs, EVERYONE)
    head.temperature = 2.0
    after = head(outputs, EVERYONE)
    for name in ("logits", "aux"):
        assert torch.equal(after[name].members, before[name].members / 2)
        assert (after[name].entropy > before[name].entropy).all()
    assert all(map(torch.equal, after["features"], before["features"]))


@pytest.mark.parametrize("shape", [(K,), (K, 3, 2)])
def test_cross_entropy_of_the_logits_is_that_of_the_ensemble(shape: tuple[int, ...]) -> None:
    members, y = (
        logits_of(6, N, *shape),
        torch.arange(6).remainder(K).view(6, *[1] * (len(shape) - 1)).expand(6, *shape[1:]),
    )
    mean = members.softmax(2).mean(1)
    nll = -mean.gather(1, y[:, None]).log().mean()
    torch.testing.assert_close(F.cross_entropy(classification(members, 2, "classification").logits, y), nll)
    probabilities = classification(members.softmax(2), 2, "probabilities")
    torch.testing.assert_close(F.cross_entropy(probabilities.logits, y), nll)
    torch.testing.assert_close(probabilities.logits.exp(), mean)


def test_binary_cross_entropy_of_the_logits_is_that_of_the_ensemble() -> None:
    members, y = logits_of(6, N, K), (torch.arange(6 * K).view(6, K) % 3 == 0).double()
    mean = members.sigmoid().mean(1)
    nll = -(y * mean.log() + (1 - y) * (1 - mean).log()).mean()
    logits = classification(members, 2, "multilabel").logits
    torch.testing.assert_close(F.binary_cross_entropy_with_logits(logits, y), nll)
    torch.testing.assert_close(logits.sigmoid(), mean)


# --- numbers at their limits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype: torch.dtype) -> None:
    members = torch.tensor([[[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], [[1e4, -1e4, -1e4]] * 2], dtype=dtype)
    p = classification(members, 2, "classification")
    assert p.mean.tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]
    assert p.variance.tolist() == [[0.25, 0.25, 0.0], [0.0, 0.0, 0.0]]
    assert p.entropy.tolist() == pytest.approx([math.log(2), 0.0])
    assert p.mutual_information.tolist() == pytest.approx([math.log(2), 0.0])
    assert p.expected_entropy.tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
    assert F.cross_entropy(p.logits, torch.tensor([0, 0])).item() == pytest.approx(math.log(2) / 2)
    assert F.cross_entropy(p.logits[1:], torch.tensor([1])).item() == 2e4

    q = classification(members, 2, "multilabel")
    assert q.mean[:, :2].tolist() == [[0.5, 0.5], [1.0, 0.0]]
    assert q.variance[:, :2].tolist() == [[0.25, 0.25], [0.0, 0.0]]
    assert q.entropy[:, :2].tolist() == [pytest.approx([math.log(2)] * 2), [0.0, 0.0]]
    assert q.logits[1].tolist() == [1e4, -1e4, -1e4]
    assert all(field.isfinite().all() for field in q)


def test_logits_that_a_log_softmax_made_infinite() -> None:
    members = torch.tensor([[[0.0, -math.inf, -math.inf], [math.log(0.5), math.log(0.5), -math.inf]]])
    p = classification(members, 2, "classification")
    torch.testing.assert_close(p.mean, torch.tensor([[0.75, 0.25, 0.0]]))
    torch.testing.assert_close(p.variance, torch.tensor([[0.0625, 0.0625, 0.0]]))
    torch.testing.assert_close(p.logits, torch.tensor([[0.75, 0.25, 0.0]]).log())
    torch.testing.assert_close(p.entropy, -torch.tensor([0.75 * math.log(0.75) + 0.25 * math.log(0.25)]))
    torch.testing.assert_close(p.expected_entropy, torch.tensor([math.log(2) / 2]))
    assert F.cross_entropy(p.logits, torch.tensor([1])).item() == pytest.approx(math.log(4))
    q = classification(members, 2, "multilabel")
    assert q.mean[0].tolist() == pytest.approx([(0.5 + 1 / 3) / 2, 1 / 6, 0.0]) and q.entropy[0, 2] == 0.0
    assert q.variance.isfinite().all() and q.mutual_information.isfinite().all()


def test_probabilities_of_zero_and_one() -> None:
    p = classification(torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]), 2, "probabilities")
    torch.testing.assert_close(p.mean, torch.tensor([[0.5, 0.5, 0.0]]))
    torch.testing.assert_close(p.entropy, torch.tensor([math.log(2)]))
    assert p.logits.isfinite().all() and p.members.isfinite().all()


@pytest.mark.parametrize("n", [3, 4, 7])
def test_certain_members_that_agree_have_the_least_entropy_there_is(n: int) -> None:
    """In float32 log(mean) of certain members must not be rounded to above 0, nor their entropy to below it."""
    for gap in torch.linspace(0, 40, 81).tolist():
        members = torch.tensor([gap, 0.0, 0.0]).expand(1, n, 3)
        p, q = classification(members, 2, "classification"), classification(members[..., :1], 2, "multilabel")
        assert p.logits.max() <= 0 and p.entropy.min() >= 0 and q.entropy.min() >= 0
        assert torch.equal(p.logits[0], members[0, 0].log_softmax(0))
        assert p.variance.max() < 1e-13 and p.mutual_information.max() < 1e-6
        exact = entropy_of(members[0, 0].double().softmax(0), 0).item()
        assert p.entropy.item() == pytest.approx(exact, abs=1e-6)


def test_fields_stay_within_their_bounds() -> None:
    for spread in (1e-3, 1.0, 30.0, 1e3):
        p = classification(logits_of(64, N, 10, spread=spread, dtype=torch.float32), 2, "classification")
        torch.testing.assert_close(p.mean.sum(1), torch.ones(64))
        assert p.mean.min() >= 0 and p.variance.min() >= 0 and p.variance.max() <= 0.25 + 1e-6
        assert p.mutual_information.min() >= 0 and p.mutual_information.max() <= math.log(N) + 1e-5
        assert p.entropy.max() <= math.log(10) + 1e-5 and p.expected_entropy.min() >= -1e-6


@pytest.mark.parametrize("task", ["classification", "multilabel", "probabilities", "regression"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_that_is_no_number_reaches_no_other(task: Any, bad: float) -> None:
    head, x = Head(N, [0], [task]).eval(), logits_of(N * B, K).softmax(1)
    before = head(x, EVERYONE)
    x[1] = bad
    after = head(x, EVERYONE)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
    assert not after.mean[1].isfinite().all() or task == "multilabel"
    if math.isnan(bad):
        assert all(field[1].isnan().any() for field in after)


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "multilabel", "probabilities", "regression"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_head_computes_in_float32_or_more(dtype: torch.dtype, wide: torch.dtype, autocast: bool, task: Any) -> None:
    x = logits_of(N * B, K).softmax(1).to(dtype)
    head = Head(N, [0], [task])
    expected = head(x.to(wide), EVERYONE)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = head(x, EVERYONE)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == wide and torch.equal(one, other)


# --- where the batch and the classes are -----------------------------------------------------------------------------


def members_of(x: Tensor, batch_dim: int) -> Tensor:
    """[b, n, ...] by plain slicing."""
    rows = x.shape[batch_dim] // N
    return torch.stack(
        [torch.stack([x.select(batch_dim, i * rows + k) for i in range(N)]) for k in range(rows)]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "batch_dim", "class_dims"),
    [
        ((N * B, K), 0, (1, -1)),
        ((N * B, K, 2, 6), 0, (1, -3)),
        ((N * B, 2, 6, K), 0, (3, -1)),
        ((7, N * B, K), 1, (2, -1)),
        ((K, N * B), 1, (0, -2)),
        ((K, 7, N * B), 2, (0, -3)),
        ((7, K, N * B), 2, (1, -2)),
        ((K, N * B, 7), 1, (0, -3)),
        ((7, N * B, 2, K), 1, (3, -1)),
    ],
)
def test_batch_and_classes_in_any_dimension(
    shape: tuple[int, ...], batch_dim: int, class_dims: tuple[int, int]
) -> None:
    x = logits_of(*shape)
    members = members_of(x, batch_dim)
    classes = members.shape.index(K)
    base_mean = torch.stack([x.narrow(batch_dim, i * B, B) for i in range(N)]).softmax(class_dims[0] + 1).mean(0)
    for class_dim in class_dims:
        head = Head(N, [batch_dim], ["classification"], class_dim)
        p = head(x, EVERYONE)
        assert_is(p, members.softmax(classes), members, classes)
        assert {field.shape[0] for field in p} == {B}
        head.output = "mean"
        torch.testing.assert_close(head(x, EVERYONE), base_mean)  # alone it has the base model's layout
        head.output = "logits"
        torch.testing.assert_close(head(x, EVERYONE), base_mean.log())
        head.output = "entropy"
        assert torch.equal(head(x, EVERYONE), p.entropy)
        head.output = "members"
        assert torch.equal(head(x, EVERYONE), members)


def test_regression_with_the_batch_elsewhere() -> None:
    x = logits_of(7, N * B, 2)
    head = Head(N, [1], ["regression"])
    p = head(x, EVERYONE)
    members = members_of(x, 1)
    assert torch.equal(p.members, members) and members.shape == (B, N, 7, 2)
    torch.testing.assert_close(p.mean, members.mean(1))
    torch.testing.assert_close(p.variance, members.var(1, correction=0))
    head.output = "logits"
    torch.testing.assert_close(head(x, EVERYONE), p.mean.movedim(0, 1))


@pytest.mark.filterwarnings("ignore:var")  # of nothing
@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch: int) -> None:
    p = Head(N, [0], ["classification"])(logits_of(N * batch, K), EVERYONE)
    assert [tuple(field.shape) for field in p] == [(batch, K)] * 3 + [(batch,)] * 2 + [(batch, N, K)]


# --- structures ------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    logits: Tensor
    aux_logits: Tensor | None


def test_structures_stay_and_each_tensor_becomes_a_prediction() -> None:
    x, features = logits_of(N * B, K), logits_of(N * B, 2)
    one = Head(N, [0], ["classification"])(x, EVERYONE)
    two = Head(N, [0], ["regression"])(features, EVERYONE)

    def check(outputs: Any, batch_dims: list[int | None]) -> Any:
        return Head(N, batch_dims, leaf_tasks(outputs, "classification"))(outputs, EVERYONE)

    found = check((x, [x, None]), [0, 0, None])
    assert type(found) is tuple and type(found[1]) is list and found[1][1] is None
    assert torch.equal(found[0].mean, one.mean) and torch.equal(found[1][0].entropy, one.entropy)

    found = check({"logits": x, "features": features}, [0, 0])
    assert type(found) is dict and list(found) == ["logits", "features"]
    assert isinstance(found["logits"], Prediction) and isinstance(found["features"], RegressionPrediction)
    assert torch.equal(found["features"].variance, two.variance)

    found = check(OrderedDict(out=x, aux=x), [0, 0])
    assert type(found) is OrderedDict and list(found) == ["out", "aux"]
    assert isinstance(found["aux"], Prediction)

    found = check(Pair(x, None), [0, None])
    assert type(found) is Pair and isinstance(found.logits, Prediction) and found.aux_logits is None


def test_what_is_no_batch_of_numbers() -> None:
    scale, indices, flags = torch.tensor(2.0), torch.arange(N * B), torch.arange(N * B * 2).view(2, N * B) > 5
    outputs = (3, "text", scale, indices, flags, logits_of(N * B, K))
    head = Head(N, [None, None, None, 0, 1, 0], ["classification"] * 6)
    found = head(outputs, EVERYONE)
    assert found[:2] == (3, "text") and found[2] is scale
    assert torch.equal(found[3], indices.view(N, B).t()) and found[3].dtype == torch.int64
    assert torch.equal(found[4], members_of(flags, 1)) and found[4].shape == (B, N, 2)
    head.output = "logits"
    assert isinstance(head(outputs, EVERYONE)[5], Tensor) and torch.equal(head(outputs, EVERYONE)[3], found[3])


def test_indices_of_the_members_come_with_their_logits() -> None:
    class Picks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(4, 32), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.out(self.hidden(x).relu())
            return logits, logits.argmax(1)

    torch.manual_seed(0)
    base, x = Picks().eval(), torch.randn(B, 4)
    p, picks = masksurgery.convert(base, scale=4.0, example_inputs=(x,))(x)
    assert picks.shape == (B, N) and torch.equal(picks, p.members.argmax(2))
    assert len(set(picks.flatten().tolist())) > 1


def test_in_training_outputs_are_handed_on() -> None:
    head, outputs = Head(N, [0, None], ["classification"] * 2), (torch.ones(3, K), None)
    assert head(outputs, Assignment(1, torch.zeros(3), False)) is outputs
    assert head(outputs, Assignment(N, None, False)) is outputs


def test_other_leaves_than_planned() -> None:
    with pytest.raises(ValueError, match="zip"):
        Head(N, [0], ["classification"])((torch.ones(N, K), torch.ones(N, K)), EVERYONE)


@pytest.mark.parametrize("outputs", [tuple, list, lambda pair: dict(zip(("mean", "log_variance"), pair, strict=True))])
def test_a_mean_and_a_log_variance_become_one_prediction(outputs: Any) -> None:
    mean, log_variance = logits_of(N * B, 2), logits_of(N * B, 2, spread=0.1)
    head = Head(N, [0, 0], ["regression"] * 2, heteroscedastic=True)
    p = head(outputs((mean, log_variance)), EVERYONE)
    expected = regression(members_of(mean, 0), members_of(log_variance, 0))
    assert isinstance(p, RegressionPrediction)
    for one, other in zip(p, expected, strict=True):
        torch.testing.assert_close(one, other)
    head.output = "logits"
    assert torch.equal(head(outputs((mean, log_variance)), EVERYONE), p.mean)


@pytest.mark.parametrize("field", Prediction._fields)
def test_one_field_alone(field: str) -> None:
    head, x = Head(N, [0, 0], ["classification", "classification"]), logits_of(N * B, K)
    p = head((x, x), EVERYONE)
    head.output = field
    found = head((x, x), EVERYONE)
    assert type(found) is tuple and torch.equal(found[0], getattr(p[0], field))


def test_tasks_of_the_leaves() -> None:
    x = torch.ones(1)
    assert leaf_tasks(x, "multilabel") == ["multilabel"]
    assert leaf_tasks((x, {"features": x}, None), "multilabel") == ["multilabel"] * 3
    outputs = {"logits": x, "hidden": (x, x), "out": x, "aux": [x], "loss": None}
    assert leaf_tasks(outputs, "classification") == [
        "classification", "regression", "regression", "classification", "classification", "regression",
    ]  # fmt: skip


def test_repr() -> None:
    head = Head(N, [0, 0], ["regression", "classification"])
    assert repr(head) == "Head(n=4, tasks=['classification', 'regression'], output='prediction')"
    head.temperature = 1.25
    assert repr(head).endswith("output='prediction', temperature=1.25)")


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "task", "class_dim", "batch_dims", "error", "text"),
    [
        (
            [None, None],
            "classification",
            1,
            None,
            LayoutError,
            "The model returns no floating-point tensor with a batch",
        ),
        ([(9, 4)], "classification", 2, [0], ConfigError, r"class_dim=2 is not in the output's shape \(9, 4\)"),
        ([(9, 4)], "probabilities", -3, [0], ConfigError, r"class_dim=-3 is not in the output's shape"),
        ([(9, 4)], "classification", 0, [0], ConfigError, r"class_dim=0 is where the samples are in .* \(9, 4\)"),
        ([(7, 9, 4)], "classification", -2, [1], ConfigError, "class_dim=-2 is where the samples are"),
        ([(9, 1)], "classification", 1, [0], ConfigError, 'has one class in dimension 1. Pass task="multilabel"'),
    ],
)
def test_outputs_that_do_not_suit_the_task(
    shapes: Any, task: Any, class_dim: int, batch_dims: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        check_outputs(shapes, [task] * len(shapes), class_dim, False, batch_dims)


@pytest.mark.parametrize("shapes", [[(9, 1)], [(9, 1), (9, 2)], [(9, 1), None], [(9, 1)] * 3])
def test_outputs_that_are_no_mean_and_log_variance(shapes: Any) -> None:
    with pytest.raises(ConfigError, match="heteroscedastic=True needs two outputs of one shape"):
        check_outputs(shapes, ["regression"] * len(shapes), 1, True)


def test_outputs_that_suit_the_task() -> None:
    check_outputs([(9, 4), None], ["classification", "classification"], -1, False, [0, None])
    check_outputs([(9,), (9, 1)], ["regression", "multilabel"], 1, False)
    check_outputs([(9, 1), (9, 1)], ["regression", "regression"], 1, True, [0, 0])


# --- as a tree -------------------------------------------------------------------------------------------------------


def test_gathered_like_data_parallel_does() -> None:
    x = logits_of(N, 6, 7, K)  # two devices with halves of a batch of six
    whole = Head(N, [1], ["classification"], -1)(x.flatten(0, 1).movedim(1, 0), EVERYONE)
    halves = [Head(N, [1], ["classification"], -1)(h.flatten(0, 1).movedim(1, 0), EVERYONE) for h in x.chunk(2, 1)]
    gathered = tree_map(lambda one, other: torch.cat([one, other]), *halves)
    assert type(gathered) is Prediction
    for one, other in zip(gathered, whole, strict=True):
        torch.testing.assert_close(one, other)
    plain = tree_map(lambda one, other: torch.cat([one, other]), *[regression(h.movedim(1, 0)) for h in x.chunk(2, 1)])
    assert type(plain) is RegressionPrediction and torch.equal(plain.members, x.movedim(1, 0))


@pytest.mark.parametrize(("task", "kind"), [("classification", Prediction), ("regression", RegressionPrediction)])
def test_an_exported_model_returns_predictions(task: Any, kind: type) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, K))
    x = torch.randn(B, 3, 8, 8)
    model = masksurgery.convert(base, task=task, example_inputs=(x,)).eval()
    expected = model(x)
    assert len(model.surgery.sites) == 1 and expected.variance.max() > 0
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), strict=False), file)
    file.seek(0)
    found = torch.export.load(file).module()(x)
    assert type(found) is kind
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_an_exported_model_takes_any_batch_size() -> None:
    base = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, K))
    model = masksurgery.convert(base, example_inputs=(torch.randn(2, 6),)).eval()
    shapes: Any = ({0: torch.export.Dim("b", min=1, max=64)},)
    program = torch.export.export(model, (torch.randn(5, 6),), dynamic_shapes=shapes, strict=False)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 6)
        for one, other in zip(program.module()(x), model(x), strict=True):
            torch.testing.assert_close(one, other)


def test_predictions_are_copied_and_compared_as_tuples() -> None:
    p = classification(logits_of(B, N, K), 2, "classification")
    twin = copy.deepcopy(p)
    assert type(twin) is Prediction and torch.equal(twin.expected_entropy, p.entropy - p.mutual_information)
    assert p._fields == ("mean", "variance", "logits", "entropy", "mutual_information", "members")
    assert RegressionPrediction._fields == ("mean", "variance", "members")

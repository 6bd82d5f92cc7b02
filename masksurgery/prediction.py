"""What a converted model returns in eval, and the head that makes it of the members' outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from masksurgery.layers import Assignment
from masksurgery.types import ConfigError, LayoutError, Task

CLASS_KEYS = ("logits", "out", "aux")
"""The entries of a mapping that `task` applies to; the others count as regression."""


class Prediction(NamedTuple):
    """Classification with k classes (or labels): the batch first, the other dimensions in the base model's order.

    Attributes:
        mean: Mean probabilities of the members [b, k, ...].
        variance: Population variance of their probabilities [b, k, ...].
        logits: Log of the mean probabilities; for "multilabel" the log-odds. `cross_entropy(p.logits, y)` (or
            `binary_cross_entropy_with_logits`) is the negative log-likelihood of the ensemble.
        entropy: Entropy of the mean [b, ...] in nats: the total uncertainty. For "multilabel" of each label.
        mutual_information: Entropy less the members' mean entropy: how far they disagree (epistemic).
        members: Logits of each member [b, n, k, ...], divided by the temperature; for "probabilities" logarithms.
    Example:
        >>> base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> p = masksurgery.convert(base, example_inputs=(torch.ones(1, 8),)).eval()(torch.randn(5, 8))
        >>> torch.allclose(p.mean.sum(1), torch.ones(5)), torch.allclose(p.logits.exp(), p.mean)
        (True, True)
        >>> bool((p.entropy >= p.mutual_information).all())
        True
    """

    mean: Tensor
    variance: Tensor
    logits: Tensor
    entropy: Tensor
    mutual_information: Tensor
    members: Tensor

    @property
    def expected_entropy(self) -> Tensor:
        """The members' mean entropy: what stays uncertain whoever is asked (aleatoric)."""
        return self.entropy - self.mutual_information


class RegressionPrediction(NamedTuple):
    """Regression: mean and population variance over the members [b, ...], and the members [b, n, ...].

    Example:
        >>> base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        >>> model = masksurgery.convert(base, task="regression", example_inputs=(torch.ones(1, 8),)).eval()
        >>> p = model(torch.ones(5, 8))
        >>> p.mean.shape, p.variance.shape, p.members.shape
        (torch.Size([5, 1]), torch.Size([5, 1]), torch.Size([5, 4, 1]))
    """

    mean: Tensor
    variance: Tensor
    members: Tensor


for _kind in (Prediction, RegressionPrediction):  # torch.export.save writes the type by a name, which it has to know
    pytree._register_namedtuple(_kind, serialized_type_name=f"masksurgery.{_kind.__name__}")


def first_prediction(outputs: Any) -> Prediction | RegressionPrediction | None:
    """The first classification among a converted model's outputs, else the first regression; None without either."""
    kinds = (Prediction, RegressionPrediction)
    leaves = pytree.tree_leaves(outputs, is_leaf=lambda leaf: isinstance(leaf, kinds))
    found = [leaf for leaf in leaves if isinstance(leaf, kinds)]
    return next((p for p in found if isinstance(p, Prediction)), found[0]) if found else None


def check_temperature(value: Any) -> float:
    """A temperature as a float; a ConfigError unless it is a finite number above 0."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) < math.inf:
        raise ConfigError(f"temperature={value!r} is not a finite number above 0. Pass 1 for none.")
    return float(value)


def batch_first(dim: int, dims: int, batch_dim: int) -> int:
    """Where a dimension of a tensor with so many comes to stand when the batch dimension moves to the front."""
    dim %= dims
    return dim + 1 if dim < batch_dim else dim


def classification(members: Tensor, class_dim: int, task: Task, temperature: float = 1.0) -> Prediction:
    """Aggregate the logits of the members.

    Args:
        members: [b, n, ...]; for `task="probabilities"` probabilities, which are divided by their sum.
        class_dim: Where the classes are in it, from 2 on; of no meaning for "multilabel".
        task: "classification", "multilabel" or "probabilities".
        temperature: What the logits (or the logarithms) are divided by.
    """
    if task == "probabilities":
        members = members.clamp_min(torch.finfo(members.dtype).tiny).log()
    if temperature != 1:
        members = members / temperature
    if task == "multilabel":
        log_p, log_not = F.logsigmoid(members), F.logsigmoid(-members)
        log_mean, log_not_mean = _log_mean(log_p), _log_mean(log_not)
        logits = log_mean - log_not_mean
        entropy = _entropy(log_mean) + _entropy(log_not_mean)
        expected = (_entropy(log_p) + _entropy(log_not)).mean(1)
    else:
        log_p = F.log_softmax(members, class_dim)
        logits = log_mean = _log_mean(log_p)
        entropy = _entropy(log_mean).sum(class_dim - 1)
        expected = _entropy(log_p).sum(class_dim).mean(1)
    p = log_p.exp()
    return Prediction(p.mean(1), p.var(1, correction=0), logits, entropy, (entropy - expected).clamp_min(0), members)


def _log_mean(log_p: Tensor) -> Tensor:
    """Log of the members' mean probability; where they agree exactly theirs, and never above 0 by rounding."""
    largest = log_p.amax(1, keepdim=True).clamp_min(torch.finfo(log_p.dtype).min)  # -inf - -inf is no number
    return (log_p - largest).exp().mean(1).log() + largest.squeeze(1)


def _entropy(log_p: Tensor) -> Tensor:
    """-p log p, which is 0 at p = 0; the logarithm keeps the digits that 1 - p loses near p = 1."""
    return -log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)


def regression(members: Tensor, log_variance: Tensor | None = None) -> RegressionPrediction:
    """Mean and variance over the members [b, n, ...]; with their log-variances, of the Gaussian mixture."""
    variance = members.var(1, correction=0)
    if log_variance is not None:
        variance = variance + log_variance.exp().mean(1)
    return RegressionPrediction(members.mean(1), variance, members)


class Head(nn.Module):
    """Splits every output by members and aggregates it; in training hands the outputs on.

    Each floating-point leaf with a batch dimension becomes a Prediction, or the field of it that `output` names. Other
    tensors with a batch dimension (an argmax) have no mean: they become the members' values [b, n, ...]. All else,
    such as None, a number or a tensor without a batch dimension, stays.

    Args:
        n: Number of members.
        batch_dims: The batch dimension of each leaf of the output; None where it has none.
        tasks: The task of each leaf.
        class_dim: Where the classes are in the base model's outputs; negative counts from the end.
        heteroscedastic: The two outputs are a mean and a log-variance, and become one RegressionPrediction.
    Attributes:
        output: "prediction", or the name of a field. "logits" is the mean where there are none. As the only result,
            mean, variance and logits have the base model's dimensions in the base model's order.
        temperature: Divides the members' logits, before anything is made of them; of a regression it multiplies the
            standard deviation.
    """

    def __init__(
        self,
        n: int,
        batch_dims: Sequence[int | None],
        tasks: Sequence[Task],
        class_dim: int = 1,
        heteroscedastic: bool = False,
    ) -> None:
        super().__init__()
        self.n, self.batch_dims, self.tasks = n, tuple(batch_dims), tuple(tasks)
        self.class_dim, self.heteroscedastic = class_dim, heteroscedastic
        self.output = "prediction"
        self.temperature = 1.0

    def forward(self, outputs: Any, members: Assignment) -> Any:
        return self.aggregate(outputs) if members.aggregate else outputs

    def aggregate(self, outputs: Any) -> Any:
        """What eval returns, of the outputs for all members [n*b, ...]."""
        leaves, spec = pytree.tree_flatten(outputs)
        if self.heteroscedastic:
            dims = cast(tuple[int, int], self.batch_dims)
            mean, log_variance = map(self._by_member, leaves, dims)
            return self._choose(self._widen(regression(mean, log_variance)), dims[0])
        found = [self._aggregate(*leaf) for leaf in zip(leaves, self.batch_dims, self.tasks, strict=True)]
        return pytree.tree_unflatten(found, spec)

    def _aggregate(self, x: Any, batch_dim: int | None, task: Task) -> Any:
        if batch_dim is None or not isinstance(x, Tensor):
            return x
        members = self._by_member(x, batch_dim)
        if not x.is_floating_point():
            return members
        if task == "regression":
            return self._choose(self._widen(regression(members)), batch_dim)
        class_dim = batch_first(self.class_dim, x.dim(), batch_dim) + 1  # the members come to dimension 1
        return self._choose(classification(members, class_dim, task, self.temperature), batch_dim)

    def _widen(self, p: RegressionPrediction) -> RegressionPrediction:
        """A temperature is fitted to the answer: where that is a classification, other outputs stay as they are."""
        if self.temperature == 1 or set(self.tasks) != {"regression"}:
            return p
        return p._replace(variance=p.variance * self.temperature**2)

    def _by_member(self, x: Tensor, batch_dim: int) -> Tensor:
        """[n*b, ...] to [b, n, ...], floating-point numbers in at least float32."""
        wide = x.float() if x.is_floating_point() and torch.finfo(x.dtype).bits < 32 else x
        parts = wide.unflatten(batch_dim, (self.n, x.shape[batch_dim] // self.n))
        return parts.movedim((batch_dim + 1, batch_dim), (0, 1))

    def _choose(self, prediction: Prediction | RegressionPrediction, batch_dim: int) -> Any:
        if self.output == "prediction":
            return prediction
        field = "mean" if self.output == "logits" and "logits" not in prediction._fields else self.output
        value = getattr(prediction, field)
        return value.movedim(0, batch_dim) if field in ("mean", "variance", "logits") else value

    def extra_repr(self) -> str:
        temperature = "" if self.temperature == 1 else f", temperature={self.temperature:g}"
        return f"n={self.n}, tasks={sorted(set(self.tasks))}, output={self.output!r}{temperature}"


def leaf_tasks(outputs: Any, task: Task) -> list[Task]:
    """The task of each leaf: in a mapping `task` is for the logits alone."""
    if not isinstance(outputs, Mapping):
        return [task] * len(pytree.tree_leaves(outputs))
    found: list[Task] = []
    for key, value in outputs.items():
        found += [task if key in CLASS_KEYS else "regression"] * len(pytree.tree_leaves(value))
    return found


def count_outputs(p: Prediction | RegressionPrediction, task: Task, class_dim: int) -> int:
    """The number of classes, or of numbers, that a prediction has for a sample."""
    dim = 1 if task == "regression" else class_dim
    return p.mean.shape[dim] if p.mean.dim() > 1 else 1


def check_outputs(
    shapes: Sequence[Sequence[int] | None],
    tasks: Sequence[Task],
    class_dim: int,
    paired: bool,
    batch_dims: Sequence[int | None] | None = None,
) -> None:
    """Raise if the outputs of the base model do not suit the task.

    Args:
        shapes: The shape of each floating-point leaf with a batch dimension, else None.
        tasks: The task of each leaf.
        class_dim: Where the classes should be.
        paired: `heteroscedastic=True` was asked for.
        batch_dims: The batch dimension of each leaf; None if nothing is known of them.
    Raises:
        ConfigError: `class_dim` is not in the shape or is the batch dimension, there is one class only, or two outputs
            are needed.
        LayoutError: No output has a batch dimension.
    """
    if all(shape is None for shape in shapes):
        raise LayoutError("The model returns no floating-point tensor with a batch dimension: nothing to aggregate.")
    if paired and (len(shapes) != 2 or None in shapes or shapes[0] != shapes[1]):
        found = [None if shape is None else tuple(shape) for shape in shapes]
        raise ConfigError(f"heteroscedastic=True needs two outputs of one shape (mean, log-variance), not {found}.")
    for shape, task, batch_dim in zip(shapes, tasks, batch_dims or [None] * len(shapes), strict=True):
        if shape is None or task in ("regression", "multilabel"):
            continue
        seen = tuple(shape)
        if not -len(seen) <= class_dim < len(seen):
            raise ConfigError(f"class_dim={class_dim} is not in the output's shape {seen}. Pass another class_dim=.")
        if class_dim % len(seen) == batch_dim:
            raise ConfigError(
                f"class_dim={class_dim} is where the samples are in the output's shape {seen}. Pass another class_dim=."
            )
        if seen[class_dim] == 1:
            raise ConfigError(
                f'The output {seen} has one class in dimension {class_dim}. Pass task="multilabel" for the logit of '
                f'a yes or no, or task="regression" for a number.'
            )

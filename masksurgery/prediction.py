"""What a converted model returns in eval, and the head that makes it of the members' outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Sequence, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from masksurgery.layers import Assignment
from masksurgery.types import ConfigError, LayoutError, Task

CLASS_KEYS = ("logits", "out", "aux")
"""The entries of a mapping that `task` applies to; the others count as regression."""


class Prediction(NamedTuple):
    """Classification: batch first in every field, k classes (or labels) in the base model's dimension.

    Attributes:
        mean: Mean probabilities of the members [b, k, ...].
        variance: Population variance of their probabilities [b, k, ...].
        logits: Log of the mean probabilities; for "multilabel" the log-odds. `cross_entropy(p.logits, y)` (or
            `binary_cross_entropy_with_logits`) is the negative log-likelihood of the ensemble.
        entropy: Entropy of the mean [b, ...] in nats: the total uncertainty. For "multilabel" of each label.
        mutual_information: Entropy less the members' mean entropy: how far they disagree (epistemic).
        members: Logits of each member [b, n, k, ...].
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
    """Regression: mean and population variance over the members [b, ...], and the members [b, n, ...]."""

    mean: Tensor
    variance: Tensor
    members: Tensor


def _register(kind: type) -> None:
    """`torch.export.save` writes a tuple type by a name, which it has to know."""
    if kind not in pytree.SUPPORTED_SERIALIZED_TYPES:
        pytree._register_namedtuple(kind, serialized_type_name=f"masksurgery.{kind.__name__}")


_register(Prediction)
_register(RegressionPrediction)


def classification(members: Tensor, class_dim: int, task: Task) -> Prediction:
    """Aggregate the logits of the members.

    Args:
        members: [b, n, ...]; for `task="probabilities"` probabilities.
        class_dim: Where the classes are in it.
        task: "classification", "multilabel" or "probabilities".
    """
    n = members.shape[1]
    if task == "multilabel":
        log_p, log_not = F.logsigmoid(members), F.logsigmoid(-members)
        log_mean, log_not_mean = _log_mean(log_p), _log_mean(log_not)
        mean, p = log_mean.exp(), log_p.exp()
        entropy = _plogp(log_mean) + _plogp(log_not_mean)
        expected = (_plogp(log_p) + _plogp(log_not)).mean(1)
        logits = log_mean - log_not_mean
    else:
        if task == "probabilities":
            members = members.clamp_min(torch.finfo(members.dtype).tiny).log()
        log_p = F.log_softmax(members, class_dim)
        logits = log_mean = _log_mean(log_p)
        mean, p = log_mean.exp(), log_p.exp()
        entropy = _plogp(log_mean).sum(class_dim - 1)
        expected = _plogp(log_p).sum(class_dim).mean(1)
    variance = p.var(1, correction=0) if n > 1 else torch.zeros_like(mean)
    return Prediction(mean, variance, logits, entropy, (entropy - expected).clamp_min(0), members)


def _log_mean(log_p: Tensor) -> Tensor:
    return torch.logsumexp(log_p, 1) - math.log(log_p.shape[1])


def _plogp(log_p: Tensor) -> Tensor:
    """-p log p, which is 0 at p = 0."""
    return -torch.where(log_p > -math.inf, log_p.exp() * log_p, 0.0)


def regression(members: Tensor, log_variance: Tensor | None = None) -> RegressionPrediction:
    """Mean and variance over the members [b, n, ...]; with their log-variances, of the Gaussian mixture."""
    variance = members.var(1, correction=0) if members.shape[1] > 1 else torch.zeros_like(members[:, 0])
    if log_variance is not None:
        variance = variance + log_variance.exp().mean(1)
    return RegressionPrediction(members.mean(1), variance, members)


class Head(nn.Module):
    """Splits every output by members and aggregates it; in training hands the outputs on.

    Args:
        n: Number of members.
        batch_dims: The batch dimension of each leaf of the output; None where it has none.
        tasks: The task of each leaf.
        class_dim: Where the classes are in the base model's outputs.
        heteroscedastic: The two outputs are a mean and a log-variance.
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

    def forward(self, outputs: Any, members: Assignment) -> Any:
        if not members.aggregate:
            return outputs
        leaves, spec = pytree.tree_flatten(outputs)
        if self.heteroscedastic:
            mean, log_variance = (self._by_member(x, cast(int, d)) for x, d in zip(leaves, self.batch_dims, strict=True))
            return self._choose(regression(mean, log_variance))
        found = [self._aggregate(*leaf) for leaf in zip(leaves, self.batch_dims, self.tasks, strict=True)]
        return pytree.tree_unflatten(found, spec)

    def _aggregate(self, x: Any, batch_dim: int | None, task: Task) -> Any:
        if batch_dim is None or not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        members = self._by_member(x, batch_dim)
        if task == "regression":
            return self._choose(regression(members))
        class_dim = self.class_dim % x.dim()
        return self._choose(classification(members, class_dim + 1 + (class_dim < batch_dim), task))

    def _by_member(self, x: Tensor, batch_dim: int) -> Tensor:
        """[n*b, ...] to [b, n, ...], in at least float32."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide.unflatten(batch_dim, (self.n, -1)).movedim((batch_dim + 1, batch_dim), (0, 1))

    def _choose(self, prediction: Prediction | RegressionPrediction) -> Any:
        if self.output == "prediction":
            return prediction
        field = "mean" if self.output == "logits" and "logits" not in prediction._fields else self.output
        return getattr(prediction, field)

    def extra_repr(self) -> str:
        return f"n={self.n}, tasks={sorted(set(self.tasks))}, output={self.output!r}"


def leaf_tasks(outputs: Any, task: Task) -> list[Task]:
    """The task of each leaf: in a mapping `task` is for the logits alone."""
    if not isinstance(outputs, Mapping):
        return [task] * len(pytree.tree_leaves(outputs))
    parts = [(task if key in CLASS_KEYS else "regression", value) for key, value in outputs.items()]
    return [cast(Task, what) for what, value in parts for _ in pytree.tree_leaves(value)]


def check_outputs(shapes: Sequence[Sequence[int] | None], tasks: Sequence[Task], class_dim: int, paired: bool) -> None:
    """Raise if the outputs of the base model do not suit the task.

    Args:
        shapes: The shape of each floating-point leaf with a batch dimension, else None.
        tasks: The task of each leaf.
        class_dim: Where the classes should be.
        paired: `heteroscedastic=True` was asked for.
    Raises:
        ConfigError: `class_dim` is not in the shape or there is one class only, or two outputs are needed.
        LayoutError: No output has a batch dimension.
    """
    if all(shape is None for shape in shapes):
        raise LayoutError("No output of the model is a floating-point tensor with a batch dimension: nothing to aggregate.")
    if paired and (len(shapes) != 2 or None in shapes or shapes[0] != shapes[1]):
        raise ConfigError(f"heteroscedastic=True needs two outputs of one shape (mean, log-variance), not {list(shapes)}.")
    for shape, task in zip(shapes, tasks, strict=True):
        if shape is None or task in ("regression", "multilabel"):
            continue
        if not -len(shape) <= class_dim < len(shape):
            raise ConfigError(f"class_dim={class_dim} is not in the output's shape {tuple(shape)}. Pass class_dim=.")
        if shape[class_dim] == 1:
            raise ConfigError(
                f'The output {tuple(shape)} has one class in dimension {class_dim}. Pass task="multilabel" for a '
                f'probability, or task="regression" for a number.'
            )



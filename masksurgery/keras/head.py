"""What the outputs of the members become: mean and variance, entropies, and what a loss takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from masksurgery.keras.graph import Graph, Node, Value
from masksurgery.keras.kinds import activation_kind, kind_of
from masksurgery.types import ConfigError, check_choice

TASKS = ("classification", "multilabel", "regression")


def resolve_task(graph: Graph, task: str | None, from_logits: bool | None) -> tuple[str, bool]:
    """The task, and whether the base model ends in logits, where its last activation says so.

    Raises:
        ConfigError: It does not say, or it says something else than the caller.
    """
    if task is not None:
        check_choice("task", task, TASKS)
    last, source = _last_activation(graph)
    where = f"'{graph.name}' ends in '{graph.output.node.name if graph.output.node else graph.output.name}'"
    natural = {"softmax": "classification", "gate": "multilabel"}.get(last)
    if last == "unknown" and source and task != "regression" and (task is None or from_logits is None):
        raise ConfigError(
            f"In '{graph.name}' it is not known what '{source.name}' ({type(source.op).__name__}) does to the classes. "
            f'Pass task="regression", or another task= and with it from_logits=True or False.'
        )
    if task is None and natural is None:
        raise ConfigError(
            f"{where}, without a softmax or sigmoid: its outputs may be logits or numbers. Pass "
            f'task="classification", task="multilabel" (logits of a sigmoid each) or task="regression".'
        )
    task = task or str(natural)
    if task == "regression":
        return task, False
    if from_logits is None:
        if natural not in (None, task):
            raise ConfigError(f"{where}, which makes the probabilities of task={natural!r}, not of task={task!r}.")
        from_logits = natural is None
    if task == "classification" and graph.output.shape[-1] == 1:
        raise ConfigError(f'{where}: one class. Pass task="multilabel" for a yes or no, or task="regression".')
    return task, from_logits


def _last_activation(graph: Graph) -> tuple[str, Node | None]:
    """What the output comes from: softmax, gate (a sigmoid), plain (a layer without either) or unknown; the node."""
    known: dict[Value, tuple[str, Node | None]] = {}

    def look(value: Value) -> tuple[str, Node | None]:
        if value not in known:
            known[value] = _activation_of(value, look)
        return known[value]

    return look(graph.output)


def _activation_of(value: Value, look: Callable[[Value], tuple[str, Node | None]]) -> tuple[str, Node | None]:
    node = value.node
    if node is None:
        return "plain", None
    kind = kind_of(node)
    if kind in ("mix", "depthwise"):
        return {"pointwise": "plain"}.get(activation_kind(node.op), activation_kind(node.op)), node
    if kind in ("softmax", "gate", "unknown"):
        return kind, node
    before = [look(source) for source in node.inputs]
    if kind in ("pass", "move"):
        return before[0]
    kinds = {found for found, _ in before}
    if "unknown" in kinds:
        return next(found for found in before if found[0] == "unknown")
    if kinds == {"gate"} and kind in ("join", "split"):  # of a softmax the classes are not where they were
        return "gate", node
    return "plain" if kinds == {"plain"} else "unknown", node


def aggregate(rows: Any, n: int, task: str, from_logits: bool) -> dict[str, Any]:
    """What the members answer together.

    Args:
        rows: What the base model returns, member-major.
        task: "classification" (classes last), "multilabel" or "regression".
        from_logits: The rows are logits, not probabilities.
    Shape:
        rows (n*b, ...); the results (b, ...), `members` (b, n, ...), the entropies of a classification without classes.
    Returns:
        mean and variance (population) over the members: of probabilities, or of the numbers of a regression; members:
        in the base model's terms. Unless it is a regression, also logits: log of the mean probabilities (of a
        multilabel task the log-odds); entropy: of the mean, in nats; mutual_information: that less the members' mean
        entropy. In at least float32.
    """
    x = ops.cast(rows, "float32") if keras.backend.standardize_dtype(rows.dtype) in ("float16", "bfloat16") else rows
    count, *shape = ops.shape(x)  # TensorFlow may not know all sizes beforehand
    x = ops.reshape(x, (n, count // n, *shape))
    members = ops.moveaxis(x, 0, 1)
    if task == "regression":
        return {"mean": _mean(members), "variance": _variance(members), "members": members}
    kinds = _logs(members, task, from_logits)
    p = ops.exp(kinds[0]) if from_logits else members
    means = [_log_mean(log_p, n) for log_p in kinds]
    entropy, expected = sum(map(_entropy, means)), sum(map(_entropy, kinds))
    if task == "classification":
        entropy, expected = ops.sum(entropy, axis=-1), ops.sum(expected, axis=-1)
    return {
        "mean": _mean(p),
        "variance": _variance(p),
        "logits": means[0] if task == "classification" else means[0] - means[1],
        "entropy": entropy,
        "mutual_information": ops.maximum(entropy - _mean(expected), 0.0),
        "members": members,
    }


def _mean(x: Any) -> Any:
    """Over the members, in the dtype of x: ops.mean and ops.var make float32 of float64 on PyTorch."""
    return ops.sum(x, axis=1) / x.shape[1]


def _variance(x: Any) -> Any:
    return _mean(ops.square(x - ops.expand_dims(_mean(x), 1)))


def _logs(members: Any, task: str, from_logits: bool) -> list[Any]:
    """Log probabilities: of the classes, or of each label and of its opposite."""
    tiny = float(np.finfo(keras.backend.standardize_dtype(members.dtype)).tiny)
    if not from_logits:
        kinds = [members] if task == "classification" else [members, 1.0 - members]
        return [ops.log(ops.maximum(p, tiny)) for p in kinds]
    if task == "classification":
        return [ops.log_softmax(members, axis=-1)]
    return [ops.log_sigmoid(members), ops.log_sigmoid(-members)]


def _log_mean(log_p: Any, n: int) -> Any:
    return ops.logsumexp(log_p, axis=1) - float(np.log(n))


def _entropy(log_p: Any) -> Any:
    """-p log p, which is 0 at p = 0."""
    return -ops.exp(log_p) * ops.maximum(log_p, float(np.finfo(np.float32).min))

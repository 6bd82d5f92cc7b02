"""Which tensors of a model hold one sample in each row: only those may be repeated for the members."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from masksurgery.keras.cloning import clone
from masksurgery.keras.graph import Graph, Node, Value
from masksurgery.keras.kinds import keeps_samples

UNKNOWN_SIZE = 32
"""What stands for a size that is not known, such as the height of an image of any size."""


def find_mixed(graph: Graph) -> dict[Node, str]:
    """The nodes that members must not reach, each with the reason.

    A layer of Keras' own is known to keep the samples of a batch apart. All else is tried out on random samples: their
    order, and how many there are, must not matter to any of them. No mask may reach what fails.
    """
    sizes = {value.shape[:1] for value in graph.inputs}
    in_rows = set(graph.inputs) if len(sizes) == 1 else {v for v in graph.inputs if v.shape[:1] == (None,)}
    mixed: dict[Node, str] = {}
    for node in graph.nodes:
        foreign = [value.name for value in node.inputs if value not in in_rows]
        if foreign:
            mixed[node] = f"unknown: '{node.name}' reads '{foreign[0]}', which has no row for each sample"
            continue
        has_rows, reason = (True, None) if keeps_samples(node) else _try_out(node)
        if reason:
            mixed[node] = f"unknown: '{node.name}' ({type(node.op).__name__}) {reason}"
        if has_rows:
            in_rows.update(node.outputs)
    return mixed


def _try_out(node: Node) -> tuple[bool, str | None]:
    """Whether what an operation returns has a row for each sample, and why it may not see several members; or None."""
    rng = np.random.default_rng(0)
    rows = {value: _random(value, rng) for value in dict.fromkeys(node.inputs)}
    op = clone(node.op, node.op.name)
    picks = ([0, 1, 2], [2, 0], [1])
    try:
        list(_run(op, node, rows, picks[0]))
        for variable in getattr(op, "weights", ()):
            if keras.backend.is_float_dtype(variable.dtype):  # zeros would hide what they are multiplied with
                variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        found = [list(_run(op, node, rows, picked)) for picked in picks]
    except Exception as error:  # what anybody's layer may raise; then nothing is known of it
        return False, f"cannot be tried out on its own ({type(error).__name__}: {error})"
    if any(y.shape[:1] != (len(picked),) for picked, outputs in zip(picks, found, strict=True) for y in outputs):
        return False, "does not return a row for each sample"
    for picked, outputs in zip(picks, found, strict=True):
        for y, part in zip(found[0], outputs, strict=True):
            if y[picked].shape != part.shape or not np.allclose(part, y[picked], rtol=1e-4, atol=1e-4):
                return True, "does not treat each sample by itself"
    return True, None


def _run(op: Any, node: Node, rows: dict[Value, np.ndarray], picked: list[int]) -> Iterator[np.ndarray]:
    def fill(leaf: Any) -> Any:
        return ops.convert_to_tensor(rows[leaf][picked], dtype=leaf.dtype) if isinstance(leaf, Value) else leaf

    args, kwargs = tree.map_structure(fill, node.args), tree.map_structure(fill, dict(node.kwargs))
    for leaf in tree.flatten(op(*args, **kwargs)):
        yield ops.convert_to_numpy(ops.cast(leaf, "float32"))


def _random(value: Value, rng: np.random.Generator) -> np.ndarray:
    shape = (3, *(UNKNOWN_SIZE if size is None else size for size in value.shape[1:]))
    if keras.backend.is_float_dtype(value.dtype):
        return rng.standard_normal(shape)
    return rng.integers(0, 2, shape)

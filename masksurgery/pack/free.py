"""Free dimensions: those that grow with the inputs, such as the height of a feature map.

Packing looks at one example, but a packed model has to take all the sizes that the converted one takes. So the graph is
run on larger inputs too. What grows with them is free: nothing is known or cut of a part of it.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from masksurgery.example import Example, tensors_in
from masksurgery.inputs import placeholder_values, replace_inputs
from masksurgery.running import Shape, Way, run_shapes
from masksurgery.types import LayoutError

FACTOR = 2
"""By how much inputs grow: what was a multiple of a window or a stride remains one."""

MOST_ALIKE = 4
"""How many dimensions of one length are tried in all combinations."""

InputDim = tuple[str, int, int]
"""A dimension of an input: the placeholder's name, which of its tensors, and which dimension."""


@dataclass
class Free:
    """What changes with the size of the inputs.

    Attributes:
        inputs: The dimensions of the inputs that may grow.
        dims: The free dimensions of the tensors that have any, by node and which of its tensors it is.
        numbers: The nodes whose values are sizes, or made of sizes, that change.
        shortest: The length of the shortest free dimension.
    """

    inputs: set[InputDim] = field(default_factory=set)
    dims: dict[tuple[fx.Node, int], set[int]] = field(default_factory=dict)
    numbers: set[fx.Node] = field(default_factory=set)
    shortest: int = sys.maxsize

    def of(self, node: fx.Node, k: int) -> Collection[int]:
        return self.dims.get((node, k), ())


def find_free(
    graph: fx.Graph,
    root: nn.Module,
    bound: inspect.BoundArguments,
    unbatched: Sequence[str],
    ways: Sequence[Way],
) -> Free:
    """What changes if the inputs grow, as far as the model takes that.

    Args:
        bound: The example inputs.
        unbatched: Names of placeholders without a batch dimension.
        ways: Of running the graph.
    """
    known, way = run_shapes(graph, root, Example.of(bound, unbatched), ways)
    found = Free()
    dims = dict(_input_dims(bound, unbatched))
    done: set[InputDim] = set()
    for factor in (FACTOR, 1 / FACTOR):  # a table of positions may be as long as the example
        for chosen in _choices(dims):
            if done.issuperset(chosen):
                continue
            try:
                larger = Example.of(grow(bound, chosen, factor), unbatched)
                others, _ = run_shapes(graph, root, larger, [way])
            except LayoutError:
                continue
            if _ranks(others) == _ranks(known):
                done.update(chosen)
                found.inputs.update(chosen if factor > 1 else ())
                _compare(known, others, found)
    return found


def _choices(dims: Mapping[InputDim, int]) -> Iterator[Sequence[InputDim]]:
    """Which dimensions of the inputs to try together.

    Those of one length first, as images may have to be square, and masks as long as their texts.
    """
    for length in dict.fromkeys(dims.values()):
        alike = [dim for dim, other in dims.items() if other == length][:MOST_ALIKE]
        for size in range(len(alike), 0, -1):
            yield from combinations(alike, size)
    yield [dim for dim in dims if dim[2] > 1]  # all sides of all images


def grow(bound: inspect.BoundArguments, dims: Iterable[InputDim], factor: float = FACTOR) -> inspect.BoundArguments:
    """The same inputs, all zeros, larger (or smaller) along some of their dimensions."""
    chosen = set(dims)

    def larger(name: str, value: Any) -> Any:
        order = {id(x): k for k, x in enumerate(tensors_in(value))}

        def enlarge(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            k = order[id(x)]
            sizes = [math.ceil(n * factor) if (name, k, d) in chosen else n for d, n in enumerate(x.shape)]
            return x.new_zeros(sizes)

        return tree_map(enlarge, value)

    return replace_inputs(bound, larger)


def _input_dims(bound: inspect.BoundArguments, unbatched: Sequence[str]) -> Iterable[tuple[InputDim, int]]:
    """The dimensions of the inputs that do not count samples, with their lengths."""
    for name, value in placeholder_values(bound).items():
        for k, x in enumerate(tensors_in(value)):
            for d in range(0 if name in unbatched else 1, x.dim()):
                yield (name, k, d), x.shape[d]


def _ranks(values: Mapping[fx.Node, Any]) -> list[list[int]]:
    """Of all tensors: a dimension that is squeezed where its length is 1 is no longer the same one."""
    return [[len(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Shape)] for value in values.values()]


def _compare(known: Mapping[fx.Node, Any], others: Mapping[fx.Node, Any], found: Free) -> None:
    """Note what is not as long, or as large, as it was."""
    for node, other in others.items():
        if node.op == "output":
            continue
        leaves, grown = tree_leaves(known[node]), tree_leaves(other)
        tensors = [[leaf for leaf in side if isinstance(leaf, Shape)] for side in (leaves, grown)]
        for k, (one, two) in enumerate(zip(*tensors, strict=False)):
            changed = {d for d, (a, b) in enumerate(zip(one, two, strict=True)) if a != b}
            if changed:
                found.dims.setdefault((node, k), set()).update(changed)
                found.shortest = min(found.shortest, *(one[d] for d in changed if two[d] > one[d]), sys.maxsize)
        if not tensors[0] and leaves != grown:
            found.numbers.add(node)

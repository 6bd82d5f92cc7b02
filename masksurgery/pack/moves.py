"""Operations that only move numbers (reshape, permute, cat, windows): where each number of the output comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from masksurgery.pack.families import Operation, pattern_shape, shape_of
from masksurgery.pack.network import Network
from masksurgery.running import call_node

Labels = dict[Any, "list[Tensor] | None"]
"""What was found before, by what an operation does and to which shapes."""


@dataclass(frozen=True)
class Variant:
    """A node with other arguments."""

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def call(operation: Operation, net: Network, values: Sequence[Any], variant: Variant | None = None) -> Any:
    """Run an operation on other tensors, with the sizes of the example.

    Args:
        values: In the place of its inputs.
        variant: What to run instead.
    """
    node = operation.node
    given = {place[0]: value for place, value in zip(operation.inputs, values, strict=True)}

    def value_of(source: fx.Node) -> Any:
        return given[source] if source in given else net.facts[source].value

    if operation.module is not None:
        return operation.module(*values)
    run: Any = node if variant is None else variant
    args, kwargs = fx.map_arg((tuple(run.args), dict(run.kwargs)), value_of)
    return call_node(run, net.root, {}, args, kwargs)


def trace_labels(operation: Operation, net: Network, cache: Labels) -> list[Tensor] | None:
    """For each output the labels of its numbers; None if the operation cannot be run on labels.

    0 is a padding with zeros, else 1 + the place in the inputs, which are counted one after another, and all samples as
    one.

    Returns:
        Integers of the shape of each output; of length 1 along dimensions where they do not vary.
    """
    key = _key(operation, net)
    if key is None or key not in cache:
        found = _trace(operation, net)
        if key is None:
            return found
        cache[key] = found
    return cache[key]


def _key(operation: Operation, net: Network) -> Any:
    node = operation.node
    values: Any = lambda n: _Value(net.facts[n].value)  # noqa: E731  # fx's own type of it is narrower
    args = fx.map_arg((node.args, node.kwargs), values)
    shapes = tuple((shape_of(net, place), pattern_shape(net, place)) for place in operation.inputs)
    # What modules that are not torch's do may depend on more than what they show.
    known = type(operation.module).__module__.startswith("torch.nn.")
    shown = repr(operation.module) if known else id(operation.module)
    kind = (type(operation.module), shown) if operation.module is not None else node.target
    return kind, node.op, shapes, repr(args)


class _Value:
    """A value in a key: numbers as they are, tensors by their shape."""

    def __init__(self, value: Any) -> None:
        self.text = repr([tuple(x.shape) if isinstance(x, Tensor) else x for x in tree_leaves(value)])

    def __repr__(self) -> str:
        return self.text


def _labels(operation: Operation, net: Network) -> list[Tensor]:
    """The inputs as labels, which are alike for all samples."""
    shapes = [shape_of(net, place) for place in operation.inputs]
    return [x.expand(shape) for x, shape in zip(_samples(operation, net), shapes, strict=True)]


def _samples(operation: Operation, net: Network) -> list[Tensor]:
    """The labels of one sample."""
    given, start = [], 1
    for place in operation.inputs:
        shape = pattern_shape(net, place)
        size = torch.Size(shape).numel()
        given.append(torch.arange(start, start + size, dtype=torch.float64).reshape(shape))
        start += size
    return given


def _trace(operation: Operation, net: Network) -> list[Tensor] | None:
    given = _labels(operation, net)
    for dense in (False, True):
        found = _moved(operation, net, [x.contiguous() for x in given] if dense else given)
        if found is None:
            continue
        # What sorts or interpolates moves other numbers otherwise.
        table = torch.rand(int(max(x.max() for x in given)) + 1, generator=torch.Generator().manual_seed(0)).double()
        table[0] = 0
        others = _moved(operation, net, [table[x.long()] for x in given])
        if not all(bool(((x >= 0) & (x < len(table))).all()) for x in found):
            return None  # it puts other numbers than zero in between
        labels = [_shrink(x) for x in found]
        if others is None or not all(
            torch.equal(table[x].expand(y.shape), y) for x, y in zip(labels, others, strict=True)
        ):
            return None
        return labels
    return None


def _moved(operation: Operation, net: Network, given: list[Tensor]) -> list[Tensor] | None:
    """The tensors that an operation returns of these; None if it cannot be run on them."""
    try:
        found = call(operation, net, given)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    return [x for x in tree_leaves(found) if isinstance(x, Tensor)]


def _shrink(labels: Tensor) -> Tensor:
    for d, size in enumerate(labels.shape):
        if size > 1 and (labels.stride(d) == 0 or bool((labels == labels.narrow(d, 0, 1)).all())):
            labels = labels.narrow(d, 0, 1)
    return labels.long()


# --- on fewer channels -----------------------------------------------------------------------------------------------


def find_move(
    operation: Operation, net: Network, cache: Labels, outputs: Sequence[Mapping[int, Tensor] | None]
) -> tuple[list[dict[int, Tensor]], Variant | None] | None:
    """How a move makes no more than some of its outputs' channels.

    Args:
        outputs: For each output the indices that are kept, by dimension; None for one that is not read.
    Returns:
        The indices to keep of each input, and the node's arguments with other sizes where it needs them; None if
        there is no way. Whatever is returned has been tried on labels.
    """
    maps = trace_labels(operation, net, cache)
    if maps is None:
        return None
    node = operation.node
    expected = [None if keep is None else _take(labels, keep) for labels, keep in zip(maps, outputs, strict=True)]
    shapes = [None if keep is None else _cut_shape(shape_of(net, (node, k)), keep) for k, keep in enumerate(outputs)]
    inputs = _sources(operation, net, expected, maps)
    if inputs is None:
        return None
    given = [
        _take(x, keep).expand(_cut_shape(shape_of(net, place), keep))
        for x, keep, place in zip(_samples(operation, net), inputs, operation.inputs, strict=True)
    ]
    for variant in (None, _resized(node, shapes, net)):
        for dense in (False, True):
            try:
                found = call(operation, net, [x.contiguous() for x in given] if dense else given, variant)
            except (RuntimeError, TypeError, ValueError, IndexError):
                continue
            leaves = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
            if len(leaves) == len(expected) and all(map(_is_as_expected, leaves, expected, shapes)):
                return inputs, variant
            break
    return None


def _is_as_expected(x: Tensor, labels: Tensor | None, shape: tuple[int, ...] | None) -> bool:
    return labels is None or (tuple(x.shape) == shape and bool((x == labels).all()))


def _cut_shape(shape: Sequence[int], keep: Mapping[int, Tensor]) -> tuple[int, ...]:
    return tuple(len(keep[d]) if d in keep else size for d, size in enumerate(shape))


def _take(x: Tensor, keep: Mapping[int, Tensor]) -> Tensor:
    """The indices that are kept of labels; along dimensions of length 1 all are alike."""
    for d, index in keep.items():
        x = x.index_select(d, index) if x.shape[d] > 1 else x
    return x


def _sources(
    operation: Operation, net: Network, expected: Sequence[Tensor | None], maps: Sequence[Tensor]
) -> list[dict[int, Tensor]] | None:
    """The channels of each input that hold what is expected; what the operation itself leaves out is left to it."""
    shapes = [pattern_shape(net, place) for place in operation.inputs]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    taken = torch.zeros(1 + sum(sizes), dtype=torch.bool)
    for labels in expected:
        if labels is not None:
            taken[labels.reshape(-1)] = True
    moved = torch.zeros_like(taken)
    for labels in maps:
        moved[labels.reshape(-1)] = True
    found = []
    for part, whole, shape in zip(taken[1:].split(sizes), moved[1:].split(sizes), shapes, strict=True):
        if not part.any():
            return None
        keep = {}
        for d, length in enumerate(shape):
            view = (-1, length, torch.Size(shape[d + 1 :]).numel())
            kept = part.reshape(view).any(2).any(0) | ~whole.reshape(view).any(2).any(0)
            if not kept.all():
                keep[d] = kept.nonzero().reshape(-1)
        found.append(keep)
    return found


def _resized(node: fx.Node, shapes: Sequence[tuple[int, ...] | None], net: Network) -> Variant | None:
    """The node with the sizes that its outputs have now; None where these are not fixed."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    full = [tuple(x.shape) for x in net.tensors(node)]
    if node.op not in ("call_method", "call_function"):
        return None
    if name in ("chunk", "split", "split_with_sizes", "tensor_split"):
        dim = node.kwargs.get("dim", node.args[2] if len(node.args) > 2 else 0)
        if not isinstance(dim, int) or any(dim % len(shape) in net.free.of(node, k) for k, shape in enumerate(full)):
            return None
        parts = [0 if shape is None else shape[dim] for shape in shapes]
        return Variant("call_function", torch.split, (node.args[0], parts, dim), {})
    if name not in ("view", "reshape", "expand", "unflatten") or node.kwargs or shapes[0] is None or len(full) != 1:
        return None
    first = 1
    start = 0
    if name == "unflatten":
        start, first = int(node.args[1]) % net.tensors(node.all_input_nodes[0])[0].dim(), 2  # type: ignore[arg-type]
    sizes = list(node.args[first:])
    nested = len(sizes) == 1 and isinstance(sizes[0], (tuple, list))
    sizes = list(sizes[0]) if nested else sizes  # type: ignore[arg-type]
    for k in range(len(sizes)):
        d = start + k
        if d < len(full[0]) and shapes[0][d] != full[0][d]:
            sizes[k] = shapes[0][d]
    return Variant(node.op, node.target, (*node.args[:first], *((tuple(sizes),) if nested else sizes)), {})

"""Where the batch and the channels of every node of a graph are, found by running it on tensors without data.

The graph runs at two batch sizes: what differs between the runs varies with the batch. In one of them every operator's
rule (`rules.py`) says which axis of its output is which axis of its input; two sizes alone could not tell `b*k` rows
from `k*b` rows.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from masksurgery.axes import Axis, Call, Dims, get_dims, set_dims
from masksurgery.copying import copy_with, meta_copy
from masksurgery.rules import find_rule
from masksurgery.types import Layout, LayoutError

# Odd and prime, so that a batch is not taken for a window, a group or a pair.
BATCH_SIZES = (13, 11)


@dataclass
class Facts:
    """What is known of one node.

    Attributes:
        value: Its output at BATCH_SIZES[0]: tensors without data, integers, or a tree of them.
        other: The same at BATCH_SIZES[1], tensors as their shapes.
        dims: The axes of each tensor in `value`, in order.
        data: A tensor in it is computed from the values of the inputs, not from their sizes alone.
        kinds: The families of the operators that ran, in order; none for an Identity, or dropout in eval.
        split: Axes of the inputs that were cut up.
        unknown: Operators without a rule.
        children: For an axis of an input, the axes of the output that are the same index by index.
    """

    value: Any
    other: Any = None
    dims: list[Dims] = field(default_factory=list)
    data: bool = False
    kinds: tuple[str, ...] = ()
    split: frozenset[Axis] = frozenset()
    unknown: tuple[str, ...] = ()
    children: dict[Axis, set[Axis]] = field(default_factory=dict)

    @property
    def has_tensor(self) -> bool:
        return any(isinstance(leaf, Tensor) for leaf in tree_leaves(self.value))

    @property
    def varies(self) -> bool:
        """Its sizes, or its integers, depend on the batch size."""
        return tree_leaves(shapes(self.value)) != tree_leaves(self.other)

    @property
    def has_batch(self) -> bool:
        return any(axis.batch for dims in self.dims for dim in dims for axis in dim)


NodeFacts = Mapping[fx.Node, Facts]


class Shape(tuple[int, ...]):
    """The shape of a tensor, as a leaf of a tree."""


def shapes(value: Any) -> Any:
    return tree_map(lambda leaf: Shape(leaf.shape) if isinstance(leaf, Tensor) else leaf, value)


def layout_of(dims: Dims, name: str) -> Layout:
    """The layout of one tensor.

    Raises:
        LayoutError: More than one dimension counts samples.
    """
    found = [(d, i) for d, dim in enumerate(dims) for i, axis in enumerate(dim) if axis.batch]
    channels = [d for d, dim in enumerate(dims) if len(dim) == 1 and dim[0].channel]
    channel_dim = channels[-1] if channels else None
    if not found:
        return Layout(None, channel_dim)
    if len(found) > 1:
        raise LayoutError(
            f"node '{name}' has the batch in more than one place of its shape "
            f"{[[axis.size for axis in dim] for dim in dims]} (batch size {BATCH_SIZES[0]}): samples are compared with "
            f"each other. Leave out the layers before it with exclude=[...]."
        )
    batch_dim, i = found[0]
    sizes = [axis.size for axis in dims[batch_dim]]
    outer, fold = 1, 1
    for size in sizes[:i]:
        outer *= size
    for size in sizes[i + 1 :]:
        fold *= size
    return Layout(batch_dim, channel_dim, outer, fold)


def analyse(
    graph: fx.Graph,
    root: nn.Module,
    inputs: Mapping[str, Any],
    channel_dim: Callable[[fx.Node], int | None],
    unbatched: tuple[str, ...] = (),
    training: bool = False,
) -> dict[fx.Node, Facts]:
    """Run the graph at two batch sizes and collect the facts of every node.

    Args:
        graph: A traced graph. It is not changed.
        root: The module that it was traced from; its parameters are not read, only their shapes.
        inputs: Example values by the name of the placeholder; dimension 0 of every tensor is the batch.
        channel_dim: Where a layer's output has its channels (counted from the end), None for other nodes.
        unbatched: Names of placeholders without a batch dimension.
        training: The mode that the graph was traced in, whatever the mode of `root` is now.
    Raises:
        LayoutError: The graph cannot be run without data.
    """
    # The meta device is two to three times as fast as fake tensors, but does not know a CPU tensor beside a meta one.
    for make in (_on_meta, _on_fake):
        try:
            with torch.no_grad(), make(root) as (module, device):
                return _analyse(graph, module.train(training), device, inputs, channel_dim, unbatched)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            failure = error
    raise LayoutError(f"The model cannot be run without data, on its example inputs: {failure}") from failure


def _analyse(
    graph: fx.Graph,
    module: nn.Module,
    device: torch.device | None,
    inputs: Mapping[str, Any],
    channel_dim: Callable[[fx.Node], int | None],
    unbatched: tuple[str, ...],
) -> dict[fx.Node, Facts]:
    given = [_resize(inputs, size, device, unbatched) for size in BATCH_SIZES]
    others = {node: shapes(value) for node, value in _run(graph, module, given[1], lambda node, call: call())}
    facts: dict[fx.Node, Facts] = {}
    tracker = _Tracker()

    def track(node: fx.Node, call: Callable[[], Any]) -> Any:
        sources = [facts[source] for source in node.all_input_nodes]
        _announce(sources)
        tracker.start()
        with tracker:
            value = call()
        value = _own(value, sources)
        # zeros_like(x) reads no value of x, only its size
        data = set(tracker.kinds) != {"make"} and any(source.data and source.has_tensor for source in sources)
        facts[node] = fact = Facts(value, others[node], data=data)
        if node.op == "placeholder":
            fact.data = True
        _finalise(node, fact, tracker, channel_dim(node), batched=node.target not in unbatched)
        return value

    for _ in _run(graph, module, given[0], track):
        pass
    return facts


def _run(
    graph: fx.Graph, module: nn.Module, inputs: Mapping[str, Any], step: Callable[[fx.Node, Callable[[], Any]], Any]
) -> Iterator[tuple[fx.Node, Any]]:
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: env[source])
        try:
            env[node] = step(node, lambda: _call(node, module, inputs, args, kwargs))  # noqa: B023
        except LayoutError:
            raise
        except Exception as error:
            raise RuntimeError(f"node '{node.name}' ({node.op} {node.target}): {error}") from error
        yield node, env[node]


def _call(node: fx.Node, module: nn.Module, inputs: Mapping[str, Any], args: Any, kwargs: Any) -> Any:
    if node.op == "placeholder":
        return inputs[cast(str, node.target)]
    if node.op == "get_attr":
        return operator.attrgetter(cast(str, node.target))(module)
    if node.op == "call_module":
        return module.get_submodule(cast(str, node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], cast(str, node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return cast(Callable[..., Any], node.target)(*args, **kwargs)
    return args[0]


def _announce(sources: list[Facts]) -> None:
    """Tell the inputs of a node their axes; two nodes may have the same tensor, so it is said anew each time."""
    for source in sources:
        tensors = [leaf for leaf in tree_leaves(source.value) if isinstance(leaf, Tensor)]
        for x, dims in zip(tensors, source.dims, strict=True):
            set_dims(x, dims)


def _own(value: Any, sources: list[Facts]) -> Any:
    """A tensor of its own for every node: a view where a node returns one of its inputs."""
    given = {id(leaf) for source in sources for leaf in tree_leaves(source.value)}

    def own(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or id(leaf) not in given:
            return leaf
        view = leaf.view_as(leaf)
        set_dims(view, get_dims(leaf))
        return view

    return tree_map(own, value)


def _finalise(node: fx.Node, fact: Facts, tracker: _Tracker, channel_dim: int | None, batched: bool) -> None:
    """Give the output fresh axes, whose parents are the axes of the inputs."""
    fact.kinds, fact.unknown, fact.split = tuple(tracker.kinds), tuple(tracker.unknown), frozenset(tracker.split)
    tensors = [leaf for leaf in tree_leaves(fact.value) if isinstance(leaf, Tensor)]
    sizes = [leaf for leaf in tree_leaves(fact.other) if isinstance(leaf, Shape)]
    for k, x in enumerate(tensors):
        other = sizes[k] if len(sizes) == len(tensors) else tuple(x.shape)
        dims = []
        for d, dim in enumerate(get_dims(x)):
            is_channel = None if channel_dim is None or k else d == x.dim() + channel_dim
            fresh = tuple(
                Axis(axis.size, axis.batch, axis.channel if is_channel is None else is_channel, parents=axis.sources)
                for axis in dim
            )
            made = (node.op == "placeholder" and batched) or (not fact.data and not any(axis.batch for axis in fresh))
            if made and d < len(other) and x.shape[d] != other[d] and x.shape[d] % BATCH_SIZES[0] == 0:
                fold = x.shape[d] // BATCH_SIZES[0]
                fresh = (Axis(BATCH_SIZES[0], batch=True), *((Axis(fold),) if fold > 1 else ()))
            for axis in fresh:
                axis.sources = frozenset((axis,))
                for parent in axis.parents:
                    fact.children.setdefault(parent, set()).add(axis)
            dims.append(fresh)
        fact.dims.append(tuple(dims))


class _Tracker(TorchDispatchMode):
    """Applies the rule of each operator that runs, and notes its family."""

    def start(self) -> None:
        self.kinds: list[str] = []
        self.unknown: list[str] = []
        self.split: set[Axis] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names, arguments = _signature(func)
        arguments = {**arguments, **dict(zip(names, args, strict=False)), **kwargs}
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        kind, rule = find_rule(func)
        before = [get_dims(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # What a layer makes of its parameters alone (a normalised weight) tells nothing of its input.
        reads_input = [dims for dims in before if any(axis.sources for dim in dims for axis in dim)]
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if rule is None:
            if reads_input:
                self.unknown.append(str(func))
            for x in outputs:
                set_dims(x, tuple((Axis(size),) if size != 1 else () for size in x.shape))
            return out
        call = Call(func.overloadpacket.__name__.rstrip("_"), arguments, outputs)
        dims = rule(call) if outputs and before else []
        for x, found in zip(outputs, dims, strict=True):
            set_dims(x, found)
        if reads_input:
            self.kinds.append(kind)
        if kind == "pointwise" and len(reads_input) > 1 and {"mix", "product"} & set(self.kinds):
            self.kinds.append("sum")
        self.split |= call.split
        return out


@cache
def _signature(func: Any) -> tuple[list[str], dict[str, Any]]:
    arguments = func._schema.arguments
    return [a.name for a in arguments], {a.name: a.default_value for a in arguments if a.has_default_value()}


def _resize(
    inputs: Mapping[str, Any], size: int, device: torch.device | None, unbatched: tuple[str, ...]
) -> dict[str, Any]:
    def resize(x: Any, name: str) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = x.shape if name in unbatched or x.dim() == 0 else (size, *x.shape[1:])
        return torch.empty(shape, dtype=x.dtype, device=device or x.device)

    return {name: tree_map(lambda x: resize(x, name), value) for name, value in inputs.items()}  # noqa: B023


@contextlib.contextmanager
def _on_meta(root: nn.Module) -> Iterator[tuple[nn.Module, torch.device | None]]:
    yield meta_copy(root), torch.device("meta")


@contextlib.contextmanager
def _on_fake(root: nn.Module) -> Iterator[tuple[nn.Module, torch.device | None]]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield copy_with(root, mode.from_tensor), None

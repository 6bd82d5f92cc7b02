"""Where the batch and the channels of every node of a graph are, found by running it on tensors without data.

The graph runs at two batch sizes: what differs between the runs varies with the batch. In one of them every operator's
rule (`rules.py`) says which axis of its output is which axis of its input; two sizes alone could not tell `b*k` rows
from `k*b` rows.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from masksurgery.axes import Axis, Call, Dims, get_dims, set_dims
from masksurgery.copying import copy_with, meta_copy
from masksurgery.example import BATCH_SIZES, Example, tensors_in
from masksurgery.kinds import is_norm
from masksurgery.rules import find_rule
from masksurgery.types import Layout, LayoutError


@dataclass
class InnerCall:
    """A call of a module inside of one that the trace does not enter.

    Attributes:
        name: Qualified name of the module.
        given: Its (args, kwargs) at each of BATCH_SIZES.
        entry: The axes of the tensors in the first of them, in order.
        exits: The axes of the tensors that it returned.
    """

    name: str
    given: list[tuple[Any, Any]]
    entry: list[Dims]
    exits: list[Dims] = field(default_factory=list)


@dataclass
class Facts:
    """What is known of one node.

    Attributes:
        value: Its output at BATCH_SIZES[0]: tensors without data, integers, or a tree of them.
        other: The same at BATCH_SIZES[1], tensors as their shapes.
        dims: The axes of each tensor in `value`, in order.
        data: A tensor in it is computed from the values of the inputs, not from their sizes alone.
        reads: The nodes whose tensors it reads; type_as and expand_as read the values of one of two.
        kinds: The families of the operators that ran, in order; none for an Identity, or dropout in eval.
        split: Axes of the inputs that were cut up.
        unknown: Operators without a rule.
        children: For an axis of an input, or of what a watched module returned, the axes of the output that are the
            same index by index.
        calls: The calls of watched modules in it.
    """

    value: Any
    other: Any = None
    dims: list[Dims] = field(default_factory=list)
    data: bool = False
    reads: frozenset[fx.Node] = frozenset()
    kinds: tuple[str, ...] = ()
    split: frozenset[Axis] = frozenset()
    unknown: tuple[str, ...] = ()
    children: dict[Axis, set[Axis]] = field(default_factory=dict)
    calls: list[InnerCall] = field(default_factory=list)

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
    example: Example,
    channel_dim: Callable[[fx.Node], int | None],
    watch: Collection[str] = (),
    training: bool = False,
) -> dict[fx.Node, Facts]:
    """Run the graph at two batch sizes and collect the facts of every node.

    Args:
        graph: A traced graph. It is not changed.
        root: The module that it was traced from; it is not changed.
        example: What one forward takes.
        channel_dim: Where a layer's output has its channels (counted from the end), None for other nodes.
        watch: Names of modules whose calls are to be noted, unless one stands inside another. With these the values of
            the example inputs and of the parameters are used if it cannot be helped.
        training: The mode that the graph was traced in, whatever the mode of `root` is now.
    Raises:
        LayoutError: The graph cannot be run.
    """
    # The meta device is two to three times as fast as fake tensors, but does not know a CPU tensor beside a meta one.
    for make in (_on_meta, _on_fake, _on_values) if watch else (_on_meta, _on_fake):
        try:
            with torch.no_grad(), make(root, example) as (module, given):
                return _analyse(graph, module.train(training), given, example.dims, channel_dim, watch)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            failure = error
    data = "" if watch else " without data"
    raise LayoutError(f"The model cannot be run{data}, on its example inputs: {failure}") from failure


def _analyse(
    graph: fx.Graph,
    module: nn.Module,
    given: Sequence[Mapping[str, Any]],
    dims: Mapping[str, Sequence[Dims]],
    channel_dim: Callable[[fx.Node], int | None],
    watch: Collection[str],
) -> dict[fx.Node, Facts]:
    recorder = _Recorder(module, watch)
    run = _run(graph, module, given[1], lambda node, call: call())
    others = {node: (shapes(value), recorder.take()) for node, value in run}
    facts: dict[fx.Node, Facts] = {}
    tracker = _Tracker()

    def track(node: fx.Node, call: Callable[[], Any]) -> Any:
        sources = [facts[source] for source in node.all_input_nodes]
        _announce(sources)
        tracker.start()
        with tracker:
            value = call()
        seen = tracker.seen | {id(x) for x in tensors_in(value)}
        reads = frozenset(s for s in node.all_input_nodes if any(id(x) in seen for x in tensors_in(facts[s].value)))
        if node.op == "call_module" and is_norm(module.get_submodule(str(node.target))):
            tracker.treat_as_norm(value, sources)
        value = _own(value, sources)
        data = any(facts[source].data for source in reads)
        other, calls = others[node]
        facts[node] = fact = Facts(value, other, data=data, reads=reads, calls=_paired(recorder.take(), calls))
        if node.op == "placeholder":
            fact.data = True
            for x, known in zip(tensors_in(value), dims[str(node.target)], strict=True):
                set_dims(x, known)
        _finalise(fact, tracker, channel_dim(node))
        return value

    for _ in _run(graph, module, given[0], track):
        pass
    return facts


class _Recorder:
    """Notes the calls of some modules, the outermost if they stand in each other, and gives their outputs new axes."""

    def __init__(self, module: nn.Module, watch: Collection[str]) -> None:
        self._calls: list[InnerCall] = []
        self._depth = 0
        for name in watch:
            watched = module.get_submodule(name)
            watched.register_forward_pre_hook(self._enter(name), with_kwargs=True)
            watched.register_forward_hook(self._leave)

    def take(self) -> list[InnerCall]:
        """The calls since the last time."""
        calls, self._calls = self._calls, []
        return calls

    def _enter(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._depth:
                entry = [get_dims(x) for x in tensors_in((args, kwargs))]
                self._calls.append(InnerCall(name, [(args, kwargs)], entry))
            self._depth += 1

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        for x in tensors_in(output):
            dims = tuple(tuple(Axis(axis.size, axis.batch) for axis in dim) for dim in get_dims(x))
            for new, old in zip(_axes(dims), _axes(get_dims(x)), strict=True):
                new.sources = old.sources | {new}
            set_dims(x, dims)
            self._calls[-1].exits.append(dims)


def _axes(dims: Dims) -> list[Axis]:
    return [axis for dim in dims for axis in dim]


def _paired(calls: list[InnerCall], others: list[InnerCall]) -> list[InnerCall]:
    """The calls of both runs as one."""
    names = [[call.name for call in run] for run in (calls, others)]
    if names[0] != names[1]:
        raise LayoutError(
            f"The model calls other modules for {BATCH_SIZES[0]} samples than for {BATCH_SIZES[1]}: {names[0]} and "
            f"{names[1]}."
        )
    for call, other in zip(calls, others, strict=True):
        call.given.extend(other.given)
    return calls


def _run(
    graph: fx.Graph, module: nn.Module, inputs: Mapping[str, Any], step: Callable[[fx.Node, Callable[[], Any]], Any]
) -> Iterator[tuple[fx.Node, Any]]:
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: env[source])
        try:
            env[node] = step(node, lambda: call_node(node, module, inputs, args, kwargs))  # noqa: B023
        except LayoutError:
            raise
        except Exception as error:
            raise RuntimeError(f"node '{node.name}' ({node.op} {node.target}): {error}") from error
        yield node, env[node]


def call_node(node: fx.Node, module: nn.Module, inputs: Mapping[str, Any], args: Any, kwargs: Any) -> Any:
    """What a node computes.

    Args:
        node: Of a graph that was traced from `module`.
        inputs: Values of the placeholders, by name.
        args: Its arguments, nodes replaced by values; `kwargs` likewise.
    """
    args, kwargs = thaw(args), thaw(kwargs)
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


def thaw(value: Any) -> Any:
    """Arguments of a node as the generated code would make them: lists that a function may write into."""
    if isinstance(value, immutable_list):
        return [thaw(part) for part in value]
    if isinstance(value, immutable_dict):
        return {key: thaw(part) for key, part in value.items()}
    return tuple(map(thaw, value)) if type(value) is tuple else value


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


def _finalise(fact: Facts, tracker: _Tracker, channel_dim: int | None) -> None:
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
            made = not fact.data and not any(axis.batch for axis in fresh)
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
        self.seen: set[int] = set()

    def treat_as_norm(self, value: Any, sources: list[Facts]) -> None:
        """A norm keeps the channels of its input, whatever groups it has cut them into to find their statistics."""
        if self.split and isinstance(value, Tensor) and value.shape == getattr(sources[0].value, "shape", None):
            set_dims(value, sources[0].dims[0])
            self.kinds, self.split = ["norm"], set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names, arguments = _signature(func)
        arguments = {**arguments, **dict(zip(names, args, strict=False)), **kwargs}
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        kind, rule = find_rule(func)
        given = tensors_in((args, kwargs))
        before = [get_dims(x) for x in given]
        # What a layer makes of its parameters alone (a normalised weight) tells nothing of its input.
        reads_input = [dims for dims in before if any(axis.sources for dim in dims for axis in dim)]
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if rule is None:
            self.seen.update(map(id, given))
            if reads_input:
                self.unknown.append(str(func))
            for x in outputs:
                set_dims(x, tuple((Axis(size),) if size != 1 else () for size in x.shape))
            return out
        call = Call(func.overloadpacket.__name__.rstrip("_"), arguments, outputs)
        dims = rule(call) if outputs and before else []
        for x, found in zip(outputs, dims, strict=True):
            set_dims(x, found)
        kind = "make" if call.constant else kind
        if kind != "make":  # zeros_like(x) reads no value of x, only its size
            self.seen.update(map(id, given))
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


Run = tuple[nn.Module, Sequence[Mapping[str, Any]]]
"""A copy of a module, and what it takes at each of BATCH_SIZES."""


@contextlib.contextmanager
def _on_meta(root: nn.Module, example: Example) -> Iterator[Run]:
    yield meta_copy(root), example.without_data("meta")


@contextlib.contextmanager
def _on_fake(root: nn.Module, example: Example) -> Iterator[Run]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield copy_with(root, mode.from_tensor), example.without_data()


@contextlib.contextmanager
def _on_values(root: nn.Module, example: Example) -> Iterator[Run]:
    with torch.random.fork_rng(devices=[]):
        yield copy_with(root, torch.clone), example.values

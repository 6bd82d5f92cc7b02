"""Where the batch and the channels of every node of a graph are, found by running it on tensors without data.

The graph runs at two batch sizes: what differs between the runs varies with the batch. In one of them every operator's
rule (`rules.py`) says which axis of its output is which axis of its input; two sizes alone could not tell `b*k` rows
from `k*b` rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from masksurgery.axes import Axis, Dims, get_dims, set_dims
from masksurgery.example import BATCH_SIZES, Example, tensors_in
from masksurgery.kinds import is_norm
from masksurgery.running import IF_NEED_BE, WITHOUT_DATA, Shape, run_nodes, run_somehow, shapes
from masksurgery.tracker import InnerCall, Recorder, Tracker, paired
from masksurgery.types import Layout, LayoutError


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

    def collect(module: nn.Module, given: Sequence[Mapping[str, Any]]) -> dict[fx.Node, Facts]:
        return _analyse(graph, module.train(training), given, example.dims, channel_dim, watch)

    return run_somehow(root, example, IF_NEED_BE if watch else WITHOUT_DATA, collect)[0]


def _analyse(
    graph: fx.Graph,
    module: nn.Module,
    given: Sequence[Mapping[str, Any]],
    dims: Mapping[str, Sequence[Dims]],
    channel_dim: Callable[[fx.Node], int | None],
    watch: Collection[str],
) -> dict[fx.Node, Facts]:
    recorder = Recorder(module, watch)
    run = run_nodes(graph, module, given[1], lambda node, call: call())
    others = {node: (shapes(value), recorder.take()) for node, value in run}
    facts: dict[fx.Node, Facts] = {}
    tracker = Tracker()

    def track(node: fx.Node, call: Callable[[], Any]) -> Any:
        sources = [facts[source] for source in node.all_input_nodes]
        _announce(sources)
        tracker.start()
        with tracker:
            value = call()
        seen = tracker.seen | {id(x) for x in tensors_in(value)}
        reads = frozenset(s for s in node.all_input_nodes if any(id(x) in seen for x in tensors_in(facts[s].value)))
        if node.op == "call_module" and is_norm(module.get_submodule(str(node.target))):
            tracker.treat_as_norm(sources[0].value, value)
        value = _own(value, sources)
        data = any(facts[source].data for source in reads)
        other, calls = others[node]
        facts[node] = fact = Facts(value, other, data=data, reads=reads, calls=paired(recorder.take(), calls))
        if node.op == "placeholder":
            fact.data = True
            for x, known in zip(tensors_in(value), dims[str(node.target)], strict=True):
                set_dims(x, known)
        _finalise(fact, tracker, channel_dim(node))
        return value

    for _ in run_nodes(graph, module, given[0], track):
        pass
    return facts


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


def _finalise(fact: Facts, tracker: Tracker, channel_dim: int | None) -> None:
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

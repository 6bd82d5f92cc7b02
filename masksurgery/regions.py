"""A model as regions that torch.fx can follow: the model itself, and parts of what it cannot follow.

A module that cannot be traced is one opaque call in the graph of its region. The modules that it calls are regions of
their own, found by running it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_structure

from masksurgery.axes import Axis, Dims
from masksurgery.example import BATCH_SIZES, Example, tensors_in
from masksurgery.inputs import placeholder_values
from masksurgery.kinds import channel_dim_of, holds_layer, is_layer, rank_of
from masksurgery.layout import Facts, analyse
from masksurgery.opaque import Opaque
from masksurgery.tracing import Traces, opaque_traces, trace
from masksurgery.tracker import InnerCall
from masksurgery.types import LayoutError


@dataclass(eq=False)
class Region:
    """What one trace covers.

    Attributes:
        name: Qualified name of its module; empty for the model itself.
        example: What one forward of it takes.
        traces: Its graphs.
        facts: Of the graph of eval; `train_facts` of the graph of training.
        parts: The regions inside of each node that is opaque.
        exits: For every call of a part, the axes that its outputs have in the region around it.
        irregular: Modules that an opaque forward calls in several ways, and what to call the module of that forward.
        caller: What to call the module whose opaque forward calls this region.
    """

    name: str
    example: Example
    traces: Traces
    facts: dict[fx.Node, Facts]
    train_facts: dict[fx.Node, Facts]
    parts: dict[fx.Node, list[Region]] = field(default_factory=dict)
    exits: list[list[Dims]] = field(default_factory=list)
    irregular: dict[str, str] = field(default_factory=dict)
    caller: str = ""

    @property
    def is_layer(self) -> bool:
        """It is one convolution or Linear, called by an opaque forward itself: what follows it is not known."""
        return is_layer(self.traces.module) and not self.traces.opaque

    def walk(self) -> Iterator[Region]:
        """This region and all inside of it."""
        yield self
        for parts in self.parts.values():
            for part in parts:
                yield from part.walk()

    def calls(self) -> Iterator[tuple[Region, fx.Node, str]]:
        """The module calls of all regions, in the order in which they run, with the qualified name of the module."""
        if self.is_layer:
            yield self, _result(self.traces.eval), self.name
            return
        for node in self.traces.eval.nodes:
            if node.op == "call_module":
                yield self, node, self.qualified(str(node.target))
            for part in self.parts.get(node, ()):
                yield from part.calls()

    def title(self, target: str) -> str:
        """What to call an opaque module in a message."""
        if isinstance(self.traces.module.get_submodule(target), Opaque):
            return f"'{self.name}'" if self.name else "the model"
        return f"'{self.qualified(target)}'"

    def qualified(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name


def explore(
    module: nn.Module,
    example: Example,
    leaf_types: tuple[type, ...] = (),
    known: Mapping[str, Example] | None = None,
    name: str = "",
) -> Region:
    """Trace a model, and in what is opaque the modules that it calls.

    Args:
        module: A copy, which the passes may change.
        example: What one forward takes.
        leaf_types: Modules of these types are not entered.
        known: The parts and what they take, by name, where that was found out before; else the opaque modules are run
            on the example inputs to see what they call.
        name: Qualified name of the module.
    Raises:
        TraceError, LayoutError: It can be neither traced nor run.
    """
    region = _trace_and_analyse(module, example, leaf_types, name)
    root = region.traces.module
    for node, fact in region.facts.items():
        for inner, calls in _by_name(fact.calls).items():
            child, full = root.get_submodule(inner), region.qualified(inner)
            part_example = known.get(full) if known is not None else _example_of(child, calls)
            if part_example is None:
                region.irregular[full] = region.title(str(node.target))
                continue
            part = explore(child, part_example, leaf_types, known, full)
            part.caller = region.title(str(node.target))
            part.exits.extend(call.exits for call in calls)
            region.parts.setdefault(node, []).append(part)
    return region


def _trace_and_analyse(module: nn.Module, example: Example, leaf_types: tuple[type, ...], name: str) -> Region:
    traces = trace(module, example, leaf_types)
    try:
        return _analysed(name, example, traces)
    except LayoutError as error:
        # The trace may have gone a way that the model does not go: isinstance(x, Tensor) is false of a symbol.
        opaque = opaque_traces(module, example, str(error)) if traces.module is module else traces
        try:
            return _analysed(name, example, opaque)
        except LayoutError:
            raise error from error.__cause__


def _analysed(name: str, example: Example, traces: Traces) -> Region:
    root = traces.module
    watch = {inner for target in traces.opaque for inner in modules_inside(root, target)}

    def channel_dim(node: fx.Node) -> int | None:
        if is_layer(root) and node is _result(node.graph):
            return -rank_of(root)
        return channel_dim_of(root, node)

    def facts(graph: fx.Graph, training: bool) -> dict[fx.Node, Facts]:
        return analyse(graph, root, example, channel_dim, watch, training)

    eval_facts = facts(traces.eval, False)
    train_facts = eval_facts if traces.train is traces.eval else facts(traces.train, True)
    return Region(name, example, traces, eval_facts, train_facts)


def _result(graph: fx.Graph) -> fx.Node:
    """What the graph returns, if that is one node."""
    (output,) = next(iter(reversed(graph.nodes))).args
    return cast(fx.Node, output)


def modules_inside(root: nn.Module, target: str) -> list[str]:
    """Names of the layers inside of an opaque module, and of the modules that hold them."""
    module = root.get_submodule(target)
    if isinstance(module, Opaque):  # it has the children of the root
        named = {name: child for name, child in root.named_modules() if child is not root and child is not module}
    else:
        named = {f"{target}.{name}": child for name, child in module.named_modules() if name}
    return [name for name, child in named.items() if holds_layer(child)]


def _by_name(calls: Sequence[InnerCall]) -> dict[str, list[InnerCall]]:
    found: dict[str, list[InnerCall]] = {}
    for call in calls:
        found.setdefault(call.name, []).append(call)
    return found


def _example_of(module: nn.Module, calls: Sequence[InnerCall]) -> Example | None:
    """What a module takes that an opaque forward calls; None if it calls it in several ways."""
    first = calls[0]
    if any(_form(given) != _form(first.given[0]) for call in calls for given in call.given[:1]):
        return None
    signature = inspect.signature(module.forward)
    one, other = (signature.bind(*args, **kwargs) for args, kwargs in first.given)
    values = placeholder_values(one, integers=True), placeholder_values(other, integers=True)
    pairs = zip(tensors_in(first.given[0]), first.entry, tensors_in(first.given[1]), strict=True)
    axes = {id(x): _find_batch(dims, x, x_other) for x, dims, x_other in pairs}
    dims = {name: [axes[id(x)] for x in tensors_in(value)] for name, value in values[0].items()}
    return Example(one, values, dims, integers=True)


def _find_batch(dims: Dims, x: Tensor, x_other: Tensor) -> Dims:
    """The axes of an input; where no operator told of a batch, it is the dimension that has the batch size."""
    if any(axis.batch for dim in dims for axis in dim):
        return dims
    return tuple(
        (Axis(size, batch=True, sources=dim[0].sources),) if (size, other) == BATCH_SIZES else dim
        for dim, size, other in zip(dims, x.shape, x_other.shape, strict=True)
    )


def _form(given: Any) -> Any:
    """The structure of arguments, the shapes of tensors in them, and everything else."""
    leaves = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(given)]
    return tree_structure(given), leaves

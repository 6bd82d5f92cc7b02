"""The passes that change a graph: masks, repeats as late as possible, and the head.

`plan` reads, and raises what a user can put right; `rewrite` then cannot fail for such a reason.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from masksurgery.example import BATCH_SIZES
from masksurgery.layers import Repeat
from masksurgery.layout import Facts, NodeFacts, layout_of
from masksurgery.types import LayoutError

RepeatPlan = list[Literal["scale"] | tuple[int, int] | None]


@dataclass(frozen=True)
class Mask:
    """A mask to insert: its module's name, the node it masks, and who reads the result (nobody named: everyone)."""

    name: str
    node: fx.Node
    readers: tuple[fx.Node, ...] = ()


@dataclass
class Plan:
    """What `rewrite` is to do.

    Attributes:
        masks: By the node they mask.
        dependent: The nodes that have rows for all members: a mask can reach them.
        differing: Those of them whose values differ between members, and are not made of their inputs' sizes alone.
        repeats: How to repeat each shared node that a dependent one reads.
        remade: Shared tensors made from sizes alone, to be made again from n times the batch.
        batch_dims: For each leaf of the output its batch dimension, or None.
        source: The placeholder that tells the batch size, and which leaf of it.
    """

    masks: Mapping[fx.Node, Mask]
    dependent: set[fx.Node] = field(default_factory=set)
    differing: set[fx.Node] = field(default_factory=set)
    repeats: dict[fx.Node, RepeatPlan] = field(default_factory=dict)
    remade: set[fx.Node] = field(default_factory=set)
    batch_dims: list[int | None] = field(default_factory=list)
    source: tuple[fx.Node, int] | None = None


def plan(graph: fx.Graph, facts: NodeFacts, masks: Iterable[Mask], opaque: Collection[fx.Node] = ()) -> Plan:
    """Find what differs between members, and what has to be repeated for it.

    Args:
        graph: Of the model itself.
        facts: Of its nodes.
        masks: To be inserted into it.
        opaque: Nodes with masks inside of them.
    Raises:
        LayoutError: A member-dependent tensor loses its batch dimension, an integer is not proportional to the batch
            size, or no input has a batch.
    """
    result = Plan({mask.node: mask for mask in masks})
    for node in graph.nodes:
        if node.op == "placeholder" and result.source is None and facts[node].has_batch:
            leaves = tree_leaves(facts[node].value)
            leaf = next(i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.dim())
            result.source = (node, leaf)
        if node.op == "output" or node in opaque or _is_dependent(node, facts, result):
            result.dependent.add(node)
            if node in opaque or _differs(node, facts, result):
                result.differing.add(node)
            _check(node, facts[node], result, facts)
            for source in node.all_input_nodes:
                if source not in result.dependent and not _is_masked(source, node, result, facts):
                    _plan_shared(source, facts, result)
    if result.source is None:
        raise LayoutError("No input has a batch dimension: unbatched=(...) names them all.")
    result.batch_dims = _output_batch_dims(facts[next(iter(reversed(graph.nodes)))])
    return result


def plan_part(graph: fx.Graph, facts: NodeFacts, masks: Iterable[Mask]) -> Plan:
    """The same for a part of an opaque module, whose inputs are those of all members already.

    Raises:
        LayoutError: A tensor loses its batch dimension.
    """
    result = Plan({mask.node: mask for mask in masks})
    for node in graph.nodes:
        if node.op == "output" or facts[node].varies:
            result.dependent.add(node)
        if node.op == "placeholder" and facts[node].varies:
            result.differing.add(node)
        if _is_dependent(node, facts, result):
            result.dependent.add(node)
            if _differs(node, facts, result):
                result.differing.add(node)
            _check(node, facts[node], result, facts)
    return result


def _is_masked(source: fx.Node, reader: fx.Node, plan: Plan, facts: NodeFacts) -> bool:
    mask = plan.masks.get(source)
    if mask is None or (mask.readers and reader not in mask.readers):
        return False
    return reader.op == "output" or facts[reader].has_tensor  # a size is read from the node itself


def _is_dependent(node: fx.Node, facts: NodeFacts, plan: Plan) -> bool:
    differ = [s for s in node.all_input_nodes if s in plan.dependent or _is_masked(s, node, plan, facts)]
    fact = facts[node]
    if fact.has_tensor and not fact.varies and not fact.reads.intersection(differ):
        return False  # such as scale.type_as(x), which reads no value of x
    compares = isinstance(fact.value, bool)  # two sizes, both of which must be those of all members
    return bool(differ) and (fact.has_tensor or fact.varies or compares)


def _differs(node: fx.Node, facts: NodeFacts, plan: Plan) -> bool:
    return any(s in plan.differing or _is_masked(s, node, plan, facts) for s in facts[node].reads)


def _check(node: fx.Node, fact: Facts, plan: Plan, facts: NodeFacts) -> None:
    if isinstance(fact.value, Tensor) and not fact.has_batch and not _is_loss(node, facts):
        unknown = f" (no rule for {', '.join(fact.unknown)})" if fact.unknown else ""
        raise LayoutError(
            f"node '{node.name}' differs between members, but its shape {list(fact.value.shape)} has no batch dimension"
            f"{unknown}: it mixes samples, and members would be mixed too. Mask only what comes later, with "
            f"include=[...]."
        )
    if not fact.has_tensor:
        return
    for dims in fact.dims if node in plan.differing else ():
        layout_of(dims, node.name)
    for source in node.all_input_nodes:
        _check_proportional(source, facts[source])


def _is_loss(node: fx.Node, facts: NodeFacts) -> bool:
    """A number that nothing is made of but other numbers and the model's output."""
    if node.op == "output":
        return True
    value = facts[node].value
    if isinstance(value, Tensor) and value.dim():
        return False
    return all(_is_loss(user, facts) for user in node.users)


def _check_proportional(node: fx.Node, fact: Facts) -> None:
    for one, other in zip(tree_leaves(fact.value), tree_leaves(fact.other), strict=True):
        if _is_integer(one) and one != other and one * BATCH_SIZES[1] != other * BATCH_SIZES[0]:
            raise LayoutError(
                f"the integer '{node.name}' is {one} for {BATCH_SIZES[0]} samples and {other} for {BATCH_SIZES[1]}: it "
                f"is not proportional to the batch size, so what is made of it cannot be made for all members at once. "
                f"Mask only what comes later, with include=[...]."
            )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _plan_shared(node: fx.Node, facts: NodeFacts, plan: Plan) -> None:
    """Decide how a shared node is made ready for members; nothing to do if it does not vary with the batch."""
    fact = facts[node]
    if node in plan.repeats or node in plan.remade or not fact.varies:
        return
    if fact.has_tensor and not fact.data:
        plan.remade.add(node)
        for source in node.all_input_nodes:
            _plan_shared(source, facts, plan)
        return
    _check_proportional(node, fact)
    dims = iter(fact.dims)
    repeats: RepeatPlan = []
    for one, other in zip(tree_leaves(fact.value), tree_leaves(fact.other), strict=True):
        if isinstance(one, Tensor):
            layout = layout_of(next(dims), node.name)
            if layout.batch_dim is None and tuple(one.shape) != tuple(other):
                raise LayoutError(
                    f"node '{node.name}' has the shape {list(one.shape)} for {BATCH_SIZES[0]} samples and "
                    f"{list(other)} for {BATCH_SIZES[1]}, and it is not known where its samples are"
                    f"{' (no rule for ' + ', '.join(fact.unknown) + ')' if fact.unknown else ''}. "
                    f"Mask only what comes later, with include=[...]."
                )
            repeats.append(None if layout.batch_dim is None else (layout.batch_dim, layout.outer))
        else:
            repeats.append("scale" if _is_integer(one) and one != other else None)
    plan.repeats[node] = repeats


def _output_batch_dims(fact: Facts) -> list[int | None]:
    dims = iter(fact.dims)
    found: list[int | None] = []
    for leaf in tree_leaves(fact.value):
        layout = layout_of(next(dims), "output") if isinstance(leaf, Tensor) else None
        if layout is not None and layout.outer * layout.fold != 1:
            raise LayoutError(
                f"an output of the model has {layout.outer * layout.fold} rows for each sample in dimension "
                f"{layout.batch_dim}. Return it with the batch in a dimension of its own."
            )
        found.append(layout.batch_dim if layout is not None else None)
    return found


def rewrite(graph: fx.Graph, plan: Plan, names: Mapping[str, str]) -> dict[str, nn.Module]:
    """Insert masks, repeats and the head into the graph, in place.

    Args:
        graph: The graph that was planned.
        plan: What to do.
        names: Module names for "members" and "prediction".
    Returns:
        The repeat modules to add, by name.
    """
    originals = list(graph.nodes)
    assert plan.source is not None
    with graph.inserting_after(_last_placeholder(graph)):
        members = graph.call_module(names["members"], (plan.source[0],))
    masked = {mask.node: _insert_mask(graph, mask, members, plan) for mask in plan.masks.values()}
    modules: dict[str, nn.Module] = {}
    ready: dict[fx.Node, fx.Node] = {}
    for node in originals:
        if node in plan.repeats:
            name = f"{node.name}_repeat"
            modules[name] = Repeat(plan.repeats[node])
            with graph.inserting_after(members if node.op == "placeholder" else node):
                ready[node] = graph.call_module(name, (node, members))
        elif node in plan.remade:
            with graph.inserting_after(node):
                ready[node] = graph.node_copy(node, lambda source: ready.get(source, source))
    _connect(originals, plan, masked, ready)
    for node in plan.remade:
        if not node.users:
            graph.erase_node(node)
    output = originals[-1]
    with graph.inserting_before(output):
        output.args = (graph.call_module(names["prediction"], (output.args[0], members)),)
    graph.lint()
    return modules


def rewrite_part(graph: fx.Graph, plan: Plan, follow: str) -> None:
    """Insert masks into the graph of a part, in place.

    Args:
        graph: The graph that was planned.
        plan: What to do.
        follow: Name of the module that tells the decision of the root node.
    """
    originals = list(graph.nodes)
    with graph.inserting_after(_last_placeholder(graph)):
        members = graph.call_module(follow, ())
    masked = {mask.node: _insert_mask(graph, mask, members, plan) for mask in plan.masks.values()}
    _connect(originals, plan, masked, {})
    graph.lint()


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    return [node for node in graph.nodes if node.op == "placeholder"][-1]


def _connect(
    nodes: Sequence[fx.Node], plan: Plan, masked: Mapping[fx.Node, fx.Node], ready: Mapping[fx.Node, fx.Node]
) -> None:
    """Let what differs between members read the masked and the repeated values."""
    for node in nodes:
        if node in plan.dependent:
            for source in node.all_input_nodes:
                mask = plan.masks.get(source)
                if mask and (not mask.readers or node in mask.readers) and node is not masked[source]:
                    node.replace_input_with(source, masked[source])
                elif source in ready and source not in plan.dependent:
                    node.replace_input_with(source, ready[source])


def _insert_mask(graph: fx.Graph, mask: Mask, members: fx.Node, plan: Plan) -> fx.Node:
    shared = mask.node not in plan.dependent
    with graph.inserting_after(members if mask.node.op == "placeholder" else mask.node):
        return graph.call_module(mask.name, (mask.node, members), {"expand": True} if shared else {})


def repeats_in(graph: fx.Graph, root: nn.Module) -> Sequence[fx.Node]:
    """The repeat nodes of a rewritten graph."""
    calls = [node for node in graph.nodes if node.op == "call_module"]
    return [node for node in calls if isinstance(root.get_submodule(str(node.target)), Repeat)]


def output_shapes(fact: Facts, batch_dims: Sequence[int | None]) -> list[torch.Size | None]:
    """The shape of each leaf of the output that is a floating-point tensor with a batch, else None."""
    leaves = tree_leaves(fact.value)
    return [
        x.shape if isinstance(x, Tensor) and x.is_floating_point() and d is not None else None
        for x, d in zip(leaves, batch_dims, strict=True)
    ]

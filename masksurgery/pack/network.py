"""One member of a converted model as a graph of its own, with all that packing has to know of its nodes."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from masksurgery.example import Example
from masksurgery.inputs import make_inputs
from masksurgery.kinds import channel_dim_of
from masksurgery.layers import Assignment, Members, Repeat, _Masksembles
from masksurgery.layout import Facts, analyse
from masksurgery.model import ConvertedModel
from masksurgery.opaque import Follow, Opaque
from masksurgery.pack.free import Free, find_free, grow
from masksurgery.pack.functional import make_functional
from masksurgery.part import Part
from masksurgery.running import IF_NEED_BE, WITHOUT_DATA, Way, call_node, run_shapes
from masksurgery.types import LayoutError

GROWTHS = 4
"""How often to look for free dimensions, on larger inputs each time."""


def masked(x: Tensor, name: str) -> Tensor:
    """Stands for a mask, whose values differ between members; `name` is that of its module."""
    return x * 1


class Enter(nn.Module):
    """Tells the masks inside of an opaque module which member runs, before it is called with what this returns."""

    def __init__(self, members: Members, member: int) -> None:
        super().__init__()
        self.members, self.member = members, member

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        index = torch.full((batch.shape[0],), self.member, device=batch.device)
        self.members.latest = Assignment(1, index, False)
        return x


@dataclass
class Network:
    """A member's graph.

    Attributes:
        root: Holds what the graph calls and reads. Nothing of it is shared with the converted model.
        graph: Of one member: masks are calls of `masked`, nothing is repeated, and the output is the base model's.
        facts: Of its nodes.
        free: What changes with the size of the inputs.
        masks: The mask modules by name.
        rows: The masks of all members [n, c], on the CPU.
        dependent: The nodes that differ between members.
        opaque: The calls with masks inside of them.
    """

    root: nn.Module
    graph: fx.Graph
    facts: dict[fx.Node, Facts]
    free: Free
    masks: dict[str, _Masksembles]
    rows: dict[str, Tensor]
    dependent: set[fx.Node]
    opaque: set[fx.Node]

    def module(self, node: fx.Node) -> nn.Module | None:
        """What a node calls, if that is a module."""
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def constant(self, node: fx.Node) -> Tensor | None:
        """The value of a node that is a parameter or a buffer."""
        value = operator.attrgetter(str(node.target))(self.root) if node.op == "get_attr" else None
        return value if isinstance(value, Tensor) else None

    def tensors(self, node: fx.Node) -> list[Tensor]:
        """The tensors of a node's value, without data."""
        return [leaf for leaf in tree_leaves(self.facts[node].value) if isinstance(leaf, Tensor)]

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """The users of its values; reading a size is none."""
        return [user for user in node.users if user.op == "output" or self.facts[user].has_tensor]

    def data_inputs(self, node: fx.Node) -> list[fx.Node]:
        """Its inputs that are tensors, without parameters and buffers."""
        return [n for n in node.all_input_nodes if self.facts[n].has_tensor and n.op != "get_attr"]


def member_network(model: ConvertedModel) -> Network:
    """The graph that each member of a converted model runs in eval.

    Args:
        model: It is not changed.
    """
    model = copy.deepcopy(model).eval()
    root = nn.Module()
    root._modules, root._parameters, root._buffers = dict(model._modules), dict(model._parameters), dict(model._buffers)
    root.requires_grad_(False)
    masks = {name: m for name, m in root.named_modules() if isinstance(m, _Masksembles)}
    graph, opaque = _copy_graph(model, root)
    root._modules = {name: m for name, m in root._modules.items() if name not in masks}
    root.eval()
    ways = IF_NEED_BE if any(isinstance(module, Part) for module in root.modules()) else WITHOUT_DATA
    inputs = _inputs(graph, root, model, ways)
    make_functional(graph, root, Example.of(inputs, model.settings.unbatched), ways)
    _fold_constants(graph, root)
    facts, free = _look(graph, root, inputs, model.settings.unbatched, ways)
    dependent: set[fx.Node] = set()
    for node in graph.nodes:
        if node.target is masked or node in opaque or dependent.intersection(node.all_input_nodes):
            dependent.add(node)
    decided = model.surgery.masks  # what a model without data was converted with
    rows = {name: torch.from_numpy(decided[name]) if m.masks.is_meta else m.masks.cpu() for name, m in masks.items()}
    return Network(root, graph, facts, free, masks, rows, dependent, opaque)


def _look(
    graph: fx.Graph,
    root: nn.Module,
    inputs: inspect.BoundArguments,
    unbatched: Sequence[str],
    ways: Sequence[Way],
) -> tuple[dict[fx.Node, Facts], Free]:
    """Run the graph without data, on inputs so large that no free dimension is of length 1, which says little."""
    watch = [name for name, module in root.named_modules() if isinstance(module, Part)]

    def facts_of(inputs: inspect.BoundArguments) -> dict[fx.Node, Facts]:
        return analyse(graph, root, Example.of(inputs, unbatched), lambda node: channel_dim_of(root, node), watch)

    facts = facts_of(inputs)
    for growths_left in reversed(range(GROWTHS)):
        free = find_free(graph, root, inputs, unbatched, ways)
        if free.shortest > 1 or not growths_left:
            break
        try:
            facts = facts_of(inputs := grow(inputs, free.inputs))
        except LayoutError:  # not all of them at once
            break
    return facts, free


def _inputs(graph: fx.Graph, root: nn.Module, model: ConvertedModel, ways: Sequence[Way]) -> inspect.BoundArguments:
    """What one forward takes, as the conversion recorded it; in the model's dtype if it was cast since then."""

    def bind(dtype: torch.dtype | None) -> inspect.BoundArguments:
        def cast(leaf: Any) -> Any:
            floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
            return leaf.to(dtype) if dtype is not None and floating else leaf

        signature = inspect.signature(model._base_type.forward)
        args, kwargs = tree_map(cast, make_inputs(model.inputs))
        bound = signature.bind(None, *args, **kwargs)
        return inspect.BoundArguments(signature, dict(list(bound.arguments.items())[1:]))  # type: ignore[arg-type]

    try:
        run_shapes(graph, root, Example.of(recorded := bind(None), model.settings.unbatched), ways)
    except LayoutError:
        return bind(_dtype(root))
    return recorded


def _dtype(root: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in root.parameters() if p.is_floating_point()), None)


def _copy_graph(model: ConvertedModel, root: nn.Module) -> tuple[fx.Graph, set[fx.Node]]:
    """The eval graph without what serves all members at once."""
    graph, opaque = fx.Graph(), set()
    env: dict[fx.Node, Any] = {}
    members = model.members_module
    first = next(node for node in model._graphs[False].nodes if node.op == "placeholder")
    for node in model._graphs[False].nodes:
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, Members):
            first = node.args[0]
        elif isinstance(module, Repeat) or module is model.head_module:
            env[node] = _translate(node.args[0], env)
        elif isinstance(module, _Masksembles):
            env[node] = graph.call_function(masked, (env[node.args[0]], node.target))
        else:
            env[node] = graph.node_copy(node, lambda source: env[source])
            if module is not None and any(isinstance(m, (Opaque, Follow)) for m in module.modules()):
                opaque.add(env[node])
    if opaque:
        root.add_module("enter", Enter(members, 0))
        for node in opaque:
            with graph.inserting_before(node):
                x = node.all_input_nodes[0]
                node.replace_input_with(x, graph.call_module("enter", (x, _batch_of(graph, env[first], members))))
    return graph, opaque


def _batch_of(graph: fx.Graph, placeholder: fx.Node, members: Members) -> fx.Node:
    """The tensor in an input that tells the batch size."""
    return graph.call_function(_leaf, (placeholder, members.leaf))


def _leaf(value: Any, leaf: int) -> Tensor:
    return value if isinstance(value, Tensor) else cast(Tensor, tree_leaves(value)[leaf])


def _translate(value: Any, env: dict[fx.Node, Any]) -> Any:
    return fx.map_arg(value, lambda source: env[source])


# --- what is the same for every input --------------------------------------------------------------------------------


def _fold_constants(graph: fx.Graph, root: nn.Module) -> None:
    """Make buffers of what is computed from parameters alone, such as a bias that is looked up in a table."""
    values: dict[fx.Node, Any] = {}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for node in graph.nodes:
            if node.op in ("placeholder", "output") or any(source not in values for source in node.all_input_nodes):
                continue
            run = [_run(node, root, values) for _ in range(2)]
            if _alike(*run):  # else it is drawn
                values[node] = run[0]
    names = _unused_names(root, "constant")
    for node in list(graph.nodes):
        computed = node in values and node.op != "get_attr" and isinstance(values[node], Tensor)
        if computed and any(user not in values for user in node.users):
            name = next(names)
            root.register_buffer(name, values[node].detach().clone())
            with graph.inserting_before(node):
                node.replace_all_uses_with(graph.get_attr(name))
    for node in reversed(list(graph.nodes)):
        if node in values and not node.users and any(isinstance(x, Tensor) for x in tree_leaves(values[node])):
            graph.erase_node(node)


def _run(node: fx.Node, root: nn.Module, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: values[source])
    return call_node(node, root, {}, args, kwargs)


def _alike(one: Any, other: Any) -> bool:
    pairs = list(zip(tree_leaves(one), tree_leaves(other), strict=True))
    return all(a.is_meta or torch.equal(a, b) if isinstance(a, Tensor) else a is b or bool(a == b) for a, b in pairs)


def _unused_names(root: nn.Module, stem: str) -> Iterator[str]:
    k = 0
    while True:
        if not hasattr(root, f"{stem}_{k}"):
            yield f"{stem}_{k}"
        k += 1

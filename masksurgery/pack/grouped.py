"""Members side by side: one graph for all of them, whose weights are stacked and whose operations are batched.

Masks have equally many ones, so members that are cut alike have weights of one shape. torch.vmap over the stacked
weights makes groups of convolutions and batches of matrix products.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from masksurgery.pack.member import Member
from masksurgery.pack.single import MemberGraph
from masksurgery.pack.sliced import Sliced
from masksurgery.pack.slicing import Slicer
from masksurgery.types import ConfigError


class Grouped(nn.Module):
    """All members at once.

    Args:
        member: The graph of one, whose parameters and buffers have those of all members stacked [n, ...].
        batch_dims: The batch dimension of each leaf of its output; None where it has none.
    Shape:
        Returns what the member returns, with [n*b, ...] for [b, ...], member after member.
    """

    def __init__(self, member: MemberGraph, batch_dims: Sequence[int | None]) -> None:
        super().__init__()
        self.member, self.batch_dims = member, tuple(batch_dims)

    def forward(self, *inputs: Any) -> Any:
        stacked = _state(self.member)
        rest: list[Any] = []

        def run(state: dict[str, Tensor]) -> tuple[Tensor, ...]:
            leaves, spec = tree_flatten(functional_call(self.member, state, inputs))
            rest[:] = [[_TENSOR if isinstance(x, Tensor) else x for x in leaves], spec]
            return tuple(x for x in leaves if isinstance(x, Tensor))

        tensors = iter(torch.vmap(run)(stacked))
        others, spec = rest
        leaves = [next(tensors) if x is _TENSOR else x for x in others]
        found = [_side_by_side(x, dim) for x, dim in zip(leaves, self.batch_dims, strict=True)]
        return tree_unflatten(found, spec)

    def one(self, i: int) -> MemberGraph:
        """The graph of one member, with weights of its own."""
        graph = copy.deepcopy(self.member)
        for name, x in _state(self.member).items():
            _replace(graph, name, x[i].clone())
        return graph


_TENSOR = object()


def _side_by_side(x: Any, batch_dim: int | None) -> Any:
    if not isinstance(x, Tensor):
        return x
    if batch_dim is None:
        return x.mean(0) if x.is_floating_point() and x.dim() == 1 else x[0]
    return x.movedim(0, batch_dim).flatten(batch_dim, batch_dim + 1)


def build_grouped(
    members: Sequence[Member], sliced: Sliced, shared: dict[fx.Node, Any], batch_dims: Sequence[int | None]
) -> fx.Node:
    """Add a call of all members to the graph that holds what they share.

    Raises:
        ConfigError: The members differ in more than in their numbers.
    """
    if members[0].net.opaque:
        raise ConfigError(f"{_CANNOT} a part of it cannot be traced, and runs one member at a time. {_INSTEAD}")
    built = [_build_one(member) for member in members]
    first, inputs = built[0]
    for other, _ in built[1:]:
        _check_alike(first, other)
    sliced.barriers.update(first.barriers)
    for i, (other, _) in enumerate(built):
        sliced.channels.update({f"members.{i}.{name}": channels for name, channels in other.channels.items()})
    graph = MemberGraph(first.root, first.graph)
    states = [_state(other.root) for other, _ in built]
    for name in states[0]:
        _replace(graph, name, torch.stack([state[name] for state in states]))
    arguments = tuple(shared[node] for node in inputs)
    return sliced.call("members", Grouped(graph, batch_dims), *arguments)


_CANNOT = 'layout="grouped" is not possible for this model:'
_INSTEAD = 'Pass layout="unrolled".'


class _Shared(dict[fx.Node, Any]):
    """Placeholders for what the members share, made when it is asked for."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__()
        self.graph = graph

    def __missing__(self, node: fx.Node) -> fx.Node:
        last = next((n for n in reversed(self.graph.nodes) if n.op == "placeholder"), None)
        with self.graph.inserting_after(last) if last else self.graph.inserting_before(self.graph._root.next):
            self[node] = self.graph.placeholder(node.name)
        return self[node]


def _build_one(member: Member) -> tuple[Sliced, list[fx.Node]]:
    """One member's graph, and the shared nodes that are its inputs."""
    sliced = Sliced()
    shared = _Shared(sliced.graph)
    slicer = Slicer(member, sliced, shared, dense=True, prefix="")
    sliced.graph.output(slicer.run())
    sliced.sweep()
    sliced.graph.lint()
    return sliced, list(shared)


def _check_alike(one: Sliced, other: Sliced) -> None:
    nodes = list(one.graph.nodes), list(other.graph.nodes)
    for a, b in zip(*nodes, strict=False):
        same = (a.op, a.name, str(a.args), str(a.kwargs)) == (b.op, b.name, str(b.args), str(b.kwargs))
        if not same or (isinstance(a.target, str) and a.target != b.target):
            raise ConfigError(f"{_CANNOT} its members differ at '{a.name}' and '{b.name}'. {_INSTEAD}")
    shapes = [{name: x.shape for name, x in _state(sliced.root).items()} for sliced in (one, other)]
    differ = [name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]
    if differ or len(nodes[0]) != len(nodes[1]):
        raise ConfigError(f"{_CANNOT} its members differ in the size of '{min(differ, default='')}'. {_INSTEAD}")


def _state(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, those too that are not saved."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, last = name.rpartition(".")
    owner = module.get_submodule(path)
    if last in owner._parameters:
        owner._parameters[last] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[last] = value

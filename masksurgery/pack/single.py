"""A graph with its modules that survives copying and pickling, and one member of a packed model as such a one."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn

from masksurgery.graphs import TwoGraphs


class MemberGraph(TwoGraphs):
    """One member: a GraphModule for eval, of torch's own modules and the few of `masksurgery.pack.parts`."""

    def __init__(self, root: nn.Module, graph: fx.Graph, name: str = "Member") -> None:
        super().__init__(nn.Module(), fx.Graph(), name)
        self._take_over(root)
        self._set_graphs(graph, graph)
        self.eval()

    def _bases(self) -> tuple[type, ...]:
        return (MemberGraph,)


def extract(root: nn.Module, graph: fx.Graph, output: Any, name: str) -> MemberGraph:
    """The part of a graph that computes an output, with copies of what it calls.

    Args:
        root: What the graph calls and reads.
        graph: All of its placeholders are kept.
        output: A node of it, or a tree of them.
    """
    needed: set[fx.Node] = set()
    stack = [*_nodes(output)]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    own = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    holder = nn.Module()
    for node in graph.nodes:
        if node in needed or node.op == "placeholder":
            env[node] = own.node_copy(node, lambda n: env[n])
            if node.op in ("call_module", "get_attr"):
                _share(root, str(node.target), holder)
    own.output(fx.map_arg(output, lambda n: env[n]))
    own.lint()
    return copy.deepcopy(MemberGraph(holder, own, name))


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def _share(root: nn.Module, target: str, holder: nn.Module) -> None:
    """Put a module, a parameter or a buffer of `root` under the same name into another."""
    *path, last = target.split(".")
    for part in path:
        root = root.get_submodule(part)
        if part not in holder._modules:
            holder.add_module(part, nn.Module())
        holder = holder.get_submodule(part)
    for kind in ("_modules", "_parameters", "_buffers"):
        if last in vars(root)[kind]:
            vars(holder)[kind][last] = vars(root)[kind][last]

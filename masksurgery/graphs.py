"""A GraphModule with one graph for each mode, which survives copying and pickling."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import fx, nn
from torch.fx.node import map_aggregate

from masksurgery.copying import copy_computed

MODULE_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_OF_THE_GRAPH = ("_graph", "_code", "_lineno_map", "_prologue_start", "_graphs")

Self = TypeVar("Self", bound="TwoGraphs")


class TwoGraphs(fx.GraphModule):
    """Runs the graph of its mode; `train()` chooses."""

    _graphs: dict[bool, fx.Graph]

    def _take_over(self, source: nn.Module) -> None:
        """The children, parameters, buffers and public attributes of a module, under the same names."""
        # Unused modules, tied names and non-persistent buffers come along, which GraphModule itself would leave behind.
        for name in MODULE_STATE:
            self.__dict__[name] = source.__dict__[name]
        reserved = {*dir(fx.GraphModule), *dir(type(self))}
        for name, value in vars(source).items():
            if not name.startswith("_") and name not in reserved and name not in self.__dict__:
                self.__dict__[name] = value
        self.training = source.training

    def _set_graphs(self, eval_graph: fx.Graph, train_graph: fx.Graph) -> None:
        self._graphs = {False: eval_graph, True: train_graph}
        self.graph = self._graphs[self.training]

    def train(self: Self, mode: bool = True) -> Self:
        """Switch the mode, and to the graph that was traced in it."""
        super().train(mode)
        if self.graph is not self._graphs[mode]:
            self.graph = self._graphs[mode]
        return self

    def _state(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in _OF_THE_GRAPH}
        differ = self._graphs[True] is not self._graphs[False]
        return {
            **state,
            "_graphs": [_list_nodes(self._graphs[mode]) for mode in ((False, True) if differ else (False,))],
        }

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        memo.update(copy_computed(self))
        return cast(Self, _restore(copy.deepcopy(self._state(), memo), self._bases(), type(self).__name__))

    def __copy__(self: Self) -> Self:
        state = self._state()
        for name in MODULE_STATE:
            state[name] = copy.copy(state[name])
        return cast(Self, _restore(state, self._bases(), type(self).__name__))

    def __reduce__(self) -> Any:
        return _restore, (self._state(), self._bases(), type(self).__name__)

    def _bases(self) -> tuple[type, ...]:
        """The classes that an instance is one of."""
        raise NotImplementedError


def make_empty(bases: tuple[type, ...], name: str) -> Any:
    """An instance without state of several classes, the first of them a TwoGraphs."""
    kind: Any = bases[0] if len(bases) == 1 else type(name, bases, {})
    model = kind.__new__(kind)
    type(model).__name__ = name  # every GraphModule has a class of its own
    return model


def _restore(state: dict[str, Any], bases: tuple[type, ...], name: str) -> Any:
    model = make_empty(bases, name)
    graphs = [_make_graph(nodes) for nodes in state.pop("_graphs")]
    model.__dict__.update(state)
    model._set_graphs(graphs[0], graphs[-1])
    return model


@dataclass(frozen=True)
class _Reference:
    """A node, by its name."""

    name: str


def _list_nodes(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """The nodes one after another: pickling a graph itself recurses from node to node, and ends at a few hundred."""
    refer = cast(Any, lambda node: _Reference(node.name))
    return [
        (node.op, node.target, *cast(Any, fx.map_arg((node.args, node.kwargs), refer)), node.name)
        for node in graph.nodes
    ]


def _make_graph(nodes: list[tuple[Any, ...]]) -> fx.Graph:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for op, target, args, kwargs, name in nodes:
        args, kwargs = map_aggregate((args, kwargs), lambda a: made[a.name] if isinstance(a, _Reference) else a)
        made[name] = graph.create_node(op, target, args, kwargs, name)
    return graph

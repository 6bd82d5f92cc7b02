"""A GraphModule with one graph for each mode, which survives copying and pickling."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import fx, nn
from torch.fx.node import map_aggregate

from masksurgery.copying import copy_computed

MODULE_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_GENERATED = ("_graph", "_code", "_lineno_map", "_prologue_start")
_OF_THE_GRAPHS = (*_GENERATED, "_graphs", "_generated")

Self = TypeVar("Self", bound="TwoGraphs")


class TwoGraphs(fx.GraphModule):
    """Runs the graph of its mode; `graph` and `code` show it.

    Where the graphs differ, `forward` looks up the mode at each call. What has kept `forward`, as Accelerate's mixed
    precision does, goes along with `train()` and `eval()` too.
    """

    _graphs: Mapping[bool, fx.Graph] = {}
    _generated: dict[bool, dict[str, Any]]
    _forward_in_eval: Callable[..., Any]
    _forward_in_training: Callable[..., Any]

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
        eval_graph.owning_module = train_graph.owning_module = self
        self.graph = self._graphs[self.training]

    def recompile(self) -> Any:
        """Generate the code of both graphs. A graph that was assigned takes the place of the one of this mode."""
        if self._graph not in self._graphs.values():
            graphs, new = self._graphs, self._graph
            kept = {mode: graph for mode, graph in graphs.items() if graph is not graphs[self.training]}
            self._graphs = {False: new, True: new, **kept}
        if self._graphs[False] is self._graphs[True]:
            self._generated = {}
            return super().recompile()
        kind: Any = type(self)
        codes, self._generated = {}, {}
        for mode, name in ((False, "_forward_in_eval"), (True, "_forward_in_training")):
            self._graph = self._graphs[mode]
            codes[mode] = super().recompile()
            setattr(kind, name, kind.forward)
            self._generated[mode] = {key: vars(self)[key] for key in _GENERATED if key in vars(self)}
        self._graph = _choosing_graph(self._graphs[False])
        super().recompile()
        self._show_mode()
        return codes[self.training]

    @property
    def _forward_of_mode(self) -> Callable[..., Any]:
        return self._forward_in_training if self.training else self._forward_in_eval

    def _show_mode(self) -> None:
        vars(self).update(self._generated.get(self.training, {}))

    def train(self: Self, mode: bool = True) -> Self:
        """Switch the mode, and with it the graph."""
        super().train(mode)
        self._show_mode()
        return self

    def _recipe(self) -> tuple[Any, ...]:
        """What `_make` takes."""
        differ = self._graphs[True] is not self._graphs[False]
        modes = (False, True) if differ else (False,)
        return self._bases(), type(self).__name__, [_list_nodes(self._graphs[mode]) for mode in modes]

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in _OF_THE_GRAPHS}
        if getattr(state.get("forward"), "__func__", None) is type(self).forward:
            del state["forward"]  # Accelerate puts it there when it unwraps a model; a copy has one of its own
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._show_mode()

    def __reduce__(self) -> Any:
        return _make, self._recipe(), self.__getstate__()

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        memo.update(copy_computed(self))
        bases, name, graphs = self._recipe()
        memo[id(self)] = twin = _make(bases, name, copy.deepcopy(graphs, memo))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))  # which may refer to the model: a wrapped forward
        return cast(Self, twin)

    def __copy__(self: Self) -> Self:
        state = self.__getstate__()
        for name in MODULE_STATE:
            state[name] = copy.copy(state[name])
        twin = _make(*self._recipe())
        twin.__setstate__(state)
        return cast(Self, twin)

    def _bases(self) -> tuple[type, ...]:
        """The classes that an instance is one of."""
        raise NotImplementedError


def make_empty(bases: tuple[type, ...], name: str) -> Any:
    """An instance without state of several classes, the first of them a TwoGraphs."""
    kind: Any = bases[0] if len(bases) == 1 else type(name, bases, {})
    model = kind.__new__(kind)
    type(model).__name__ = name  # every GraphModule has a class of its own
    return model


def _make(bases: tuple[type, ...], name: str, graphs: list[list[tuple[Any, ...]]]) -> Any:
    """An instance with graphs, and without state."""
    model = make_empty(bases, name)
    vars(model).update(vars(nn.Module()), training=False)
    made = [_make_graph(nodes) for nodes in graphs]
    model._set_graphs(made[0], made[-1])
    return model


def _choosing_graph(graph: fx.Graph) -> fx.Graph:
    """A graph with the same inputs, that calls the forward of the mode."""
    choosing = fx.Graph()
    inputs = [choosing.node_copy(node) for node in graph.nodes if node.op == "placeholder"]
    forward = choosing.get_attr("_forward_of_mode")
    choosing.output(choosing.call_function(_call, (forward, *inputs)))
    return choosing


def _call(forward: Callable[..., Any], *inputs: Any) -> Any:
    return forward(*inputs)  # operator.call is new in Python 3.11


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

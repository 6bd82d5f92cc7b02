"""ConvertedModel: a GraphModule that keeps what a base model knows of itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import fx, nn
from torch.fx.node import map_aggregate

from masksurgery.copying import copy_computed
from masksurgery.layers import Members
from masksurgery.prediction import Head, Prediction
from masksurgery.tracing import Traces
from masksurgery.types import ConfigError, ConvertConfig, Surgery

OUTPUTS = ("prediction", *Prediction._fields)
ANSWERS = ("no_weight_decay", "group_matcher")
_MODULE_STATE = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_OF_THE_GRAPH = ("_graph", "_code", "_lineno_map", "_prologue_start", "_graphs")

Self = TypeVar("Self", bound="ConvertedModel")


class ConvertedModel(fx.GraphModule):
    """The base model with masks, repeats and an aggregation head; `print(model.code)` shows them.

    In eval it returns a `Prediction` (or what `output` says), in training what the base model returned. Parameters and
    buffers keep the base model's names and order; the masks come after them.

    Attributes:
        surgery: What the conversion did.
        config: Its settings.
        inputs: The example inputs, as `describe_inputs` writes them.
        recipe: How the base model is made again, for `save`; None if only the caller knows.
    """

    surgery: Surgery
    config: ConvertConfig
    inputs: dict[str, Any]
    recipe: dict[str, Any] | None

    def __init__(
        self,
        base: nn.Module,
        traces: Traces,
        modules: Mapping[str, nn.Module],
        surgery: Surgery,
        config: ConvertConfig,
        names: Mapping[str, str],
        inputs: Mapping[str, Any],
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), type(base).__name__)
        source = traces.module
        _check_names(source)
        # Unused modules, tied names and non-persistent buffers come along, which GraphModule itself would leave behind.
        for name in _MODULE_STATE:
            self.__dict__[name] = source.__dict__[name]
        reserved = {*dir(fx.GraphModule), *dir(ConvertedModel)}
        for name, value in vars(source).items():
            if not name.startswith("_") and name not in reserved and name not in self.__dict__:
                self.__dict__[name] = value
        for name, module in modules.items():
            self.add_module(name, module.train(base.training))
        self.training = base.training
        self.surgery, self.config, self.inputs, self.recipe = surgery, config, dict(inputs), None
        self._names, self._base_type = dict(names), type(base)
        self._set_graphs(traces.eval, traces.train)

    def _set_graphs(self, eval_graph: fx.Graph, train_graph: fx.Graph) -> None:
        self._graphs = {False: eval_graph, True: train_graph}
        self.graph = self._graphs[self.training]
        for name in ANSWERS:  # GraphModule gives every instance a class of its own
            if hasattr(self._base_type, name):
                setattr(type(self), name, getattr(self._base_type, name))

    def train(self: Self, mode: bool = True) -> Self:
        """Switch the mode, and to the graph that was traced in it."""
        super().train(mode)
        if self.graph is not self._graphs[mode]:
            self.graph = self._graphs[mode]
        return self

    @property
    def members_module(self) -> Members:
        """The module that assigns samples to members; set its `fixed` for an assignment of your own."""
        return cast(Members, self._modules[self._names["members"]])

    @property
    def output(self) -> Any:
        """What eval returns: "prediction", or the name of one of its fields, such as "logits" or "mean".

        With "logits" (for regression the mean) a validation loop that calls `criterion(model(x), y)` runs unchanged.
        """
        if "output" in self._modules:  # the base model has a child of this name, and the graph calls it
            return self._modules["output"]
        return self.head_module.output

    @output.setter
    def output(self, value: str) -> None:
        if value not in OUTPUTS:
            raise ConfigError(f"output={value!r} is not one of {', '.join(map(repr, OUTPUTS))}.")
        if (
            value not in ("prediction", "logits", "mean", "variance", "members")
            and "regression" in self.head_module.tasks
        ):
            raise ConfigError(f'output={value!r} is not a field of a regression. Pass "mean", "variance" or "members".')
        self.head_module.output = value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "output":  # nn.Module would take a property's value for a child where there is one of this name
            type(self).output.fset(self, value)  # type: ignore[attr-defined]
        else:
            super().__setattr__(name, value)

    @property
    def head_module(self) -> Head:
        """The module that aggregates the members' outputs."""
        return cast(Head, self._modules[self._names["prediction"]])

    def _state(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in _OF_THE_GRAPH}
        differ = self._graphs[True] is not self._graphs[False]
        return {
            **state,
            "_graphs": [_list_nodes(self._graphs[mode]) for mode in ((False, True) if differ else (False,))],
        }

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        memo.update(copy_computed(self))
        return _restore(copy.deepcopy(self._state(), memo), type(self).__name__)

    def __copy__(self: Self) -> Self:
        state = self._state()
        for name in _MODULE_STATE:
            state[name] = copy.copy(state[name])
        return _restore(state, type(self).__name__)

    def __reduce__(self) -> Any:
        return _restore, (self._state(), type(self).__name__)


def _restore(state: dict[str, Any], name: str) -> Any:
    model = ConvertedModel.__new__(ConvertedModel)
    graphs = [_make_graph(nodes) for nodes in state.pop("_graphs")]
    model.__dict__.update(state)
    type(model).__name__ = name
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


def _check_names(source: nn.Module) -> None:
    reserved = ({*dir(fx.GraphModule), *dir(ConvertedModel)} - set(dir(nn.Module))) - {"output"}
    clash = sorted(reserved & {*source._modules, *source._parameters, *source._buffers})
    if clash:
        raise ConfigError(
            f"{type(source).__name__} has a child named '{clash[0]}', which the converted model needs itself. "
            f"Rename it, or put the model into a torch.nn.Sequential."
        )

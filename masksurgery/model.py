"""ConvertedModel: a GraphModule that keeps what a base model knows of itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, fx, nn

from masksurgery.example import Example
from masksurgery.graphs import TwoGraphs
from masksurgery.layers import Members
from masksurgery.prediction import Head, Prediction
from masksurgery.tracing import Traces
from masksurgery.types import ConfigError, ConvertConfig, Surgery, TraceError

OUTPUTS = ("prediction", *Prediction._fields)
ANSWERS = ("no_weight_decay", "group_matcher")


class ConvertedModel(TwoGraphs):
    """The base model with masks, repeats and an aggregation head; `print(model.code)` shows them.

    In eval it returns a `Prediction` (or what `output` says), in training what the base model returned. Parameters and
    buffers keep the base model's names and order; the masks come after them.

    Attributes:
        surgery: What the conversion did.
        settings: Those of `convert`. (`config` is the base model's, where it has one.)
        inputs: The example inputs, as `describe_inputs` writes them.
        parts: What the modules take that have a graph of their own, inside of what cannot be traced.
        recipe: How the base model is made again, for `save`; None if only the caller knows.
    """

    surgery: Surgery
    settings: ConvertConfig
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
        parts: Mapping[str, Example],
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), type(base).__name__)
        source = traces.module
        _check_names(source)
        self._take_over(source)
        for name, module in modules.items():
            self.add_module(name, module.train(base.training))
        self.training = base.training
        self.surgery, self.settings, self.inputs, self.recipe = surgery, config, dict(inputs), None
        self.parts = dict(parts)
        self._names, self._base_type = dict(names), type(base)
        self._set_graphs(traces.eval, traces.train)

        self._takes = tuple(node.target for node in traces.eval.nodes if node.op == "placeholder")
        self._answer()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._answer()

    def _answer(self) -> None:
        for name in ANSWERS:  # GraphModule gives every instance a class of its own
            if hasattr(self._base_type, name):
                setattr(type(self), name, getattr(self._base_type, name))

    def _bases(self) -> tuple[type, ...]:
        return (ConvertedModel,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(name not in self._takes for name in kwargs):
            kwargs = self._without_constants(kwargs)
        return super().__call__(*args, **kwargs)

    def _without_constants(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword inputs without those that the conversion has made constants, once these are found unchanged."""
        signature = inspect.signature(self._base_type.forward)
        bound = signature.bind(self, *self.inputs["args"], **self.inputs["kwargs"]).arguments
        rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")
        known = {**bound, **bound.get(rest, {})}
        for name, value in kwargs.items():
            if name not in self._takes and (isinstance(value, Tensor) or value != known.get(name)):
                raise TraceError(
                    f"{name}={type(value).__name__ if isinstance(value, Tensor) else repr(value)}: the model was "
                    f"converted with {name}={known.get(name)!r}, which is fixed since then; its inputs are "
                    f"{', '.join(self._takes)}. Convert the base model again, with {name} among the example_inputs."
                )
        return {name: value for name, value in kwargs.items() if name in self._takes}

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


@contextmanager
def whole_output(model: nn.Module) -> Iterator[None]:
    """A converted model returns its predictions inside, whatever it is set to; another model stays as it is."""
    if not isinstance(model, ConvertedModel):
        yield
        return
    before, model.output = model.output, "prediction"
    try:
        yield
    finally:
        model.output = before


def _check_names(source: nn.Module) -> None:
    reserved = ({*dir(fx.GraphModule), *dir(ConvertedModel)} - set(dir(nn.Module))) - {"output"}
    clash = sorted(reserved & {*source._modules, *source._parameters, *source._buffers})
    if clash:
        raise ConfigError(
            f"{type(source).__name__} has a child named '{clash[0]}', which the converted model needs itself. "
            f"Rename it, or put the model into a torch.nn.Sequential."
        )

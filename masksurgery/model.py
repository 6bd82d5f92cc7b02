"""ConvertedModel: a GraphModule that keeps what a base model knows of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import fx, nn

from masksurgery.ensemble import SHARED, Ensemble
from masksurgery.example import Example
from masksurgery.layers import Members
from masksurgery.tracing import Traces
from masksurgery.types import ConfigError, ConvertConfig, Surgery

ANSWERS = ("no_weight_decay", "group_matcher")


class ConvertedModel(Ensemble):
    """The base model with masks, repeats and an aggregation head; `print(model.code)` shows them.

    In eval it returns a `Prediction` (or what `output` says), in training what the base model returned. Parameters and
    buffers keep the base model's names and order; the masks come after them.
    """

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
        self._set_graphs(traces.eval, traces.train)
        self._record(surgery, config, inputs, parts, names, type(base))
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

    @property
    def members_module(self) -> Members:
        """The module that assigns samples to members; set its `fixed` for an assignment of your own."""
        return cast(Members, self._modules[self._names["members"]])


def refuse_packed(model: nn.Module, name: str) -> None:
    """Raise a ConfigError if the masks of an ensemble are cut out of its weights, where `name` needs them."""
    if isinstance(model, Ensemble) and not isinstance(model, ConvertedModel):
        raise ConfigError(
            f"{name}: this {type(model).__name__} is packed: what its masks hide is cut out of the weights. Pass the "
            f"converted model that it was packed from."
        )


def _check_names(source: nn.Module) -> None:
    reserved = ({*dir(fx.GraphModule), *dir(ConvertedModel)} - set(dir(nn.Module))) - {*SHARED}
    clash = sorted(reserved & {*source._modules, *source._parameters, *source._buffers})
    if clash:
        raise ConfigError(
            f"{type(source).__name__} has a child named '{clash[0]}', which the converted model needs itself. "
            f"Rename it, or put the model into a torch.nn.Sequential."
        )

"""What a converted and a packed model share: a record of the surgery, and a head that makes a prediction of members."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from masksurgery.example import Example, resize_batch
from masksurgery.graphs import TwoGraphs
from masksurgery.inputs import make_inputs, placeholder_values
from masksurgery.prediction import Head, Prediction, RegressionPrediction, batch_first, check_temperature
from masksurgery.scores import Threshold
from masksurgery.types import ConfigError, ConvertConfig, Surgery, TraceError

OUTPUTS = ("prediction", *Prediction._fields)

SHARED = ("output", "temperature", "threshold")
"""Properties that give way to a child of the base model of the same name, which the graph reads by it."""


class Ensemble(TwoGraphs):
    """A model of several members, which in eval returns a `Prediction` (or what `output` says).

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
    parts: dict[str, Example]
    recipe: dict[str, Any] | None
    _names: dict[str, str]
    _base_type: type[nn.Module]
    _takes: tuple[Any, ...]
    _threshold: Threshold | None = None

    def _record(
        self,
        surgery: Surgery,
        settings: ConvertConfig,
        inputs: Mapping[str, Any],
        parts: Mapping[str, Example],
        names: Mapping[str, str],
        base_type: type[nn.Module],
    ) -> None:
        """Keep what is known of the conversion; once the graphs are set.

        Args:
            names: Of the modules that the conversion inserted, by their purpose; "prediction" is the head.
        """
        self.surgery, self.settings, self.inputs, self.recipe = surgery, settings, dict(inputs), None
        self.parts = dict(parts)
        self._names, self._base_type = dict(names), base_type
        self._takes = tuple(node.target for node in self._graphs[False].nodes if node.op == "placeholder")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(name not in self._takes for name in kwargs):
            kwargs = self._without_constants(kwargs)
        return super().__call__(*args, **kwargs)

    def _without_constants(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword inputs without those that the conversion has made constants, once these are found unchanged."""
        signature = _signature(self)
        bound = signature.bind(*self.inputs["args"], **self.inputs["kwargs"]).arguments
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
    def output(self) -> Any:
        """What eval returns: "prediction", or the name of one of its fields, such as "logits" or "mean".

        With "logits" (for regression the mean) a validation loop that calls `criterion(model(x), y)` runs unchanged.
        """
        return self._child("output", self.head_module.output)

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

    @property
    def temperature(self) -> Any:
        """What the members' logits are divided by; of a regression the factor of the standard deviation. 1.0 is none.

        A float, above 0. It is fitted to the weights: after further training it has to be fitted again.
        """
        return self._child("temperature", self.head_module.temperature)

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.head_module.temperature = check_temperature(value)

    @property
    def threshold(self) -> Any:
        """The `Threshold` from which on a prediction counts as unsure; None if none was fitted."""
        return self._child("threshold", self._threshold)

    @threshold.setter
    def threshold(self, value: Threshold | None) -> None:
        if not isinstance(value, (Threshold, type(None))):
            raise ConfigError(f"threshold={value!r} is not a masksurgery.scores.Threshold, nor None.")
        if value is not None:
            value.check_task("regression" if set(self.head_module.tasks) == {"regression"} else self.settings.task)
        self._threshold = value

    def unsure(self, p: Prediction | RegressionPrediction) -> Tensor:
        """Which samples get no answer, by the threshold.

        Args:
            p: What the model returned in eval for b samples; of several outputs the one that is the answer.
        Returns:
            Boolean [b].
        Raises:
            ConfigError: The model has no threshold, its score is none of a regression, or `p` is no prediction.
        """
        if self._threshold is None:
            raise ConfigError(
                "The model has no threshold to be unsure by. Fit one with masksurgery evaluate --coverage or --risk, "
                "or set model.threshold."
            )
        if not isinstance(p, (Prediction, RegressionPrediction)):
            raise ConfigError(f'unsure takes a prediction (model.output = "prediction"), not {type(p).__name__}.')
        head = self.head_module
        found = (dim for dim, task in zip(head.batch_dims, head.tasks, strict=True) if task != "regression")
        batch_dim = next((dim for dim in found if dim is not None), 0)
        class_dim = batch_first(head.class_dim, p.mean.dim(), batch_dim)
        return self._threshold.unsure(p, self.settings.task, class_dim)

    def _child(self, name: str, default: Any) -> Any:
        """The base model's child, parameter or buffer of this name."""
        for children in (self._modules, self._parameters, self._buffers):
            if name in children:
                return children[name]
        return default

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would take a property's value for a child where there is one of this name.
        if name in SHARED and not (isinstance(value, (Tensor, nn.Module)) and self._child(name, None) is not None):
            getattr(type(self), name).fset(self, value)
        else:
            super().__setattr__(name, value)

    @property
    def head_module(self) -> Head:
        """The module that aggregates the members' outputs."""
        return cast(Head, self._modules[self._names["prediction"]])


def _signature(model: Ensemble) -> inspect.Signature:
    """Of the base model's forward."""
    signature = inspect.signature(model._base_type.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])  # without self


def zero_inputs(model: Ensemble, samples: int | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Args and kwargs of one forward, all zeros, on the device and of the precision of the model.

    Args:
        model: An ensemble.
        samples: How many; None for as many as the example inputs had.
    Returns:
        Given as the example inputs were, without what the conversion made a constant.
    """
    tensors = [x for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]
    device = next((x.device for x in (*tensors, *model.buffers())), torch.device("cpu"))
    args, kwargs = make_inputs(model.inputs, device)

    def cast(leaf: Any) -> Any:
        return leaf.to(tensors[0].dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() and tensors else leaf

    return given_inputs(model, tree_map(cast, args), tree_map(cast, kwargs), samples)


def given_inputs(
    model: Ensemble, args: Sequence[Any], kwargs: Mapping[str, Any], samples: int | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the base model as the ensemble takes them: by position what was so in the example inputs.

    Args:
        model: An ensemble.
        args, kwargs: Of one forward of the base model.
        samples: They are repeated to so many; None to leave them.
    Raises:
        TraceError: They do not fit.
    """
    signature = _signature(model)
    try:
        values = placeholder_values(signature.bind(*args, **kwargs))
    except TypeError as error:
        raise TraceError(f"The inputs do not fit {model._base_type.__name__}.forward{signature}: {error}.") from error
    if values.keys() != set(model._takes):
        raise TraceError(f"The inputs are {', '.join(values)}; the model takes {', '.join(model._takes)}.")
    if samples is not None:
        unbatched = model.settings.unbatched
        values = {name: x if name in unbatched else resize_batch(x, samples) for name, x in values.items()}
    positional = placeholder_values(signature.bind_partial(*make_inputs(model.inputs, "meta")[0]))
    return tuple(values.pop(name) for name in positional), values


@contextmanager
def whole_output(model: nn.Module) -> Iterator[None]:
    """An ensemble returns its predictions inside, whatever it is set to; another model stays as it is."""
    if not isinstance(model, Ensemble):
        yield
        return
    before, model.output = model.head_module.output, "prediction"
    try:
        yield
    finally:
        model.output = before

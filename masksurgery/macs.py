"""Multiply-adds of a forward, counted without data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from masksurgery.copying import copy_module, meta_copy
from masksurgery.ensemble import Ensemble
from masksurgery.inputs import bind, make_inputs, placeholder_values
from masksurgery.types import TraceError


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one sample in eval: of convolutions, matrix products and attention; the rest is negligible.

    Attributes:
        base: Of the base model.
        input_repeat: Of all members where the input is repeated: n times the base model.
        late_repeat: Of the converted model, which repeats as late as it can; or of the packed one.
    """

    base: int
    input_repeat: int
    late_repeat: int

    @property
    def ratio(self) -> float:
        """Of the converted model to the base model."""
        return self.late_repeat / self.base if self.base else float("nan")

    def to_dict(self) -> dict[str, int]:
        return {"base": self.base, "input_repeat": self.input_repeat, "late_repeat": self.late_repeat}


def count_macs(model: nn.Module, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> int:
    """Multiply-adds of one forward in eval, of shapes alone, unless its control flow depends on values.

    Args:
        model: It is not changed.
        args: Positional inputs, on any device.
        kwargs: Inputs by name.
    Raises:
        TraceError: The model cannot be run.
    """
    kwargs = dict(kwargs or {})
    for count in (_on_meta, _on_fake, _on_values):
        try:
            return count(model, list(args), kwargs)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            failure = error
    raise TraceError(f"{type(model).__name__} cannot be run to count its MACs: {failure}") from failure


def _on_meta(model: nn.Module, args: list[Any], kwargs: dict[str, Any]) -> int:
    given = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (args, kwargs))
    return _count(meta_copy(model), *given)


def _on_fake(model: nn.Module, args: list[Any], kwargs: dict[str, Any]) -> int:
    duplicate = copy_module(model)
    # Kernels that fuse an attention are not counted on every version of torch; their parts are.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
            given = tree_map(lambda leaf: torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            return _count(duplicate, *given)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _on_values(model: nn.Module, args: list[Any], kwargs: dict[str, Any]) -> int:
    return _count(copy_module(model), args, kwargs)


def _count(model: nn.Module, args: list[Any], kwargs: dict[str, Any]) -> int:
    counter = FlopCounterMode(display=False)
    model.eval().requires_grad_(False)  # the counter follows what needs a gradient, and fails where there is none
    with torch.no_grad(), counter:
        model(*args, **kwargs)
    return int(counter.get_total_flops()) // 2  # torch counts a multiply-add as two


def conversion_macs(base: nn.Module, converted: Ensemble) -> Macs:
    """What a conversion costs, for one sample of the size of the example inputs.

    Args:
        base: The base model, which may have other weights. It is not changed.
        converted: Converted from such a model, or packed then.
    Raises:
        TraceError: A model cannot be run without data.
    """
    bound = sample_inputs(base, converted, 1)
    one = count_macs(base, bound.args, bound.kwargs)
    return Macs(one, converted.surgery.n * one, count_macs(converted, (), placeholder_values(bound)))


def sample_inputs(base: nn.Module, converted: Ensemble, samples: int) -> inspect.BoundArguments:
    """The example inputs of a conversion, all zeros, with `samples` samples each."""
    bound = bind(base, *make_inputs(converted.inputs))
    unbatched = set(converted.settings.unbatched)

    def resize(leaf: Any) -> Any:
        return leaf.new_zeros(samples, *leaf.shape[1:]) if isinstance(leaf, Tensor) and leaf.dim() else leaf

    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            parts = enumerate(value)
            bound.arguments[name] = tuple(x if f"{name}_{i}" in unbatched else tree_map(resize, x) for i, x in parts)
        elif kind is inspect.Parameter.VAR_KEYWORD:
            bound.arguments[name] = {k: x if k in unbatched else tree_map(resize, x) for k, x in value.items()}
        elif name not in unbatched:
            bound.arguments[name] = tree_map(resize, value)
    return bound

"""The inputs of a forward: matched with its signature, described as JSON, and made again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from masksurgery.types import TraceError

T = TypeVar("T")


def bind_inputs(model: nn.Module, example_inputs: Any) -> inspect.BoundArguments:
    """Match example inputs, positional or by keyword, with the signature of the model's forward.

    Raises:
        TraceError: They do not fit.
    """
    if isinstance(example_inputs, Mapping):
        return bind(model, (), example_inputs)
    return bind(model, example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,), {})


def bind(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """Match args and kwargs with the signature of the model's forward; a TraceError if they do not fit."""
    signature = inspect.signature(model.forward)
    example_inputs = args or kwargs
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}.") from error
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(dict(bound.arguments))):
        raise TraceError(f"example_inputs={example_inputs!r} hold no tensor. Pass a tuple of args or a dict of kwargs.")
    return bound


def replace_inputs(
    bound: inspect.BoundArguments, replace: Callable[[str, Any], Any], integers: bool = False
) -> inspect.BoundArguments:
    """The same call with whatever is an input replaced; everything else is a constant of the trace.

    Args:
        bound: The arguments of one forward.
        replace: Called with the name of the placeholder and the example value.
        integers: Integers are inputs too, not only what holds a tensor.
    """

    def part(name: str, value: Any) -> Any:
        return replace(name, value) if any(_is_input(leaf, integers) for leaf in tree_leaves(value)) else value

    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            arguments[name] = tuple(part(f"{name}_{i}", x) for i, x in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            arguments[name] = {key: part(key, x) for key, x in value.items()}
        else:
            arguments[name] = part(name, value)
    return inspect.BoundArguments(bound.signature, arguments)  # type: ignore[arg-type]


def as_call(bound: inspect.BoundArguments) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Args and kwargs of one call, by keyword what can be: decorators of a forward look for it there."""
    kinds = {name: bound.signature.parameters[name].kind for name in bound.arguments}
    if inspect.Parameter.VAR_POSITIONAL in kinds.values():
        return bound.args, bound.kwargs
    first = [name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_ONLY]
    named = {name: bound.arguments[name] for name, kind in kinds.items() if kind is not inspect.Parameter.VAR_KEYWORD}
    rest = {name: value for name, value in named.items() if name not in first}
    return tuple(named[name] for name in first), {**rest, **bound.kwargs}


def _is_input(leaf: Any, integers: bool) -> bool:
    return isinstance(leaf, Tensor) or (integers and isinstance(leaf, int) and not isinstance(leaf, bool))


def placeholder_values(bound: inspect.BoundArguments, integers: bool = False) -> dict[str, Any]:
    """Example values by the name of the placeholder that the trace gives them; no entry for constants."""
    values: dict[str, Any] = {}
    replace_inputs(bound, values.__setitem__, integers)
    return values


def describe_inputs(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The inputs as JSON: {"args": [...], "kwargs": {...}}, a tensor as {"shape": [...], "dtype": "float32"}."""
    return {"args": describe(list(bound.args)), "kwargs": describe(dict(bound.kwargs))}


def describe(value: Any) -> Any:
    """A tree of inputs as JSON, a tensor as {"shape": [...], "dtype": "float32"}."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
        return leaf

    return tree_map(of_leaf, value)


def is_described_tensor(value: Any) -> bool:
    """Whether something is what `describe` makes of a tensor."""
    return isinstance(value, Mapping) and set(value) == {"shape", "dtype"}


def make_inputs(description: Mapping[str, Any], device: torch.device | str = "cpu") -> tuple[list[Any], dict[str, Any]]:
    """Args and kwargs, all zeros, of a description."""

    def make(value: Any) -> Any:
        if isinstance(value, Mapping):
            if is_described_tensor(value):
                return torch.zeros(value["shape"], dtype=getattr(torch, value["dtype"]), device=device)
            return {key: make(part) for key, part in value.items()}
        if isinstance(value, (list, tuple)):
            parts = [make(part) for part in value]
            return parts if isinstance(value, list) else tuple(parts)
        return value

    return make(list(description["args"])), make(dict(description["kwargs"]))


def random_inputs(
    description: Mapping[str, Any], device: torch.device | str = "cpu", seed: int = 0
) -> tuple[list[Any], dict[str, Any]]:
    """Args and kwargs of a description: floating-point tensors as `random_values` draws them, all else zeros."""
    return random_values(make_inputs(description, device), seed)


def random_values(values: T, seed: int = 0, integers: bool = False) -> T:
    """A tree with the same shapes, of which floating-point tensors are drawn from a normal distribution.

    Equal seeds give equal values on every device, and torch's default generator is not touched.

    Args:
        values: A tree; what is no tensor stays.
        seed: Of the numbers.
        integers: Whole numbers and booleans are drawn too, as 0 or 1; else they stay.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator).to(leaf.device, leaf.dtype)
        return torch.randint(2, leaf.shape, generator=generator).to(leaf.device, leaf.dtype) if integers else leaf

    return cast(T, tree_map(draw, values))

"""Runs a graph node by node: on tensors without data where that is possible, on values where it is not."""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.utils._pytree import tree_map

from masksurgery.copying import copy_with, meta_copy
from masksurgery.example import Example
from masksurgery.types import LayoutError

Result = TypeVar("Result")


Run = tuple[nn.Module, Sequence[Mapping[str, Any]]]
"""A copy of a module, and what it takes at each of BATCH_SIZES."""
Way = Callable[[nn.Module, Example], contextlib.AbstractContextManager[Run]]
"""Of running a module, on data or without."""


class Shape(tuple[int, ...]):
    """The shape of a tensor, as a leaf of a tree."""


def shapes(value: Any) -> Any:
    return tree_map(lambda leaf: Shape(leaf.shape) if isinstance(leaf, Tensor) else leaf, value)


@contextlib.contextmanager
def _on_meta(root: nn.Module, example: Example) -> Iterator[Run]:
    yield meta_copy(root), example.without_data("meta")


@contextlib.contextmanager
def _on_fake(root: nn.Module, example: Example) -> Iterator[Run]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _silent(logging.getLogger(FakeTensorMode.__module__)):
        yield copy_with(root, mode.from_tensor), example.without_data()


@contextlib.contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """What it would say of an error that is raised too."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def _on_values(root: nn.Module, example: Example) -> Iterator[Run]:
    with torch.random.fork_rng(devices=[]):
        yield copy_with(root, torch.clone), example.values


# The meta device is two to three times as fast as fake tensors, but does not know a CPU tensor beside a meta one.
WITHOUT_DATA: tuple[Way, ...] = (_on_meta, _on_fake)
IF_NEED_BE: tuple[Way, ...] = (*WITHOUT_DATA, _on_values)


def run_somehow(
    root: nn.Module,
    example: Example,
    ways: Sequence[Way],
    work: Callable[[nn.Module, Sequence[Mapping[str, Any]]], Result],
) -> tuple[Result, Way]:
    """Do something with a copy of a module and inputs of it, in the first way in which it can be done; and that way.

    Raises:
        LayoutError: It can be done in none of them.
    """
    for way in ways:
        try:
            with torch.no_grad(), way(root, example) as (module, given):
                return work(module, given), way
        except (RuntimeError, NotImplementedError, TypeError) as error:
            failure = error
    data = "" if _on_values in ways else " without data"
    raise LayoutError(f"The model cannot be run{data}, on its example inputs: {failure}") from failure


def run_shapes(
    graph: fx.Graph, root: nn.Module, example: Example, ways: Sequence[Way]
) -> tuple[dict[fx.Node, Any], Way]:
    """Run the graph at BATCH_SIZES[0]: the value of every node, tensors as their shapes; and the way that it took.

    Raises:
        LayoutError: The graph cannot be run.
    """

    def collect(module: nn.Module, given: Sequence[Mapping[str, Any]]) -> dict[fx.Node, Any]:
        return {node: shapes(value) for node, value in run_nodes(graph, module, given[0], lambda node, call: call())}

    return run_somehow(root, example, ways, collect)


def run_nodes(
    graph: fx.Graph, module: nn.Module, inputs: Mapping[str, Any], step: Callable[[fx.Node, Callable[[], Any]], Any]
) -> Iterator[tuple[fx.Node, Any]]:
    """Run the nodes in turn, each as `step` does it with its call; the nodes with what they return."""
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: env[source])
        try:
            env[node] = step(node, lambda: call_node(node, module, inputs, args, kwargs))  # noqa: B023
        except LayoutError:
            raise
        except Exception as error:
            raise RuntimeError(f"node '{node.name}' ({node.op} {node.target}): {error}") from error
        yield node, env[node]


def call_node(node: fx.Node, module: nn.Module, inputs: Mapping[str, Any], args: Any, kwargs: Any) -> Any:
    """What a node computes.

    Args:
        node: Of a graph that was traced from `module`.
        inputs: Values of the placeholders, by name.
        args: Its arguments, nodes replaced by values; `kwargs` likewise.
    """
    args, kwargs = thaw(args), thaw(kwargs)
    if node.op == "placeholder":
        return inputs[cast(str, node.target)]
    if node.op == "get_attr":
        return operator.attrgetter(cast(str, node.target))(module)
    if node.op == "call_module":
        return module.get_submodule(cast(str, node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], cast(str, node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return cast(Callable[..., Any], node.target)(*args, **kwargs)
    return args[0]


def thaw(value: Any) -> Any:
    """Arguments of a node as the generated code would make them: lists that a function may write into."""
    if isinstance(value, immutable_list):
        return [thaw(part) for part in value]
    if isinstance(value, immutable_dict):
        return {key: thaw(part) for key, part in value.items()}
    return tuple(map(thaw, value)) if type(value) is tuple else value

"""Graphs without operations that change their input."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from masksurgery.example import Example, tensors_in
from masksurgery.running import Way, run_nodes, run_somehow
from masksurgery.types import ConfigError


def make_functional(graph: fx.Graph, root: nn.Module, example: Example, ways: Sequence[Way]) -> None:
    """Let what changes its input make a new tensor instead, which is what later readers get.

    Args:
        graph: Changed in place, as the modules of `root` are.
        example: What one forward takes.
        ways: Of running the graph, to see what shares memory.
    Raises:
        ConfigError: A tensor that shares memory with the changed one, but is not the same, is read later.
        LayoutError: Something is changed in place, and the graph cannot be run.
    """
    changing = [node for node in graph.nodes if _is_in_place(node, root) and _changed(node) is not None]
    memory = _find_memory(graph, root, example, ways) if changing else {}
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in changing:
        source = cast(fx.Node, _changed(node))
        for alias, same in _aliases(source, node, order, memory):
            later = [user for user in alias.users if order[user] > order[node] and (same or not _reads_size(user))]
            if later and not same:
                raise ConfigError(
                    f"pack: '{node.name}' changes '{source.name}' in place, which shares memory with "
                    f"'{alias.name}', and '{later[0].name}' reads that later. "
                    f"Leave out the in-place operation in the base model."
                )
            for user in later:
                user.replace_input_with(alias, node)
        if node.op == "call_method":
            node.target = str(node.target)[:-1]
        elif node.op == "call_function" and _out_of_place(node.target) is not None:
            node.target = _out_of_place(node.target)
        elif node.op == "call_function":
            node.kwargs = {**node.kwargs, "inplace": False}
    for module in root.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]


def _changed(node: fx.Node) -> fx.Node | None:
    """The input that a node in place changes."""
    source = node.args[0] if node.args else node.all_input_nodes[0]
    return source if isinstance(source, fx.Node) else None


def _reads_size(node: fx.Node) -> bool:
    return node.target is getattr or (node.op == "call_method" and node.target in ("size", "dim", "numel"))


Memory = dict[fx.Node, list[tuple[int, Any]]]
"""For the tensors of each node which storage they lie in, and where."""


def _find_memory(graph: fx.Graph, root: nn.Module, example: Example, ways: Sequence[Way]) -> Memory:
    def collect(module: nn.Module, given: Sequence[Mapping[str, Any]]) -> Memory:
        # All values are held until the end: an address that was given free would be another tensor's.
        values = dict(run_nodes(graph, module, given[0], lambda node, call: call()))
        return {node: [_place(x) for x in tensors_in(value)] for node, value in values.items()}

    return run_somehow(root, example, ways, collect)[0]


def _place(x: Tensor) -> tuple[int, Any]:
    return x.untyped_storage()._cdata, (x.shape, x.stride(), x.storage_offset(), x.dtype)


def _aliases(
    source: fx.Node, node: fx.Node, order: Mapping[fx.Node, int], memory: Memory
) -> Iterator[tuple[fx.Node, bool]]:
    """What was made before a node and lies in the memory that it changes; and whether it is the tensor itself."""
    storages = {storage for storage, _ in memory[source]}
    for other, places in memory.items():
        if order[other] < order[node] and other.op != "output" and any(storage in storages for storage, _ in places):
            yield other, places == memory[source]


_OUT_OF_PLACE: dict[Any, Any] = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "mul", "sub", "truediv", "floordiv", "pow", "matmul", "mod")
}


def _out_of_place(function: Any) -> Any:
    """What computes the same into new memory; None of what has no such name."""
    if function in _OUT_OF_PLACE:
        return _OUT_OF_PLACE[function]
    name = str(getattr(function, "__name__", ""))
    if not name.endswith("_") or name.endswith("__"):
        return None
    return getattr(torch, name[:-1], None) or getattr(nn.functional, name[:-1], None)


def _is_in_place(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__") and hasattr(Tensor, name[:-1])
    if node.op == "call_module":
        return getattr(root.get_submodule(str(node.target)), "inplace", False) is True
    if node.op != "call_function":
        return False
    return _out_of_place(node.target) is not None or node.kwargs.get("inplace") is True

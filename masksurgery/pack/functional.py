"""Graphs without operations that change their input."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from masksurgery.types import ConfigError


def make_functional(graph: fx.Graph, root: nn.Module) -> None:
    """Let what changes its input make a new tensor instead, which is what later readers get.

    Raises:
        ConfigError: A tensor that shares memory with the changed one, but is not the same, is read later.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _is_in_place(node, root):
            continue
        source = node.args[0] if node.args else node.all_input_nodes[0]
        if not isinstance(source, fx.Node):
            continue
        for alias, same in _aliases(source, root):
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


def _reads_size(node: fx.Node) -> bool:
    return node.target is getattr or (node.op == "call_method" and node.target in ("size", "dim", "numel"))


def _aliases(node: fx.Node, root: nn.Module) -> Iterator[tuple[fx.Node, bool]]:
    """The node, and those in whose memory it lies or that lie in its memory; whether they are the same tensor."""

    def grow(start: set[fx.Node], up: bool, down: bool, views: bool) -> set[fx.Node]:
        found, stack = set(start), list(start)
        while stack:
            one = stack.pop()
            edges = [(one, other) for other in one.all_input_nodes[:1]] if up else []
            edges += [(other, other) for other in one.users if other.all_input_nodes[0] is one] if down else []
            for maker, other in edges:
                kind = _shares_memory(maker, root)
                if other not in found and (kind is True or (kind is False and views)):
                    found.add(other)
                    stack.append(other)
        return found

    same = grow({node}, True, True, False)
    yield from ((one, True) for one in same)
    others = grow(same, True, False, True) | grow(same, False, True, True)
    yield from ((one, False) for one in others - same)


def _shares_memory(node: fx.Node, root: nn.Module) -> bool | None:
    """Whether what it returns is its input itself (True) or a view of it (False); None: memory of its own."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        if isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)) or type(module).__name__ == "DropPath":
            return True
        return False if isinstance(module, (nn.Flatten, nn.Unflatten)) else None
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function"):
        return None
    return True if name in _SAME else False if name in _VIEWS else None


_SAME = {"contiguous", "to", "float", "type_as", "dropout", "drop_path", "detach", "requires_grad_"}
_VIEWS = {
    "view", "reshape", "flatten", "unflatten", "transpose", "permute", "swapaxes", "movedim", "squeeze", "unsqueeze",
    "expand", "narrow", "select", "chunk", "split", "unbind", "tensor_split", "getitem", "t", "view_as", "expand_as",
}  # fmt: skip


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

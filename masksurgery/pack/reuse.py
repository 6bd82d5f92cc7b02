"""Memory that is used again: what nobody reads any more is overwritten by what is made of it.

For large activations a new tensor costs more than the sum or the activation that is written into it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from masksurgery.pack.parts import ChannelAffine, IndexAdd, Place, Select, SliceAdd, add_into

MAKERS = (
    nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, ChannelAffine,
    IndexAdd, SliceAdd, Place, Select,
)  # fmt: skip
"""Modules that return a tensor of their own, and need nothing of it later."""

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.Mish, nn.ELU)
FUNCTIONS: tuple[Any, ...] = (F.relu, F.relu6, F.leaky_relu, F.hardswish, F.hardsigmoid, F.silu, F.mish, F.elu)


def reuse_memory(graph: fx.Graph, root: nn.Module, sums: set[fx.Node]) -> None:
    """Let activations and sums write into their input, where nothing else reads that.

    Args:
        graph: Changed in place.
        root: With what it calls.
        sums: Nodes that add two tensors of one shape and type.
    """
    owned: set[fx.Node] = set()
    calls: dict[nn.Module, list[bool]] = {}
    for node in graph.nodes:
        module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        free = first in owned and len(first.users) == 1 if first is not None else False
        if isinstance(module, (IndexAdd, SliceAdd)):
            module.inplace = free
        if isinstance(module, MAKERS):
            owned.add(node)
        elif isinstance(module, ACTIVATIONS):
            calls.setdefault(module, []).append(free)
            owned.add(node)
        elif node.op == "call_function" and node.target in FUNCTIONS:
            node.kwargs = {**node.kwargs, "inplace": True} if free and len(node.args) == 1 else node.kwargs
            owned.add(node)
        elif node in sums:
            _add_in_place(node, owned)
            owned.add(node)
    for module, free_each in calls.items():
        module.inplace = all(free_each)  # type: ignore[assignment]


def _add_in_place(node: fx.Node, owned: set[fx.Node]) -> None:
    one, other = node.args
    for into, added in ((one, other), (other, one)):
        if isinstance(into, fx.Node) and into in owned and len(into.users) == 1 and into is not added:
            node.op, node.target = "call_function", add_into
            node.args = (into, added)
            return


def is_plain_sum(node: fx.Node) -> bool:
    """It adds two nodes."""
    plain = node.op == "call_function" and node.target in (operator.add, torch.add)
    return (plain or (node.op == "call_method" and node.target == "add")) and len(node.args) == 2 and not node.kwargs

"""Python control flow on sizes, in a trace: decided by the example inputs, and checked whenever the result runs.

A forward that says `if x.shape[-1] < 7`, `len(x.shape)` or `range(h)` cannot be followed with symbols alone. What it
asks for is computed without data, at two batch sizes: what is the same for both may decide.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.proxy import Attribute, Proxy

from masksurgery.copying import copy_with
from masksurgery.example import BATCH_SIZES, Example
from masksurgery.running import call_node
from masksurgery.types import LayoutError, TraceError


def same_branch(value: Any, expected: Any, where: str) -> None:
    """Check, as a node of a converted model, a size that decided the control flow of its trace.

    Raises:
        LayoutError: The value is another: the graph is that of another branch.
    """
    if value != expected:
        raise LayoutError(
            f"{where} branches on the sizes of its inputs: what was {expected} for the example inputs of the "
            f"conversion is {value} for these. Convert again with example_inputs of this size."
        )


def assigned(x: Tensor, key: Any, value: Any) -> Tensor:
    """A copy of x after `x[key] = value`; it stands for the assignment in a graph, where no node changes another."""
    x = x.clone()
    x[key] = value
    return x


class Value(Proxy):
    """A proxy that answers when Python asks for a number or a length, and that can be assigned to."""

    tracer: Any

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # numpy and torch look for protocols, such as __array_struct__, that it does not have
            raise AttributeError(name)
        return ValueAttribute(self, name)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.tracer.decide(self.node, None), dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> Value:
        return self  # a forward may keep what it computes; copies of the module need no other graph

    def __setitem__(self, key: Any, value: Any) -> None:
        self.node = self.tracer.assign(self.node, key, value)

    def __len__(self) -> int:
        return int(self.tracer.length(self))

    def __int__(self) -> int:
        return int(self.tracer.decide(self.node, int))

    def __index__(self) -> int:
        return int(self.tracer.decide(self.node, int))

    def __float__(self) -> float:
        return float(self.tracer.decide(self.node, float))


class ValueAttribute(Attribute, Value):
    """An attribute of such a proxy."""


class Evaluator:
    """Computes nodes of a graph that is being traced, without data and at both batch sizes, each node once.

    Attributes:
        active: It computes at the moment, so modules and functions are to run and not to be traced.
    """

    def __init__(self, root: nn.Module, example: Example) -> None:
        self.root, self.active = root, False
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            self._module, self._given = copy_with(root, self._mode.from_tensor), example.without_data()
        self._known: tuple[dict[fx.Node, Any], ...] = ({}, {})

    def compute(self, node: fx.Node) -> tuple[Any, Any]:
        """The value of a node at each of BATCH_SIZES."""
        self.active = True
        try:
            for known, given in zip(self._known, self._given, strict=True):
                with self._mode, torch.no_grad():
                    for source in self._missing(node, known):
                        args, kwargs = fx.map_arg((source.args, source.kwargs), lambda n: known[n])  # noqa: B023
                        known[source] = call_node(source, self._module, given, args, kwargs)
        finally:
            self.active = False
        return self._known[0][node], self._known[1][node]

    def is_shared(self, node: fx.Node) -> bool:
        """What the node computes is a part of another tensor, or is another node's too."""
        x = self.compute(node)[0]
        return x._is_view() or any(value is x for other, value in self._known[0].items() if other is not node)

    def _missing(self, node: fx.Node, known: dict[fx.Node, Any]) -> list[fx.Node]:
        """What has to be computed for a node, in the order of the graph."""
        needed, stack = set(), [node]
        while stack:
            current = stack.pop()
            if current not in known and current not in needed:
                needed.add(current)
                stack.extend(current.all_input_nodes)
                self._find_constant(current)
        return [current for current in node.graph.nodes if current in needed]

    def _find_constant(self, node: fx.Node) -> None:
        """Constants of the trace are attributes of the module that is traced, not yet of its copy."""
        name = str(node.target)
        if node.op == "get_attr" and "." not in name and name in vars(self.root) and name not in vars(self._module):
            setattr(self._module, name, getattr(self.root, name))


def reads_sizes(node: fx.Node) -> bool:
    """A number is computed from the sizes of tensors, not only from their ranks, types and devices."""
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen or current.op in ("placeholder", "get_attr", "call_module"):
            continue
        seen.add(current)
        name = current.args[1] if current.target is getattr else current.target
        if name in ("shape", "size", "numel", "nelement", "__len__"):
            return True
        if name in ("ndim", "dim", "dtype", "device", "is_cuda", "requires_grad", "is_floating_point", "is_complex"):
            continue
        stack.extend(current.all_input_nodes)
    return False


def common(values: tuple[Any, Any], node: fx.Node) -> Any:
    """The one value of both batch sizes.

    Raises:
        TraceError: There are two, or it is a tensor, whose value is not known.
    """
    one, other = values
    if isinstance(one, Tensor) or one != other:
        seen = (
            "a tensor"
            if isinstance(one, Tensor)
            else f"{one} for {BATCH_SIZES[0]} samples, {other} for {BATCH_SIZES[1]}"
        )
        raise TraceError(f"control flow depends on '{node.name}', which is {seen}")
    return one

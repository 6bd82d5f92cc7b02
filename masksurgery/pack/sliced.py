"""A packed graph in the making: the nodes, the modules that they call, and what all members share."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from masksurgery.opaque import Follow, Opaque
from masksurgery.pack.cut_layers import CutLayer, whole_layer
from masksurgery.pack.families import Operation
from masksurgery.pack.member import Member
from masksurgery.pack.network import Network
from masksurgery.pack.parts import ChannelAffine


@dataclass(frozen=True)
class Barrier:
    """An operation that takes no subset of channels, so that they were put back before it.

    Attributes:
        node: Its name.
        reason: Why.
    """

    node: str
    reason: str


@dataclass
class Sliced:
    """What is being built: a graph, and what it calls."""

    graph: fx.Graph = field(default_factory=fx.Graph)
    root: nn.Module = field(default_factory=nn.Module)
    barriers: dict[str, Barrier] = field(default_factory=dict)
    done: dict[Any, fx.Node] = field(default_factory=dict)
    sums: set[fx.Node] = field(default_factory=set)
    modules: dict[tuple[str, nn.Module], str] = field(default_factory=dict)
    layers: dict[fx.Node, str] = field(default_factory=dict)
    channels: dict[str, tuple[list[int] | None, list[int] | None]] = field(default_factory=dict)
    """Of every layer that is cut which inputs and outputs it has, in order; None for all."""

    def add(self, target: str, module: nn.Module) -> str:
        """Register a module under a dotted name, with underscores until the name is free; that name."""
        parent, path, name = self._find(target)
        parent.add_module(name, module)
        return ".".join([*path, name])

    def constant(self, target: str, value: Tensor) -> fx.Node:
        """Register a buffer under such a name; the node that reads it."""
        parent, path, name = self._find(target)
        parent.register_buffer(name, value.detach())
        return self.graph.get_attr(".".join([*path, name]))

    def _find(self, target: str) -> tuple[nn.Module, list[str], str]:
        parent = self.root
        *path, name = target.split(".")
        for i, part in enumerate(path):
            while isinstance(getattr(parent, part, None), Tensor):
                part += "_"
            path[i] = part
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = cast(nn.Module, parent._modules[part])
        while hasattr(parent, name):
            name += "_"
        return parent, path, name

    def add_layer(self, target: str, cut: CutLayer) -> str:
        name = self.add(target, cut.module)
        self.channels[name] = tuple(None if x is None else x.tolist() for x in (cut.inputs, cut.outputs))  # type: ignore[assignment]
        return name

    def digest(self) -> str:
        """Of what its weights stand for: two of one digest can exchange them."""
        return hashlib.sha256(repr(self.channels).encode()).hexdigest()[:16]

    def sweep(self) -> None:
        """Drop what nobody reads."""
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("get_attr", "call_module") and not node.users:
                self.graph.erase_node(node)
        used = {str(node.target) for node in self.graph.nodes if node.op in ("get_attr", "call_module")}
        for name, _ in [*self.root.named_buffers()]:
            if not any(name == target or name.startswith(f"{target}.") for target in used):
                parent, _, last = name.rpartition(".")
                del self.root.get_submodule(parent)._buffers[last]

    def call(self, target: str, module: nn.Module, *args: fx.Node) -> fx.Node:
        return self.graph.call_module(self.add(target, module), args)


def build_shared(member: Member, sliced: Sliced) -> dict[fx.Node, Any]:
    """What is computed once for all members, at full width."""
    net, env = member.net, {}
    for node in net.graph.nodes:
        if node in net.dependent or node.op == "output":
            continue
        operation = member.operations[node]
        if operation.family == "constant":
            value = net.constant(node)
            assert value is not None
            env[node] = sliced.constant(f"shared.{node.target}", value)
        elif operation.family == "same":
            env[node] = env[operation.inputs[0][0]]
        elif operation.family == "layer":
            env[node] = call_layer(
                sliced, operation, shared_layer(sliced, operation), env[operation.inputs[0][0]], env.__getitem__
            )
        elif operation.family == "affine":
            affine = member.operations.folding.affines[node]
            dtype = next(p.dtype for p in net.root.parameters() if p.is_floating_point())
            target = f"shared.{node.target if node.op == 'call_module' else node.name}"
            env[node] = sliced.call(target, affine_module(affine, None, dtype), env[operation.inputs[0][0]])
            if operation.module is not None:
                env[node] = sliced.graph.call_module(shared_module(sliced, node, operation.module), (env[node],))
        else:
            env[node] = _copy_shared(operation, net, sliced, env)
    return env


def _copy_shared(operation: Operation, net: Network, sliced: Sliced, env: dict[fx.Node, Any]) -> fx.Node:
    node = operation.node
    module = operation.module if operation.module is not None else net.module(node)
    if module is None:
        return sliced.graph.node_copy(node, lambda n: env[n])
    args: Sequence[Any] = tuple(env[place[0]] for place in operation.inputs)
    kwargs: Any = {}
    if operation.module is None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
    return sliced.graph.call_module(shared_module(sliced, node, module), tuple(args), kwargs)


def affine_module(affine: Any, index: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """A BatchNorm or a scale that could not be folded, cut."""

    def cut(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x if index is None or x.numel() == 1 else x[index.to(x.device)]
        return x.to(dtype)

    return ChannelAffine(affine.dim, cast(Tensor, cut(affine.scale)), cut(affine.shift))


def shared_layer(sliced: Sliced, operation: Operation) -> str:
    """The name of a layer with all of its channels, and with what follows this call of it folded in."""
    if operation.node not in sliced.layers:
        sliced.layers[operation.node] = sliced.add(f"shared.{operation.node.target}", whole_layer(operation))
    return sliced.layers[operation.node]


def call_layer(sliced: Sliced, operation: Operation, name: str, x: fx.Node, value: Callable[[fx.Node], Any]) -> fx.Node:
    """Call a layer with what the node passes it beside its input, such as the size of its output."""
    node = operation.node
    source = operation.inputs[0][0]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: x if n is source else value(n))
    return sliced.graph.call_module(name, args, kwargs)


def shared_module(sliced: Sliced, node: fx.Node, module: nn.Module) -> str:
    """The name of a module that is called as it is, by whoever calls it; what is packed has a copy of its own."""
    target = f"shared.{node.target if node.op == 'call_module' else node.name}"
    if (target, module) not in sliced.modules:
        # The masks in an opaque module follow the module that tells the member.
        opaque = any(isinstance(m, (Opaque, Follow)) for m in module.modules())
        sliced.modules[target, module] = sliced.add(target, module if opaque else copy.deepcopy(module))
    return sliced.modules[target, module]

"""The graph of a packed model: for each member the operations on the channels that it needs, with weights cut so."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from masksurgery.pack.families import Operation, name_of, shape_of
from masksurgery.pack.families import Place as TensorPlace
from masksurgery.pack.layers import cut_layer
from masksurgery.pack.liveness import Known, Member, find_keep, find_needed, kept_dims
from masksurgery.pack.moves import Variant, find_move
from masksurgery.pack.network import Enter, Network
from masksurgery.pack.parts import ChannelAffine, IndexAdd, Place, Select, widened
from masksurgery.pack.reuse import is_plain_sum
from masksurgery.pack.widening import Widening, is_sum, widen

Keep = Mapping[int, Tensor]
"""For each dimension that is cut the indices that are kept, in order."""


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


class Slicer:
    """Builds the nodes of one member; what does not differ between members is built once, as `shared`."""

    def __init__(
        self, member: Member, sliced: Sliced, shared: dict[fx.Node, Any], dense: bool, prefix: str | None = None
    ) -> None:
        self.member, self.sliced, self.shared = member, sliced, shared
        self.net: Network = member.net
        self.prefix = f"members.{member.index}." if prefix is None else prefix
        self.needed = find_needed(member)
        self.keep = find_keep(member, self.needed)
        self.widening = widen(member, self.keep, every_sum=prefix is not None) if dense else Widening()
        self.keep.update({(node, 0): keep for node, keep in self.widening.keep.items()})
        self.env: dict[fx.Node, Any] = {}
        self.cut: dict[Any, fx.Node] = {}

    def run(self) -> Any:
        """Build all nodes of the member; its output."""
        for node in self.net.graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], lambda n: self.whole(n))
            if node in self.net.dependent and self._is_needed(node):
                self.env[node] = self._build(self.member.operations[node])
        raise AssertionError("a graph without an output")

    def _is_needed(self, node: fx.Node) -> bool:
        if not self.net.facts[node].has_tensor:
            return True
        return any(bool(pattern.any()) for (other, _), pattern in self.needed.items() if other is node)

    def _build(self, operation: Operation) -> Any:
        return BUILD.get(operation.family, Slicer.barrier)(self, operation)

    # --- tensors -----------------------------------------------------------------------------------------------------

    def kept(self, place: TensorPlace) -> Keep:
        return self.keep.get(place, {}) if place[0] in self.net.dependent else {}

    def value(self, node: fx.Node) -> Any:
        """A node as it is built."""
        return self.env[node] if node in self.net.dependent else self.shared[node]

    def whole(self, node: fx.Node) -> Any:
        """A node with all of its channels."""
        return self.get((node, 0), {}) if isinstance(self.net.facts[node].value, Tensor) else self.value(node)

    def get(self, place: TensorPlace, keep: Keep, have: Keep | None = None, value: Any = None) -> fx.Node:
        """A tensor cut to other channels than those that it has."""
        have = self.kept(place) if have is None else have
        found: fx.Node = self.value(place[0]) if value is None else value
        known, shape = self.member.of(place), shape_of(self.net, place)
        for d in sorted({*have, *keep}):
            one, other = have.get(d), keep.get(d)
            if same_index(one, other):
                continue
            own = torch.arange(shape[d]) if one is None else one
            wanted = torch.arange(shape[d]) if other is None else other
            found = self._recut(found, d, own, wanted, known, place)
        return found

    def _recut(self, x: fx.Node, d: int, own: Tensor, wanted: Tensor, known: Known, place: TensorPlace) -> fx.Node:
        key = (x, d, tuple(wanted.tolist()))
        if key in self.cut:
            return self.cut[key]
        name = f"{self.prefix}{place[0].name}"
        device = self._device()
        common = torch.isin(wanted, own)
        found = x
        inside = wanted[common]
        if len(inside) != len(own):
            found = self.sliced.call(f"{name}_select", Select(d, torch.searchsorted(own, inside).to(device)), found)
        if len(inside) != len(wanted):
            fill = self._fill(known, d, wanted, common)
            at = common.nonzero().reshape(-1).to(device)
            found = self.sliced.call(f"{name}_place", Place(d, at, fill.to(device)), found)
        self.cut[key] = found
        return found

    def _fill(self, known: Known, d: int, wanted: Tensor, common: Tensor) -> Tensor:
        """The constants of the channels that are put back."""
        size = int(wanted.max()) + 1
        value = known.value
        rows = value.movedim(d, 0).reshape(value.shape[d], -1)[:, 0]
        full = rows.expand(max(size, len(rows))) if len(rows) == 1 else rows
        return torch.where(common, 0.0, full[wanted]).to(self._dtype())

    def _device(self) -> torch.device:
        return next((p.device for p in self.net.root.parameters()), torch.device("cpu"))

    def _dtype(self) -> torch.dtype:
        found = (p.dtype for p in self.net.root.parameters() if p.is_floating_point())
        return next(found, torch.get_default_dtype())

    def constant(self, node: fx.Node, keep: Keep) -> fx.Node:
        """A parameter or buffer, cut."""
        if not keep:
            return cast(fx.Node, self.value(node))
        value = self.net.constant(node)
        assert value is not None
        for d, index in keep.items():
            value = value.index_select(d, index.to(value.device))
        return self.sliced.constant(f"{self.prefix}{node.target}", value.clone())

    def copy(self, operation: Operation, values: Mapping[fx.Node, Any], variant: Variant | None = None) -> fx.Node:
        """The node itself on other tensors; what another member has done to the same tensors is not done again."""
        node = operation.node

        def value(source: fx.Node) -> Any:
            return values[source] if source in values else self.value(source)

        run: Any = node if variant is None else variant
        args, kwargs = fx.map_arg((tuple(run.args), dict(run.kwargs)), value)
        module = operation.module if operation.module is not None else self.net.module(node)
        if operation.module is not None:
            args, kwargs = tuple(values[place[0]] for place in operation.inputs), {}
        key = (node, repr((args, kwargs)))
        if key not in self.sliced.done:
            target = run.target if module is None else self.module(node, module)
            op = run.op if module is None else "call_module"
            self.sliced.done[key] = self.sliced.graph.create_node(op, target, args, kwargs, node.name)
        return self.sliced.done[key]

    def module(self, node: fx.Node, module: nn.Module) -> str:
        """The name of a module that all members share."""
        return shared_module(self.sliced, node, module)

    def aligned(self, place: TensorPlace, keep: Keep, rank: int) -> dict[int, Tensor]:
        """What is kept of a tensor that is broadcast to one of `rank` dimensions."""
        shape = shape_of(self.net, place)
        missing = rank - len(shape)
        return {d - missing: index for d, index in keep.items() if d >= missing and shape[d - missing] > 1}

    # --- the families ------------------------------------------------------------------------------------------------

    def size(self, operation: Operation) -> Any:
        node = operation.node
        cut = {place[0]: self.kept(place) for place in operation.inputs if self.kept(place)}
        if not cut:
            return self.sliced.graph.node_copy(node, self.value)
        (source,) = cut if len(cut) == 1 else (next(iter(cut)),)
        shape, keep = shape_of(self.net, (source, 0)), cut[source]
        name = node.args[1] if node.target is getattr else str(node.target)
        if name in ("shape", "size") and len(node.args) + len(node.kwargs) <= (2 if node.target is getattr else 1):
            read = self.sliced.graph.node_copy(node, self.value)
            return self.sliced.graph.call_function(widened, (read, tuple((d, shape[d]) for d in sorted(keep))))
        if name == "size" and isinstance(node.args[-1], int):
            d = node.args[-1] % len(shape)
            return shape[d] if d in keep else self.sliced.graph.node_copy(node, self.value)
        if name in ("dim", "ndim", "dtype", "device", "is_cuda", "requires_grad", "is_floating_point"):
            return self.sliced.graph.node_copy(node, self.value)
        return self.sliced.graph.node_copy(node, self.whole)

    def mask(self, operation: Operation) -> fx.Node:
        keep = self.kept((operation.node, 0))
        x = self.get(operation.inputs[0], keep)
        scale = self.member.operations.folding.rescale[operation.node]
        dim = self.net.masks[str(operation.node.args[1])].channel_dim % len(shape_of(self.net, (operation.node, 0)))
        mask = self.member.mask(operation)[keep.get(dim, slice(None))]
        if not mask.all() and operation.node not in self.widening.passed:
            weights = (mask * scale).to(self._device(), self._dtype())
            return self.sliced.call(f"{self.prefix}{operation.node.name}", ChannelAffine(dim, weights, None), x)
        return x if scale == 1 else self.sliced.graph.call_function(operator.mul, (x, scale))

    def same(self, operation: Operation) -> fx.Node:
        return self.get(operation.inputs[0], self.kept((operation.node, 0)))

    def layer(self, operation: Operation) -> fx.Node:
        node, place = operation.node, operation.inputs[0]
        live, every = self.widening.zero_rows.get(node), node in self.widening.zero_columns
        cut = cut_layer(operation, self.member, self.kept((node, 0)), live, every)
        others = {d: index for d, index in self.kept((node, 0)).items() if d != cut.dim}
        inputs = {**others, cut.dim: cut.inputs} if cut.inputs is not None else others
        found = self.sliced.call(f"{self.prefix}{node.target}", cut.module, self.get(place, inputs))
        have = {**others, cut.dim: cut.outputs} if cut.outputs is not None else others
        return self.get((node, 0), self.kept((node, 0)), have, found)

    def affine(self, operation: Operation) -> fx.Node:
        node, keep = operation.node, self.kept((operation.node, 0))
        affine = self.member.operations.folding.affines[node]
        x = self.get(operation.inputs[0], keep)
        module = affine_module(affine, keep.get(affine.dim), self._dtype())
        x = self.sliced.call(f"{self.prefix}{node.target if node.op == 'call_module' else node.name}", module, x)
        if operation.module is None:
            return x
        return self.sliced.graph.call_module(self.module(node, operation.module), (x,))

    def elementwise(self, operation: Operation) -> fx.Node:
        node, keep = operation.node, self.kept((operation.node, 0))
        added = self._index_add(operation, keep)
        if added is not None:
            return added
        rank = len(shape_of(self.net, (node, 0)))
        values: dict[fx.Node, Any] = {p[0]: self.get(p, self.aligned(p, keep, rank)) for p in operation.inputs}
        for n in operation.constants:
            values[n] = self.constant(n, self.aligned((n, 0), keep, rank))
        found = self.copy(operation, values)
        if is_sum(operation, self.member) and is_plain_sum(found):
            self.sliced.sums.add(found)
        return found

    def _index_add(self, operation: Operation, keep: Keep) -> fx.Node | None:
        """A sum of a whole and of a branch that has fewer channels and zeros for the rest; None if it is another."""
        if not is_sum(operation, self.member):
            return None
        one, other = operation.inputs
        for base, branch in ((one, other), (other, one)):
            own = self.kept(branch)
            differ = [d for d in {*own, *keep} if not same_index(own.get(d), keep.get(d))]
            if len(differ) != 1 or differ[0] not in own or _covers(self.kept(base), own, differ[0]):
                continue
            (d,) = differ
            wanted = keep[d] if d in keep else torch.arange(shape_of(self.net, base)[d])
            known = self.member.of(branch)
            if not torch.isin(own[d], wanted).all() or bool((known.constant & ~known.zero).any()):
                continue
            at = torch.searchsorted(wanted, own[d]).to(self._device())
            name = f"{self.prefix}{operation.node.name}"
            return self.sliced.call(name, IndexAdd(d, at), self.get(base, keep), self.value(branch[0]))
        return None

    def channelwise(self, operation: Operation) -> fx.Node:
        node, keep = operation.node, self.kept((operation.node, 0))
        dims = kept_dims(operation, self.net) or {}
        inputs = {d: keep[at] for d, at in dims.items() if at in keep}
        x = self.get(operation.inputs[0], inputs)
        have = {at: keep[at] for d, at in dims.items() if at in keep}
        return self.get((node, 0), keep, have, self.copy(operation, {operation.inputs[0][0]: x}))

    def move(self, operation: Operation) -> Any:
        node = operation.node
        outputs = [self.kept((node, k)) for k in range(len(self.net.tensors(node)))]
        if not any(outputs) and not any(self.kept(place) for place in operation.inputs):
            return self.copy(operation, {place[0]: self.value(place[0]) for place in operation.inputs})
        found = find_move(operation, self.net, self.member.labels, outputs)
        if found is None:
            return self.barrier(operation, "its channels cannot be cut alike in its input and output")
        inputs, variant = found
        values = {
            place[0]: self.get(place, keep) if place[0].op != "get_attr" else self.constant(place[0], keep)
            for place, keep in zip(operation.inputs, inputs, strict=True)
        }
        return self.copy(operation, values, variant)

    def leaf(self, operation: Operation) -> fx.Node:
        place, node = operation.inputs[0], operation.node
        found = self.sliced.graph.node_copy(node, self.value)
        return self.get((node, 0), self.kept((node, 0)), self.kept(place), found)

    def along(self, operation: Operation) -> fx.Node:
        node, keep = operation.node, self.kept((operation.node, 0))
        have = {d: index for d, index in keep.items() if d not in operation.over}
        if any(d in self.kept(operation.inputs[0]) for d in operation.over):
            self._note(operation, f"{name_of(self.net, node)} reads all channels")
        x = self.get(operation.inputs[0], have)
        return self.get((node, 0), keep, have, self.copy(operation, {operation.inputs[0][0]: x}))

    def attention(self, operation: Operation) -> fx.Node:
        node, keep = operation.node, self.kept((operation.node, 0))
        rank = len(shape_of(self.net, (node, 0)))
        heads = {d: index for d, index in keep.items() if d < rank - 2}
        last = {rank - 1: keep[rank - 1]} if rank - 1 in keep else {}
        values: dict[fx.Node, Any] = {}
        for k, place in enumerate(operation.inputs):
            values[place[0]] = self.get(place, {**heads, **last} if k == 2 else self.aligned(place, heads, rank))
        for n in operation.constants:
            values[n] = self.constant(n, self.aligned((n, 0), heads, rank))
        have = {d: index for d, index in keep.items() if d != rank - 2}
        return self.get((node, 0), keep, have, self.copy(operation, values))

    def matmul(self, operation: Operation) -> fx.Node:
        node, keep = operation.node, self.kept((operation.node, 0))
        rank = len(shape_of(self.net, (node, 0)))
        one, other = operation.inputs
        size = shape_of(self.net, one)[-1]
        zero = [self.member.of(place).zero for place in operation.inputs]
        left = zero[0].reshape(-1, zero[0].shape[-1]).all(0).expand(size)
        right = zero[1].transpose(-1, -2).reshape(-1, zero[1].shape[-2]).all(0).expand(size)
        inner = (~(left | right)).nonzero().reshape(-1)
        batch = {d: index for d, index in keep.items() if d < rank - 2}
        keeps = [self.aligned(place, batch, rank) for place in operation.inputs]
        if rank - 2 in keep:
            keeps[0][rank - 2] = keep[rank - 2]
        if rank - 1 in keep:
            keeps[1][rank - 1] = keep[rank - 1]
        if len(inner) < size:
            keeps[0][rank - 1] = keeps[1][rank - 2] = inner
        values = {one[0]: self.get(one, keeps[0]), other[0]: self.get(other, keeps[1])}
        return self.copy(operation, values)

    def barrier(self, operation: Operation, why: str = "") -> Any:
        node = operation.node
        if any(self.kept(place) for place in operation.inputs):
            self._note(operation, why or operation.why)
        values = {n: self.whole(n) for n in {place[0] for place in operation.inputs}}
        if isinstance(self.net.module(node), Enter):
            enter = Enter(cast(Enter, self.net.module(node)).members, self.member.index)
            x, batch = (self.whole(cast(fx.Node, arg)) for arg in node.args)
            return self.sliced.call(f"{self.prefix}enter", enter, x, batch)
        found = self.copy(Operation(node, "barrier", operation.inputs, operation.constants), values)
        if not isinstance(self.net.facts[node].value, Tensor):
            return found
        return self.get((node, 0), self.kept((node, 0)), {}, found)

    def _note(self, operation: Operation, why: str) -> None:
        self.sliced.barriers.setdefault(operation.node.name, Barrier(operation.node.name, why))


BUILD: dict[str, Callable[..., Any]] = {
    "size": Slicer.size,
    "mask": Slicer.mask,
    "same": Slicer.same,
    "layer": Slicer.layer,
    "affine": Slicer.affine,
    "elementwise": Slicer.elementwise,
    "channelwise": Slicer.channelwise,
    "move": Slicer.move,
    "leaf": Slicer.leaf,
    "along": Slicer.along,
    "attention": Slicer.attention,
    "matmul": Slicer.matmul,
}


def same_index(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _covers(base: Keep, own: Keep, d: int) -> bool:
    """The branch has all that the other has along a dimension: it is the whole of the two."""
    return d in base and bool(torch.isin(base[d], own[d]).all()) and len(base[d]) < len(own[d])


def affine_module(affine: Any, index: Tensor | None, dtype: torch.dtype) -> nn.Module:
    """A BatchNorm or a scale that could not be folded, cut."""

    def cut(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x if index is None or x.numel() == 1 else x[index.to(x.device)]
        return x.to(dtype)

    return ChannelAffine(affine.dim, cast(Tensor, cut(affine.scale)), cut(affine.shift))


def shared_module(sliced: Sliced, node: fx.Node, module: nn.Module) -> str:
    """The name of a module that is called as it is, by whoever calls it."""
    target = f"shared.{node.target if node.op == 'call_module' else node.name}"
    try:
        found = sliced.root.get_submodule(target)
    except AttributeError:
        return sliced.add(target, module)
    if found is module:
        return target
    renamed = f"{target}_rest"
    try:
        return renamed if sliced.root.get_submodule(renamed) is module else sliced.add(renamed, module)
    except AttributeError:
        return sliced.add(renamed, module)


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
            cut = cut_layer(operation, member, {})
            env[node] = sliced.call(f"shared.{node.target}", cut.module, env[operation.inputs[0][0]])
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

"""The graph of a packed model: for each member the operations on the channels that it needs, with weights cut so."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from masksurgery.pack.cut_layers import cut_layer
from masksurgery.pack.cutting import Cutter, Keep, positions, same_index
from masksurgery.pack.families import Operation, name_of, sample_shape, shape_of
from masksurgery.pack.member import foldable_inputs, kept_dims
from masksurgery.pack.moves import find_move
from masksurgery.pack.nesting import is_sum
from masksurgery.pack.network import Enter
from masksurgery.pack.parts import ChannelAffine, IndexAdd, SliceAdd, widened
from masksurgery.pack.reuse import is_plain_sum
from masksurgery.pack.sliced import Barrier, affine_module, call_layer, shared_layer

NEARLY_WHOLE = 0.9
"""Share of a layer's input channels from which on it is not cut for each member: a classifier's weights are many."""


class Slicer(Cutter):
    """Builds the nodes of one member; what does not differ between members is built once, as `shared`."""

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
        if self._is_whole(operation):
            return call_layer(
                self.sliced, operation, shared_layer(self.sliced, operation), self.get(place, {}), self.value
            )
        cut = cut_layer(
            operation, self.member, self.kept((node, 0)), self.widening.zero_rows.get(node), self._reads(operation)
        )
        mixes_along_one = isinstance(cut.module, nn.Linear)  # a convolution mixes what stands beside each other, too
        others = {d: index for d, index in self.kept((node, 0)).items() if d != cut.dim and mixes_along_one}
        inputs = {**others, cut.dim: cut.inputs} if cut.inputs is not None else others
        name = self.sliced.add_layer(f"{self.prefix}{node.target}", cut)
        found = call_layer(self.sliced, operation, name, self.get(place, inputs), self.value)
        have = {**others, cut.dim: cut.outputs} if cut.outputs is not None else others
        return self.get((node, 0), self.kept((node, 0)), have, found)

    def _is_whole(self, operation: Operation) -> bool:
        """The members can share its weights: it reads all channels, or almost all of one vector for each sample."""
        node, place = operation.node, operation.inputs[0]
        own = node in self.widening.zero_rows or node in self.widening.masking or self.kept((node, 0))
        if operation.layer is None or own or self.is_alone:
            return False
        foldable, _ = foldable_inputs(operation, self.member)
        share = float((~foldable).double().mean())
        vector = math.prod(sample_shape(self.net, place)) == len(foldable)
        return share == 1 or (vector and share >= NEARLY_WHOLE)

    def _reads(self, operation: Operation) -> Tensor | None:
        """All channels that the input of a layer has, if it is to read them."""
        if operation.layer is None or operation.node not in self.widening.zero_columns:
            return None
        place, dim = operation.inputs[0], operation.layer.dim
        own = self.kept(place).get(dim)
        return torch.arange(shape_of(self.net, place)[dim]) if own is None else own

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
            nested = self.widening.keep.get(operation.node)  # the branch has the first channels then
            at = positions(wanted, own[d]).to(self._device())
            module = SliceAdd(d, len(at)) if nested else IndexAdd(d, at)
            name = f"{self.prefix}{operation.node.name}"
            return self.sliced.call(name, module, self.get(base, keep), self.value(branch[0]))
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
        places = [(node, k) for k in range(len(self.net.tensors(node)))]
        outputs = [self.kept(place) if place in self.needed and self.needed[place].any() else None for place in places]
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
        free = self.net.free
        if len(inner) < size and rank - 1 not in free.of(*one) and rank - 2 not in free.of(*other):
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
            self.keep.update({(node, k): {} for k in range(len(self.net.tensors(node)))})
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


def _covers(base: Keep, own: Keep, d: int) -> bool:
    """The branch has all that the other has along a dimension: it is the whole of the two."""
    return d in base and bool(torch.isin(base[d], own[d]).all()) and len(base[d]) < len(own[d])

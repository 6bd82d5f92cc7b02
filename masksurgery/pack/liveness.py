"""Which channels of which tensors a member needs: those that are neither known beforehand nor read by nobody.

Forwards: what is zero or constant since a mask. Backwards: what is read. Both follow the graph once, which is the fixed
point, as it has no cycles. A pattern is a boolean tensor with the dimensions of the tensor that it is about, of length
1 where all entries are alike; no pattern depends on the values of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from masksurgery.pack.families import Operation, Operations, Place, name_of, sample_shape, shape_of
from masksurgery.pack.moves import Labels, call, compress, trace_labels
from masksurgery.pack.network import Network


@dataclass(frozen=True)
class Known:
    """What is known of a tensor before the model runs.

    Attributes:
        zero: Where it is zero.
        constant: Where it is the same whatever the input is; zeros are among that.
        value: Which number [broadcasts with `constant`], in float64.
    """

    zero: Tensor
    constant: Tensor
    value: Tensor

    @classmethod
    def nothing(cls, rank: int) -> Known:
        none = torch.zeros([1] * rank, dtype=torch.bool)
        return cls(none, none, torch.zeros([1] * rank, dtype=torch.float64))

    @classmethod
    def zeros(cls, zero: Tensor) -> Known:
        zero = compress(zero)
        return cls(zero, zero, torch.zeros([1] * zero.dim(), dtype=torch.float64))

    @property
    def anything(self) -> bool:
        return bool(self.constant.any())


Needed = Mapping[Place, Tensor]


def reduce_any(pattern: Tensor, shape: Sequence[int]) -> Tensor:
    """To a shape that was broadcast to the pattern's: what any of the copies needs."""
    while pattern.dim() > len(shape):
        pattern = pattern.any(0)
    for d, size in enumerate(shape):
        if size == 1 and pattern.shape[d] > 1:
            pattern = pattern.any(d, keepdim=True)
    return pattern


def along(vector: Tensor, rank: int, dim: int) -> Tensor:
    """A vector as a pattern along one dimension."""
    shape = [1] * rank
    shape[dim] = -1
    return compress(vector.reshape(shape))


def vector_of(pattern: Tensor, dim: int, size: int, every: bool) -> Tensor:
    """What holds for all (or for any) of the places of each channel [size]."""
    others = [d for d in range(pattern.dim()) if d != dim]
    reduced = pattern.all if every else pattern.any
    flat = reduced(others) if others else pattern
    return flat.reshape(-1).expand(size)


# --- forwards --------------------------------------------------------------------------------------------------------


@dataclass
class Member:
    """What is known of the tensors of one member."""

    index: int
    operations: Operations
    known: dict[Place, Known]
    labels: Labels

    @property
    def net(self) -> Network:
        return self.operations.net

    def of(self, place: Place) -> Known:
        found = self.known.get(place)
        return Known.nothing(len(shape_of(self.net, place))) if found is None else found

    def mask(self, operation: Operation) -> Tensor:
        """The mask [c] at a site."""
        return self.net.masks[str(operation.node.args[1])].masks[self.index].cpu()


def find_known(operations: Operations, member: int, labels: Labels) -> Member:
    """Go forwards through the graph of one member."""
    found = Member(member, operations, {}, labels)
    for node in operations.net.graph.nodes:
        operation = operations[node]
        rule = KNOWN.get(operation.family)
        interesting = operation.family == "mask" or any(found.of(place).anything for place in operation.inputs)
        if rule is None or not interesting or node not in operations.net.dependent:
            continue
        for k, known in enumerate(rule(operation, found)):
            known = _of_all_samples(known, sample_shape(operations.net, (node, k)))
            if known.anything:
                found.known[node, k] = known
    return found


def _of_all_samples(known: Known, shape: Sequence[int]) -> Known:
    """What holds for every sample."""
    if all(size == 1 or shape[d] > 1 for d, size in enumerate(known.constant.shape)):
        return known
    zero = known.zero
    for d, size in enumerate(shape):
        if size == 1:
            zero = zero.all(d, keepdim=True)
    return Known.zeros(zero)


def _known_mask(operation: Operation, member: Member) -> list[Known]:
    known = member.of(operation.inputs[0])
    mask = member.net.masks[str(operation.node.args[1])]
    rank = len(shape_of(member.net, operation.inputs[0]))
    off = ~along(member.mask(operation), rank, mask.channel_dim % rank)
    value = known.value * member.operations.folding.rescale[operation.node]
    return [Known(known.zero | off, known.constant | off, torch.where(off, 0.0, value))]


def _known_same(operation: Operation, member: Member) -> list[Known]:
    return [member.of(operation.inputs[0])]


def _known_layer(operation: Operation, member: Member) -> list[Known]:
    layer, place = operation.layer, operation.inputs[0]
    assert layer is not None
    foldable, zero = foldable_inputs(operation, member)
    rank = len(shape_of(member.net, place))
    size = len(foldable) // layer.groups
    groups = foldable.reshape(layer.groups, size).all(1)
    if not groups.any():
        return [Known.nothing(rank)]
    outputs = layer.channels // layer.groups
    constant = groups.repeat_interleave(outputs)
    zeros = zero.reshape(layer.groups, size).all(1).repeat_interleave(outputs) & (not layer.has_bias)
    value = folded_bias(operation, member, foldable)
    shape = [1] * rank
    shape[layer.dim] = -1
    return [Known(along(zeros, rank, layer.dim), along(constant, rank, layer.dim), value.cpu().reshape(shape))]


def foldable_inputs(operation: Operation, member: Member) -> tuple[Tensor, Tensor]:
    """The input channels that a layer takes into its bias, and those of them that are zero [in]."""
    layer, place = operation.layer, operation.inputs[0]
    assert layer is not None
    known, size = member.of(place), shape_of(member.net, place)[layer.dim]
    zero = vector_of(known.zero, layer.dim, size, every=True)
    if layer.pads:
        return zero, zero
    uniform = known.value.numel() == known.value.shape[layer.dim]
    return (vector_of(known.constant, layer.dim, size, every=True) if uniform else zero), zero


def folded_bias(operation: Operation, member: Member, foldable: Tensor) -> Tensor:
    """The bias [out] with what the constant inputs contribute, in float64."""
    layer = operation.layer
    assert layer is not None
    bias, value = layer.bias(), member.of(operation.inputs[0]).value
    device = layer.module.weight.device
    total = torch.zeros(layer.channels, dtype=torch.float64, device=device) if bias is None else bias  # type: ignore[arg-type]
    if layer.pads or not value.any():  # with pads only zeros are folded
        return total
    inputs = torch.where(foldable, value.reshape(-1).expand(len(foldable)), 0.0).to(device)
    weight = layer.weight().double()
    sums = weight.reshape(*weight.shape[:3], -1).sum(3)
    return total + (sums * inputs.reshape(layer.groups, 1, -1)).sum(2).reshape(-1)


def _known_affine(operation: Operation, member: Member) -> list[Known]:
    known = member.of(operation.inputs[0])
    affine = member.operations.folding.affines[operation.node]
    scale, shift = (
        x if not isinstance(x, Tensor) or x.numel() == 1 else _along(x, known.value.dim(), affine.dim)
        for x in (affine.scale, affine.shift)
    )
    value = known.value * (scale.cpu() if isinstance(scale, Tensor) else scale)
    if shift is None:
        return [Known(known.zero, known.constant, value)]
    value = value + shift.cpu()
    if operation.module is None:
        return [Known(torch.zeros_like(known.zero), known.constant, value)]
    return _applied(operation, member, [Known(torch.zeros_like(known.zero), known.constant, value)])


def _along(vector: Tensor, rank: int, dim: int) -> Tensor:
    shape = [1] * rank
    shape[dim] = -1
    return vector.reshape(shape)


def _known_elementwise(operation: Operation, member: Member) -> list[Known]:
    return _applied(operation, member, [member.of(place) for place in operation.inputs])


def _applied(operation: Operation, member: Member, inputs: list[Known]) -> list[Known]:
    """An operation of each element by itself, on what is known of its inputs."""
    rank = len(shape_of(member.net, (operation.node, 0)))
    aligned = [_align(known, rank) for known in inputs]
    zero = torch.zeros([1] * rank, dtype=torch.bool)
    constant = torch.ones([1] * rank, dtype=torch.bool)
    for known in aligned:
        constant = constant & known.constant
    if is_product(operation, member.net):
        for known in aligned:
            zero = zero | known.zero
    elif not operation.constants and keeps_zero(operation, member.net):
        zero = torch.ones([1] * rank, dtype=torch.bool)
        for known in aligned:
            zero = zero & known.zero
    if bool((constant & ~zero).any()):
        value = _evaluate(operation, member.net, [known.value for known in aligned])
        if value is None or sum(size > 1 for size in value.shape) > 1:
            constant = zero
        else:
            return [Known(compress(zero), compress(constant | zero), torch.where(zero, 0.0, value))]
    return [Known.zeros(zero)]


def _align(known: Known, rank: int) -> Known:
    missing = [1] * (rank - known.zero.dim())
    return Known(*(x.reshape(*missing, *x.shape) for x in (known.zero, known.constant, known.value)))


def is_product(operation: Operation, net: Network) -> bool:
    name = name_of(net, operation.node)
    return operation.module is None and name.strip("_") in ("mul", "multiply") and not operation.node.kwargs


def keeps_zero(operation: Operation, net: Network) -> bool:
    """It makes zeros of zeros."""
    value = _evaluate(operation, net, [torch.zeros(1, dtype=torch.float64)] * len(operation.inputs))
    return value is not None and not value.any()


def _evaluate(operation: Operation, net: Network, values: list[Tensor]) -> Tensor | None:
    """What the operation makes of numbers; None if that cannot be said, for its parameters may have no values."""
    if operation.constants or (operation.module is not None and any(True for _ in operation.module.parameters())):
        return None
    try:
        found = call(operation, net, values)
    except (RuntimeError, TypeError, ValueError):
        return None
    return found.double() if isinstance(found, Tensor) and not found.is_meta else None


def _known_channelwise(operation: Operation, member: Member) -> list[Known]:
    """Means, maxima and the like: what is the same everywhere stays so if the operation keeps numbers."""
    place = operation.inputs[0]
    known, shape = member.of(place), shape_of(member.net, place)
    dims = kept_dims(operation, member.net)
    rank = len(shape_of(member.net, (operation.node, 0)))
    if dims is None or any(size > 1 and d not in dims for d, size in enumerate(known.constant.shape)):
        return [Known.nothing(rank)]
    sample = [1 if d in dims else size for d, size in enumerate(shape)]
    try:
        found = [call(operation, member.net, [torch.full(sample, x, dtype=torch.float64)]) for x in (0.0, 1.0, -2.0)]
    except (RuntimeError, TypeError, ValueError):
        return [Known.nothing(rank)]
    if found[0].any() or not found[0].is_floating_point():
        return [Known.nothing(rank)]
    keeps = bool((found[1] == 1).all() and (found[2] == -2).all())

    def moved(x: Tensor) -> Tensor:
        out = [1] * rank
        for d, at in dims.items():
            out[at] = x.shape[d]
        return x.permute(*sorted(range(x.dim()), key=lambda d: dims.get(d, -1))).reshape(out)

    zero = moved(known.zero)
    return [Known(zero, moved(known.constant), moved(known.value)) if keeps else Known.zeros(zero)]


def kept_dims(operation: Operation, net: Network) -> dict[int, int] | None:
    """Where each dimension of the input that is not touched stands in the output."""
    source, fact = operation.inputs[0][0], net.facts[operation.node]
    found: dict[int, int] = {}
    for d, dim in enumerate(net.facts[source].dims[0]):
        if len(dim) == 1:
            children = fact.children.get(dim[0], set())
            at = [k for k, out in enumerate(fact.dims[0]) if len(out) == 1 and out[0] in children]
            if len(at) == 1 and fact.dims[0][at[0]][0].size == dim[0].size:
                found[d] = at[0]
    return found if list(found.values()) == sorted(found.values()) else None


def _known_move(operation: Operation, member: Member) -> list[Known]:
    maps = trace_labels(operation, member.net, member.labels)
    if maps is None:
        return []
    inputs = [member.of(place) for place in operation.inputs]
    flat = [
        [x.expand(sample_shape(member.net, place)).reshape(-1) for x in (known.zero, known.constant, known.value)]
        for known, place in zip(inputs, operation.inputs, strict=True)
    ]
    pads = torch.tensor([True])  # what is padded is zero
    zero, constant = (torch.cat([pads, *(parts[i] for parts in flat)]) for i in (0, 1))
    value = torch.cat([torch.zeros(1, dtype=torch.float64), *(parts[2] for parts in flat)])
    found = []
    for labels in maps:
        fixed = compress(constant[labels])
        number = compress(torch.where(fixed, value[labels], 0.0))
        found.append(Known(compress(zero[labels]), fixed, number))
    return found


def _known_leaf(operation: Operation, member: Member) -> list[Known]:
    return [member.of(operation.inputs[0])]


def _known_attention(operation: Operation, member: Member) -> list[Known]:
    place = operation.inputs[2]
    zero = member.of(place).zero
    return [Known.zeros(zero.all(-2, keepdim=True))]


def _known_matmul(operation: Operation, member: Member) -> list[Known]:
    one, other = (member.of(place).zero for place in operation.inputs)
    return [Known.zeros(one.all(-1, keepdim=True) | other.all(-2, keepdim=True))]


KNOWN: dict[str, Callable[[Operation, Member], list[Known]]] = {
    "mask": _known_mask,
    "same": _known_same,
    "layer": _known_layer,
    "affine": _known_affine,
    "elementwise": _known_elementwise,
    "channelwise": _known_channelwise,
    "move": _known_move,
    "leaf": _known_leaf,
    "attention": _known_attention,
    "matmul": _known_matmul,
}
"""The families whose outputs can be known; of a barrier, a norm or a softmax nothing is."""


# --- backwards -------------------------------------------------------------------------------------------------------


def needed_inputs(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    """What an operation reads of each of its inputs.

    Args:
        needed: Of each of its outputs.
    """
    rule = NEEDED.get(operation.family)
    if rule is None:
        return [torch.ones([1] * len(shape_of(member.net, place)), dtype=torch.bool) for place in operation.inputs]
    return [compress(pattern) for pattern in rule(operation, member, needed)]


def _need_mask(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    mask = member.net.masks[str(operation.node.args[1])]
    rank = needed[0].dim()
    return [needed[0] & along(member.mask(operation), rank, mask.channel_dim % rank)]


def _need_same(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    return [needed[0]]


def _need_layer(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    layer = operation.layer
    assert layer is not None
    foldable, _ = foldable_inputs(operation, member)
    out = vector_of(needed[0], layer.dim, layer.channels, every=False)
    size = len(foldable) // layer.groups
    groups = out.reshape(layer.groups, -1).any(1).repeat_interleave(size)
    rank = needed[0].dim()
    wanted = along(groups & ~foldable, rank, layer.dim)
    if wanted.numel() > 1 or isinstance(layer.module, torch.nn.Linear):
        others = needed[0].any(layer.dim, keepdim=True) if isinstance(layer.module, torch.nn.Linear) else wanted
        return [wanted & others]
    return [wanted]


def _need_elementwise(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    found = []
    product, rank = is_product(operation, member.net), needed[0].dim()
    for place in operation.inputs:
        wanted = needed[0]
        if product:
            for other in operation.inputs:
                if other != place:
                    wanted = wanted & ~_align(member.of(other), rank).zero
        found.append(reduce_any(wanted, shape_of(member.net, place)))
    return found


def _need_channelwise(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    place = operation.inputs[0]
    dims, rank = kept_dims(operation, member.net), len(shape_of(member.net, place))
    out = [1] * rank
    if dims is None:
        return [torch.ones(out, dtype=torch.bool)]
    pattern = needed[0]
    for at, size in enumerate(pattern.shape):
        if size > 1 and at not in dims.values():
            pattern = pattern.any(at, keepdim=True)
    for d, at in dims.items():
        out[d] = pattern.shape[at]
    return [pattern.reshape(out)]


def _need_move(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    shapes = [sample_shape(member.net, place) for place in operation.inputs]
    whole = [torch.ones([1] * len(shape), dtype=torch.bool) for shape in shapes]
    if all(bool(pattern.all()) for pattern in needed):
        return whole
    maps = trace_labels(operation, member.net, member.labels)
    if maps is None:
        return whole
    sizes = [torch.Size(shape).numel() for shape in shapes]
    taken, read = (torch.zeros(1 + sum(sizes), dtype=torch.bool) for _ in range(2))
    for labels, pattern in zip(maps, needed, strict=True):
        taken[labels.reshape(-1)] = True
        wide = pattern.expand(torch.broadcast_shapes(pattern.shape, labels.shape))
        read[labels.expand(wide.shape)[wide]] = True
    wanted = read | ~taken  # what is left out counts as read: no image size is fixed for it
    parts = wanted[1:].split(sizes)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _need_along(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    return [needed[0].any(tuple(operation.over), keepdim=True) if operation.over else needed[0]]


def _need_attention(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    heads = needed[0].any(-1, keepdim=True).any(-2, keepdim=True)
    found = [heads, heads, needed[0].any(-2, keepdim=True)]
    return found + [reduce_any(heads, shape_of(member.net, place)) for place in operation.inputs[3:]]


def _need_matmul(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    one, other = (member.of(place).zero for place in operation.inputs)
    rows, columns = needed[0].any(-1, keepdim=True), needed[0].any(-2, keepdim=True)
    pairs = zip((rows & ~other.all(-1, keepdim=True).transpose(-1, -2), columns & ~one.all(-2, keepdim=True).transpose(-1, -2)),
                operation.inputs, strict=True)  # fmt: skip
    return [reduce_any(pattern, shape_of(member.net, place)) for pattern, place in pairs]


NEEDED: dict[str, Callable[[Operation, Member, Sequence[Tensor]], list[Tensor]]] = {
    "mask": _need_mask,
    "same": _need_same,
    "layer": _need_layer,
    "affine": _need_same,
    "elementwise": _need_elementwise,
    "channelwise": _need_channelwise,
    "move": _need_move,
    "leaf": _need_same,
    "along": _need_along,
    "attention": _need_attention,
    "matmul": _need_matmul,
}
"""The families that read less where less is needed; all others read everything."""


def find_needed(member: Member) -> dict[Place, Tensor]:
    """Go backwards: what of each tensor of one member is read by anybody."""
    net = member.net
    needed: dict[Place, Tensor] = {}
    for node in reversed(net.graph.nodes):
        if node not in net.dependent and node.op != "output":
            continue
        operation = member.operations[node]
        if operation.family == "size":
            continue
        outputs = [] if node.op == "output" else net.tensors(node)
        own = [needed.get((node, k), torch.zeros([1] * x.dim(), dtype=torch.bool)) for k, x in enumerate(outputs)]
        if not any(bool(pattern.any()) for pattern in own) and _only_sized(member, node):
            own = [~pattern for pattern in own]
            needed.update(((node, k), pattern) for k, pattern in enumerate(own))
        for place, pattern in zip(operation.inputs, needed_inputs(operation, member, own), strict=True):
            pattern = reduce_any(pattern, sample_shape(net, place))
            if not pattern.any() and any(bool(x.any()) for x in own):
                pattern = _first(torch.ones_like(pattern))  # a constant still needs the shape of what it is made of
            before = needed.get(place)
            needed[place] = pattern if before is None else compress(before | pattern)
    return needed


def _first(pattern: Tensor) -> Tensor:
    """The first entry of those in a pattern."""
    one = torch.zeros(pattern.numel(), dtype=torch.bool)
    one[pattern.reshape(-1).nonzero()[0]] = True
    return one.reshape(pattern.shape)


def _only_sized(member: Member, node: fx.Node) -> bool:
    """Its sizes are read, or it returns something beside tensors."""
    return any(member.operations[user].family == "size" for user in node.users)


Keeps = dict[Place, Mapping[int, Tensor]]
"""For each tensor the dimensions that are cut, and the indices that are kept there, in order."""


def find_keep(member: Member, needed: Mapping[Place, Tensor]) -> Keeps:
    """For each tensor the dimensions that are cut, and the indices that are kept there."""
    keep: Keeps = {}
    for place, pattern in needed.items():
        if place[0] not in member.net.dependent:
            continue
        live = pattern & ~member.of(place).constant
        if not live.any() and pattern.any():
            live = _first(pattern)
        cut: dict[int, Tensor] = {}
        for d, size in enumerate(live.shape if _can_be_cut(member, place[0]) else ()):
            others = [other for other in range(live.dim()) if other != d]
            kept = live.any(others) if others else live
            if size > 1 and not bool(kept.all()):
                cut[d] = kept.nonzero().reshape(-1)
        keep[place] = cut
    return keep


def _can_be_cut(member: Member, node: fx.Node) -> bool:
    """It is one tensor, or the tensors of it are read one by one."""
    if isinstance(member.net.facts[node].value, Tensor):
        return True
    return all(member.operations[user].family == "leaf" for user in node.users)

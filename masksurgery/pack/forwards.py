"""Forwards: what is known of the outputs of an operation by what is known of its inputs, family by family."""

from __future__ import annotations

import torch
from torch import Tensor

from masksurgery.pack.families import Operation, pattern_shape, shape_of
from masksurgery.pack.member import (
    Member,
    depends_on_sizes,
    evaluate,
    foldable_inputs,
    folded_bias,
    is_product,
    keeps_zero,
    kept_dims,
)
from masksurgery.pack.moves import call, trace_labels
from masksurgery.pack.patterns import Known, align, along, compress, numbers


def known_mask(operation: Operation, member: Member) -> list[Known]:
    known = member.of(operation.inputs[0])
    mask = member.net.masks[str(operation.node.args[1])]
    rank = len(shape_of(member.net, operation.inputs[0]))
    off = ~along(member.mask(operation), rank, mask.channel_dim % rank)
    value = known.value * member.operations.folding.rescale[operation.node]
    return [Known(known.zero | off, known.constant | off, torch.where(off, 0.0, value))]


def known_same(operation: Operation, member: Member) -> list[Known]:
    return [member.of(operation.inputs[0])]


def known_layer(operation: Operation, member: Member) -> list[Known]:
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
    return [Known(along(zeros, rank, layer.dim), along(constant, rank, layer.dim), numbers(value).reshape(shape))]


def known_affine(operation: Operation, member: Member) -> list[Known]:
    known = member.of(operation.inputs[0])
    affine = member.operations.folding.affines[operation.node]
    rank = known.value.dim()
    value = known.value * _along(affine.scale, rank, affine.dim)
    if affine.shift is None:
        return [Known(known.zero, known.constant, value)]
    value = value + _along(affine.shift, rank, affine.dim)
    found = Known(torch.zeros_like(known.zero), known.constant, value)
    return [found] if operation.module is None else applied(operation, member, [found])


def _along(vector: Tensor | float, rank: int, dim: int) -> Tensor:
    shape = [1] * rank
    shape[dim] = -1
    return numbers(vector).reshape(shape)


def known_elementwise(operation: Operation, member: Member) -> list[Known]:
    return applied(operation, member, [member.of(place) for place in operation.inputs])


def applied(operation: Operation, member: Member, inputs: list[Known]) -> list[Known]:
    """An operation of each element by itself, on what is known of its inputs."""
    rank = len(shape_of(member.net, (operation.node, 0)))
    aligned = [align(known, rank) for known in inputs]
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
    if bool((constant & ~zero).any()) and not depends_on_sizes(operation, member.net):
        value = evaluate(operation, member.net, [known.value for known in aligned])
        if value is not None and sum(size > 1 for size in value.shape) <= 1:
            return [Known(compress(zero), compress(constant | zero), torch.where(zero, 0.0, value))]
    return [Known.zeros(zero)]


def known_channelwise(operation: Operation, member: Member) -> list[Known]:
    """Means, maxima and the like: what is the same everywhere stays so if the operation keeps numbers."""
    place = operation.inputs[0]
    known, shape = member.of(place), shape_of(member.net, place)
    dims = kept_dims(operation, member.net)
    rank = len(shape_of(member.net, (operation.node, 0)))
    mixed = [d for d in range(len(shape)) if dims is None or d not in dims]
    if dims is None or any(known.constant.shape[d] > 1 for d in mixed):
        return [Known.nothing(rank)]
    if any(known.value.shape[d] > 1 for d in mixed):
        known = Known.zeros(known.zero)
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


def known_move(operation: Operation, member: Member) -> list[Known]:
    maps = trace_labels(operation, member.net, member.labels)
    if maps is None:
        return []
    inputs = [member.of(place) for place in operation.inputs]
    flat = [
        [x.expand(pattern_shape(member.net, place)).reshape(-1) for x in (known.zero, known.constant, known.value)]
        for known, place in zip(inputs, operation.inputs, strict=True)
    ]
    zero, constant = (torch.cat([torch.tensor([True]), *(parts[i] for parts in flat)]) for i in (0, 1))
    value = torch.cat([torch.zeros(1, dtype=torch.float64), *(parts[2] for parts in flat)])
    found = []
    for labels in maps:
        if not labels.all():  # it pads with zeros, and where it does is left to the size of the image
            found.append(Known.zeros(_without_pads(zero[labels], labels == 0)))
            continue
        fixed = compress(constant[labels])
        found.append(Known(compress(zero[labels]), fixed, compress(torch.where(fixed, value[labels], 0.0))))
    return found


def _without_pads(zero: Tensor, pads: Tensor) -> Tensor:
    """A pattern without the dimensions along which nothing but its padding differs."""
    for d in range(zero.dim()):
        every, only = zero.all(d, keepdim=True), pads.all(d, keepdim=True)
        beside = (zero & ~pads).any(d, keepdim=True)
        if bool(((every == beside) | only).all()):
            zero, pads = every, only
    return zero


def known_attention(operation: Operation, member: Member) -> list[Known]:
    place = operation.inputs[2]
    zero = member.of(place).zero
    return [Known.zeros(zero.all(-2, keepdim=True))]


def known_matmul(operation: Operation, member: Member) -> list[Known]:
    one, other = (member.of(place).zero for place in operation.inputs)
    return [Known.zeros(one.all(-1, keepdim=True) | other.all(-2, keepdim=True))]

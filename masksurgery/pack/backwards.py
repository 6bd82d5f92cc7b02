"""Backwards: what an operation reads of its inputs by what is read of its outputs, family by family."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from masksurgery.pack.families import Operation, pattern_shape, shape_of
from masksurgery.pack.member import Member, foldable_inputs, is_product, kept_dims
from masksurgery.pack.moves import trace_labels
from masksurgery.pack.patterns import align, along, reduce_any, vector_of


def need_mask(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    mask = member.net.masks[str(operation.node.args[1])]
    rank = needed[0].dim()
    return [needed[0] & along(member.mask(operation), rank, mask.channel_dim % rank)]


def need_same(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    return [needed[0]]


def need_layer(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
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


def need_elementwise(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    found = []
    product, rank = is_product(operation, member.net), needed[0].dim()
    for place in operation.inputs:
        wanted = needed[0]
        if product:
            for other in operation.inputs:
                if other != place:
                    wanted = wanted & ~align(member.of(other), rank).zero
        found.append(reduce_any(wanted, shape_of(member.net, place)))
    return found


def need_channelwise(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
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


def need_move(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    shapes = [pattern_shape(member.net, place) for place in operation.inputs]
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


def need_along(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    return [needed[0].any(tuple(operation.over), keepdim=True) if operation.over else needed[0]]


def need_attention(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    heads = needed[0].any(-1, keepdim=True).any(-2, keepdim=True)
    found = [heads, heads, needed[0].any(-2, keepdim=True)]
    return found + [reduce_any(heads, shape_of(member.net, place)) for place in operation.inputs[3:]]


def need_matmul(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    one, other = (member.of(place).zero for place in operation.inputs)
    inner = ~(one.all(-2, keepdim=True).transpose(-1, -2) | other.all(-1, keepdim=True))  # [..., k, 1]: zero in neither
    rows, columns = needed[0].any(-1, keepdim=True), needed[0].any(-2, keepdim=True)
    patterns = (rows & inner.transpose(-1, -2), columns & inner)
    shapes = (shape_of(member.net, place) for place in operation.inputs)
    return [reduce_any(pattern, shape) for pattern, shape in zip(patterns, shapes, strict=True)]

"""Sums along a stream whose channels can stand in an order that puts those of the sum before first.

What a stream holds then is a slice of what it holds later, and a sum adds to a slice instead of at indices.
"""

from __future__ import annotations

from torch import fx

from masksurgery.pack.families import Operation, name_of, sample_shape, shape_of
from masksurgery.pack.liveness import Keeps
from masksurgery.pack.member import Member, kept_dims

SMALL = 16
"""How many times smaller than a sum a tensor is whose channels may be put in order again."""


def find_nested(member: Member, keeps: Keeps) -> set[fx.Node]:
    """The sums all of whose readers can do with any order of channels."""
    found = {node for node in member.net.dependent if _can_be_nested(node, member, keeps)}
    while True:
        stays = {node for node in found if _read_in_any_order(node, member, keeps, found)}
        if stays == found:
            return found
        found = stays


def _can_be_nested(node: fx.Node, member: Member, keeps: Keeps) -> bool:
    operation = member.operations[node]
    if (node, 0) not in keeps or not is_sum(operation, member) or len(set(operation.inputs)) != 2:
        return False
    places = ((node, 0), *operation.inputs)
    known = [member.of(place) for place in places]
    dims = {d for place in places for d in keeps.get(place, {})}
    alike = len(dims) == 1 and all(len(keeps.get(place, {})) == 1 for place in places)
    return alike and not any(bool((k.constant & ~k.zero).any()) for k in known)


def _read_in_any_order(node: fx.Node, member: Member, keeps: Keeps, nested: set[fx.Node]) -> bool:
    (d,) = keeps[node, 0]
    size = _numel(node, member)
    stack = [node]
    while stack:
        source = stack.pop()
        for reader in member.net.readers(source):
            operation = member.operations[reader]
            mixes = operation.layer is not None and operation.layer.groups == 1 and operation.layer.dim == d
            if reader in nested or mixes or _numel(source, member) * SMALL <= size:
                continue
            if reader.op == "output" or not passes_on(operation, member, d):
                return False
            stack.append(reader)
    return True


def passes_on(operation: Operation, member: Member, d: int) -> bool:
    """It does the same to all channels along a dimension, and leaves them where they are."""
    if len(operation.inputs) != 1 or operation.constants:
        return False
    if operation.family == "channelwise":
        return (kept_dims(operation, member.net) or {}).get(d) == d
    return operation.family in ("same", "elementwise")


def is_sum(operation: Operation, member: Member) -> bool:
    """It adds two tensors of one shape, and nothing else."""
    if operation.family != "elementwise" or name_of(member.net, operation.node).strip("_") != "add":
        return False
    if len(operation.inputs) != 2 or operation.constants or operation.node.kwargs:
        return False
    return len({shape_of(member.net, place) for place in operation.inputs}) == 1


def _numel(node: fx.Node, member: Member) -> int:
    total = 1
    for size in sample_shape(member.net, (node, 0)):
        total *= size
    return total

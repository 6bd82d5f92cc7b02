"""Which channels of which tensors a member needs: those that are neither known beforehand nor read by nobody.

Forwards: what is zero or constant since a mask. Backwards: what is read. Both follow the graph once, which is the fixed
point, as it has no cycles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from masksurgery.pack import backwards, forwards
from masksurgery.pack.families import Operation, Operations, Place, pattern_shape, shape_of
from masksurgery.pack.member import Member
from masksurgery.pack.moves import Labels
from masksurgery.pack.patterns import Known, compress, reduce_any


class Rule(NamedTuple):
    """What a family does with channels.

    Attributes:
        known: What is known of its outputs by what is known of its inputs; None: nothing.
        needed: What it reads of its inputs by what is read of its outputs.
    """

    known: Callable[[Operation, Member], list[Known]] | None
    needed: Callable[[Operation, Member, Sequence[Tensor]], list[Tensor]]


RULES = {
    "mask": Rule(forwards.known_mask, backwards.need_mask),
    "same": Rule(forwards.known_same, backwards.need_same),
    "leaf": Rule(forwards.known_same, backwards.need_same),
    "layer": Rule(forwards.known_layer, backwards.need_layer),
    "affine": Rule(forwards.known_affine, backwards.need_same),
    "elementwise": Rule(forwards.known_elementwise, backwards.need_elementwise),
    "channelwise": Rule(forwards.known_channelwise, backwards.need_channelwise),
    "move": Rule(forwards.known_move, backwards.need_move),
    "along": Rule(None, backwards.need_along),
    "attention": Rule(forwards.known_attention, backwards.need_attention),
    "matmul": Rule(forwards.known_matmul, backwards.need_matmul),
}
"""By family. Of a family without a rule, a barrier, nothing is known, and it reads everything."""


def find_known(operations: Operations, member: int, labels: Labels) -> Member:
    """Go forwards through the graph of one member."""
    found = Member(member, operations, {}, labels)
    for node in operations.net.graph.nodes:
        operation = operations[node]
        rule = RULES[operation.family].known if operation.family in RULES else None
        interesting = operation.family == "mask" or any(found.of(place).anything for place in operation.inputs)
        if rule is None or not interesting or node not in operations.net.dependent:
            continue
        for k, known in enumerate(rule(operation, found)):
            known = _of_all(known, pattern_shape(operations.net, (node, k)))
            if known.anything:
                found.known[node, k] = known
    return found


def _of_all(known: Known, shape: Sequence[int]) -> Known:
    """What holds for every sample, and all along free dimensions."""
    if all(size == 1 or shape[d] > 1 for x in (known.constant, known.value) for d, size in enumerate(x.shape)):
        return known
    zero = known.zero
    for d, size in enumerate(shape):
        if size == 1:
            zero = zero.all(d, keepdim=True)
    return Known.zeros(zero)


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
            pattern = reduce_any(pattern, pattern_shape(net, place))
            if not pattern.any() and any(bool(x.any()) for x in own):
                pattern = _first(torch.ones_like(pattern))  # a constant still needs the shape of what it is made of
            before = needed.get(place)
            needed[place] = pattern if before is None else compress(before | pattern)
    return needed


def needed_inputs(operation: Operation, member: Member, needed: Sequence[Tensor]) -> list[Tensor]:
    """What an operation reads of each of its inputs.

    Args:
        needed: Of each of its outputs.
    """
    rule = RULES.get(operation.family)
    if rule is None:
        return [torch.ones([1] * len(shape_of(member.net, place)), dtype=torch.bool) for place in operation.inputs]
    return [compress(pattern) for pattern in rule.needed(operation, member, needed)]


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
        live = pattern & ~member.of(place).restorable
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

"""Dense packing: where zeros in weights take the place of gathering and scattering channels.

On CPUs a matrix product with rows of zeros is often faster than the copy that an index-add or a selection makes, above
all where the channels stand last in memory. Such a choice changes what is kept of some tensors, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from masksurgery.pack.families import Operation
from masksurgery.pack.liveness import Keeps
from masksurgery.pack.member import Member, keeps_zero, kept_dims
from masksurgery.pack.moves import find_move
from masksurgery.pack.nesting import find_nested, is_sum, passes_on

Keep = Mapping[int, Tensor]


@dataclass
class Widening:
    """What is kept beyond what is needed.

    Attributes:
        keep: For the tensors where that changes.
        zero_rows: Layers that make zeros for the output channels that they would not have to make: what they had to.
        zero_columns: Layers that read, and do not use, input channels that they would not have to read.
        masking: Those of them that do what a mask before them would have done.
        passed: Masks that are not computed, because a layer before or after them does it.
        wide: Tensors with zeros for channels that are not needed.
    """

    keep: dict[fx.Node, Keep] = field(default_factory=dict)
    zero_rows: dict[fx.Node, Keep] = field(default_factory=dict)
    zero_columns: set[fx.Node] = field(default_factory=set)
    masking: set[fx.Node] = field(default_factory=set)
    passed: set[fx.Node] = field(default_factory=set)
    wide: set[fx.Node] = field(default_factory=set)


def widen(member: Member, keeps: Keeps, every_sum: bool = False) -> Widening:
    """Choose what to compute densely: sums with their branches, and what is made of a tensor that all members share.

    Args:
        every_sum: Let sums have all channels even if what they add has to be filled up, so that all members are alike.
    """
    result = Widening()
    nested = set() if every_sum else find_nested(member, keeps)
    for node in member.net.graph.nodes:
        if node not in member.net.dependent or (node, 0) not in keeps:
            continue
        operation = member.operations[node]
        if operation.family == "mask" and operation.inputs[0][0] not in member.net.dependent:
            _absorb(member, keeps, node, result)
        elif is_sum(operation, member):
            if node not in nested or not _nest(operation, member, keeps, result):
                _widen_sum(operation, member, keeps, result, every_sum)
        elif operation.layer is not None and operation.layer.groups == 1 and operation.inputs[0][0] in result.keep:
            result.zero_columns.add(node)
        elif operation.inputs and operation.inputs[0][0] in result.wide:
            keep = result.keep[operation.inputs[0][0]]
            if passes_on(operation, member, *keep) if keep else _works_on_all(operation, member):
                result.keep[node] = keep
                result.wide.add(node)
    return result


def _keeps_channels(operation: Operation, member: Member) -> bool:
    """Zeros in its input are zeros in its output."""
    if operation.family == "elementwise":
        return len(operation.inputs) == 1 and not operation.constants and keeps_zero(operation, member.net)
    return operation.family == "same"


def _widen_sum(operation: Operation, member: Member, keeps: Keeps, result: Widening, always: bool) -> None:
    """Let a sum have all channels, if what it adds can have them."""
    own = keeps[operation.node, 0]
    if own and all(place[0] not in result.keep and _alike(keeps.get(place, {}), own) for place in operation.inputs):
        return
    chains = []
    for place in operation.inputs:
        is_full = place[0] in result.wide or (place[0] not in result.keep and not keeps.get(place))
        chains.append([] if is_full else _branch(member, keeps, place[0], result))
    if not always and all(chain is None for chain in chains):
        return
    for chain in chains:
        _widen_branch(chain or [], {}, member, keeps, result)
    result.keep[operation.node] = {}
    result.wide.add(operation.node)


def _nest(operation: Operation, member: Member, keeps: Keeps, result: Widening) -> bool:
    """Let a sum have the channels of one input first, and the other make all that the sum has, in this order."""
    (d,) = keeps[operation.node, 0]
    branches = {}
    for place in operation.inputs:
        chain = None if place[0] in result.keep else _branch(member, keeps, place[0], result)
        if chain is not None and all(set(keeps[node, 0]) == {d} for node in chain):
            branches[place] = chain
    if not branches:
        return False
    wide = min(branches, key=lambda place: member.operations[branches[place][-1]].layer.fan_in)  # type: ignore[union-attr]
    (base,) = (place for place in operation.inputs if place != wide)
    first = result.keep.get(base[0], keeps[base]).get(d)
    if first is None:
        return False
    rest = keeps[operation.node, 0][d]
    order = {d: torch.cat([first, rest[~torch.isin(rest, first)]])}
    _widen_branch(branches[wide], order, member, keeps, result)
    result.keep[operation.node] = order
    result.wide.add(operation.node)
    return True


def _widen_branch(chain: list[fx.Node], keep: Keep, member: Member, keeps: Keeps, result: Widening) -> None:
    """Let a branch have more channels, which its layer makes of nothing."""
    for node in chain:
        result.keep[node] = keep
        if member.operations[node].family == "mask":
            result.passed.add(node)
    if chain:
        result.zero_rows[chain[-1]] = keeps[chain[-1], 0]


def _alike(one: Keep, other: Keep) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[d], other[d]) for d in one)


def _branch(member: Member, keeps: Keeps, node: fx.Node, result: Widening) -> list[fx.Node] | None:
    """The nodes from what a sum adds back to the layer that makes it; None if there is no such layer.

    That layer can make zeros for the channels that it lacks.
    """
    if bool(_constant(member, node).any()):
        return None
    chain: list[fx.Node] = []
    while True:
        if (node, 0) not in keeps or node in result.keep or len(member.net.readers(node)) != 1:
            return None
        chain.append(node)
        operation = member.operations[node]
        if operation.layer is not None:
            alone = operation.layer.groups == 1 and not set(keeps[node, 0]) - {operation.layer.dim}
            return chain if alone and keeps[node, 0] else None
        if operation.family == "move" and len(operation.inputs) == 1:
            found = find_move(operation, member.net, member.labels, [{}])
            if found is None or found[0][0]:
                return None
        elif operation.family != "mask" and not _keeps_channels(operation, member):
            return None
        node = operation.inputs[0][0]


def _constant(member: Member, node: fx.Node) -> Tensor:
    known = member.of((node, 0))
    return known.constant & ~known.zero


def _absorb(member: Member, keeps: Keeps, mask: fx.Node, result: Widening) -> None:
    """Leave the mask of a shared tensor to the layers that read what is made of it."""
    layers: set[fx.Node] = set()
    path, stack = [mask], [mask]
    while stack:
        source = stack.pop()
        for reader in member.net.readers(source):
            if reader.op == "output":
                return
            operation = member.operations[reader]
            if operation.layer is not None and operation.layer.groups == 1:
                if set(keeps[source, 0]) != {operation.layer.dim}:  # what it mixes are not the masked channels
                    return
                layers.add(reader)
            elif _works_on_all(operation, member) and keeps.get((reader, 0)):  # else it is no longer known what is zero
                path.append(reader)
                stack.append(reader)
            else:
                return
    result.keep.update({node: {} for node in path})
    result.zero_columns |= layers
    result.masking |= layers
    result.passed.add(mask)


def _works_on_all(operation: Operation, member: Member) -> bool:
    """Its channels do not meet, so that those which are not read do no harm."""
    if not isinstance(member.net.facts[operation.node].value, Tensor) or len(operation.inputs) != 1:
        return False
    if operation.layer is not None:  # depthwise
        return operation.layer.groups == member.net.tensors(operation.inputs[0][0])[0].shape[operation.layer.dim]
    if operation.family == "channelwise":
        return kept_dims(operation, member.net) is not None
    return operation.family in ("same", "elementwise", "move") and not operation.constants

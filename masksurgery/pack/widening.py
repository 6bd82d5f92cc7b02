"""Dense packing: where zeros in weights take the place of gathering and scattering channels.

On CPUs a matrix product with rows of zeros is often faster than the copy that an index-add or a selection makes, above
all where the channels stand last in memory. Such a choice changes what is kept of some tensors, and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from masksurgery.pack.families import Operation, name_of, shape_of
from masksurgery.pack.liveness import Keeps, Member, keeps_zero, kept_dims
from masksurgery.pack.moves import find_move

Keep = Mapping[int, Tensor]


@dataclass
class Widening:
    """What is kept beyond what is needed.

    Attributes:
        keep: For the tensors where that changes.
        zero_rows: Layers that make zeros for the output channels that they would not have to make: what they had to.
        zero_columns: Layers that read, and do not use, input channels that they would not have to read.
        passed: Masks that are not computed, because a layer before or after them does it.
    """

    keep: dict[fx.Node, Keep] = field(default_factory=dict)
    zero_rows: dict[fx.Node, Keep] = field(default_factory=dict)
    zero_columns: set[fx.Node] = field(default_factory=set)
    passed: set[fx.Node] = field(default_factory=set)


def widen(member: Member, keeps: Keeps) -> Widening:
    """Choose what to compute densely: the branches of sums, and what is made of a tensor that all members share."""
    result = Widening()
    for node in member.net.graph.nodes:
        if node not in member.net.dependent or node.op == "output" or (node, 0) not in keeps:
            continue
        operation = member.operations[node]
        if operation.family == "mask" and operation.inputs[0][0] not in member.net.dependent:
            _absorb(member, keeps, node, result)
    for node in reversed(member.net.graph.nodes):
        if node in member.net.dependent and node.op != "output" and (node, 0) in keeps:
            operation = member.operations[node]
            if is_sum(operation, member):
                for place in operation.inputs:
                    _fill_branch(member, keeps, place[0], keeps[node, 0], result)
    return result


def is_sum(operation: Operation, member: Member) -> bool:
    """It adds two tensors of one shape, and nothing else."""
    if operation.family != "elementwise" or name_of(member.net, operation.node).strip("_") != "add":
        return False
    if len(operation.inputs) != 2 or operation.constants or operation.node.kwargs:
        return False
    return len({shape_of(member.net, place) for place in operation.inputs}) == 1


def _fill_branch(member: Member, keeps: Keeps, node: fx.Node, wanted: Keep, result: Widening) -> None:
    """Let the layer at the beginning of a branch make the zeros that the sum needs."""
    chain: list[tuple[fx.Node, Keep]] = []
    while True:
        own = keeps.get((node, 0))
        if own is None or node in result.keep or len(member.net.readers(node)) != 1:
            return
        if not chain and (not _holds(wanted, own) or bool((_constant(member, node)).any())):
            return
        chain.append((node, wanted))
        operation = member.operations[node]
        if operation.family == "layer":
            break
        if operation.family == "move":
            found = find_move(operation, member.net, member.labels, [wanted])
            if found is None or len(operation.inputs) != 1:
                return
            wanted = found[0][0]
        elif operation.family == "elementwise":
            if len(operation.inputs) != 1 or operation.constants or not keeps_zero(operation, member.net):
                return
        elif operation.family not in ("mask", "same"):
            return
        node = operation.inputs[0][0]
    layer = operation.layer
    if layer is None or layer.groups != 1 or set(wanted) - {layer.dim}:
        return
    result.zero_rows[node] = keeps[node, 0]
    for changed, keep in chain:
        result.keep[changed] = keep
        if member.operations[changed].family == "mask":
            result.passed.add(changed)


def _constant(member: Member, node: fx.Node) -> Tensor:
    known = member.of((node, 0))
    return known.constant & ~known.zero


def _holds(wanted: Keep, own: Keep) -> bool:
    """There is more in the one than in the other, and all that is in the other."""
    differ = {d for d in {*wanted, *own} if not (d in wanted and d in own and torch.equal(wanted[d], own[d]))}
    return bool(differ) and all(
        d in own and (d not in wanted or bool(torch.isin(own[d], wanted[d]).all())) for d in differ
    )


def _absorb(member: Member, keeps: Keeps, mask: fx.Node, result: Widening) -> None:
    """Leave the mask of a shared tensor to the layers that read what is made of it."""
    layers: set[fx.Node] = set()
    path, stack = [mask], [mask]
    while stack:
        for reader in member.net.readers(stack.pop()):
            if reader.op == "output":
                return
            operation = member.operations[reader]
            if operation.layer is not None and operation.layer.groups == 1:
                layers.add(reader)
            elif _works_on_all(operation, member):
                path.append(reader)
                stack.append(reader)
            else:
                return
    result.keep.update(dict.fromkeys(path, {}))
    result.zero_columns |= layers
    result.passed.add(mask)


def _works_on_all(operation: Operation, member: Member) -> bool:
    """Its channels do not meet, so that those which are not read do no harm."""
    if not isinstance(member.net.facts[operation.node].value, Tensor) or len(operation.inputs) != 1:
        return False
    if operation.family == "channelwise":
        return kept_dims(operation, member.net) is not None
    return operation.family in ("same", "elementwise", "move") and not operation.constants

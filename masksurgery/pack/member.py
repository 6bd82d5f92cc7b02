"""One member: what is known of its tensors, and what its masks make of the operations of a network."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from masksurgery.pack.families import Operation, Operations, Place, name_of, shape_of
from masksurgery.pack.moves import Labels, call
from masksurgery.pack.network import Network
from masksurgery.pack.patterns import Known, vector_of

DIVISIONS = ("truediv", "div", "divide", "true_divide")


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
        return self.net.rows[str(operation.node.args[1])][self.index]


def is_product(operation: Operation, net: Network) -> bool:
    name = name_of(net, operation.node)
    return operation.module is None and name.strip("_") in ("mul", "multiply") and not operation.node.kwargs


def depends_on_sizes(operation: Operation, net: Network) -> bool:
    """It reads a number that changes with the size of the inputs."""
    return any(node in net.free.numbers for node in operation.node.all_input_nodes)


def keeps_zero(operation: Operation, net: Network) -> bool:
    """It makes zeros of zeros."""
    if depends_on_sizes(operation, net) and name_of(net, operation.node).strip("_") not in DIVISIONS:
        return False
    value = evaluate(operation, net, [torch.zeros(1, dtype=torch.float64)] * len(operation.inputs))
    return value is not None and not value.any()


def evaluate(operation: Operation, net: Network, values: list[Tensor]) -> Tensor | None:
    """What the operation makes of numbers; None if that cannot be said, for its parameters may have no values."""
    if operation.constants or (operation.module is not None and any(True for _ in operation.module.parameters())):
        return None
    try:
        found = call(operation, net, values)
    except (RuntimeError, TypeError, ValueError):
        return None
    return found.double() if isinstance(found, Tensor) and not found.is_meta else None


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
    if list(found.values()) != sorted(found.values()):
        return None
    spatial = _window_dims(operation, net)  # a window may leave a size as it is
    return {d: at for d, at in found.items() if d < len(net.facts[source].dims[0]) - spatial}


def _window_dims(operation: Operation, net: Network) -> int:
    """Along how many of the last dimensions a pooling or an interpolation mixes neighbours."""
    name = name_of(net, operation.node)
    if "interpolate" in name or "upsample" in name.lower():
        return len(shape_of(net, operation.inputs[0])) - 2
    found = re.search(r"pool(?:ing)?(\d)d", name, re.IGNORECASE)
    return int(found[1]) if found else 0


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
    device = layer.parameter.device
    total = torch.zeros(layer.channels, dtype=torch.float64, device=device) if bias is None else bias
    uniform = value.numel() == value.shape[layer.dim]
    if layer.pads or not uniform or not value.any():  # else only zeros are folded
        return total
    inputs = torch.where(foldable, value.reshape(-1).expand(len(foldable)), 0.0).to(device)
    weight = layer.weight().double()
    sums = weight.reshape(*weight.shape[:3], -1).sum(3)
    return total + (sums * inputs.reshape(layer.groups, 1, -1)).sum(2).reshape(-1)

"""Convolutions and Linear layers with some of their input and output channels."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from masksurgery.pack.families import Operation
from masksurgery.pack.layers import Layer
from masksurgery.pack.member import Member, foldable_inputs, folded_bias


@dataclass(frozen=True)
class CutLayer:
    """A layer with fewer channels.

    Attributes:
        module: It.
        dim: Where the channels are.
        inputs: Which it reads, in order; None for all.
        outputs: Which it makes; None for all.
    """

    module: nn.Module
    dim: int
    inputs: Tensor | None
    outputs: Tensor | None


def cut_layer(
    operation: Operation,
    member: Member,
    keep: Mapping[int, Tensor],
    live: Mapping[int, Tensor] | None = None,
    reads: Tensor | None = None,
) -> CutLayer:
    """Cut a layer on both sides: to the outputs that are kept, and to the inputs that are no constants.

    A grouped convolution keeps the groups that have an output, each with as many channels as the largest of them.

    Args:
        keep: What is kept of its output; in any order if there is one group.
        live: What of that is not zero; None for all.
        reads: Which inputs to read, in this order, zeros for those that it would leave out. For one group.
    """
    layer = operation.layer
    assert layer is not None
    foldable, zero = foldable_inputs(operation, member)
    alive, rows, columns = _choose(layer, keep.get(layer.dim), ~foldable)
    columns = columns if reads is None else reads[None]
    inputs = (alive[:, None] * (len(foldable) // layer.groups) + columns).reshape(-1)
    outputs = (alive[:, None] * (layer.channels // layer.groups) + rows).reshape(-1)
    left_out = foldable.clone()
    if reads is None:
        left_out[inputs] = False
    bias = folded_bias(operation, member, left_out)[outputs] if layer.has_bias or (left_out & ~zero).any() else None
    weight = layer.weight(alive, rows, columns)
    if reads is not None:
        weight = weight * ~foldable[reads].to(weight.device).reshape(1, 1, -1, *[1] * (weight.dim() - 3))
    if live is not None:
        made = torch.isin(outputs, live[layer.dim]).to(weight.device)
        weight = weight * made.reshape(1, -1, *[1] * (weight.dim() - 2))
        bias = None if bias is None else bias * made
    module = _with_weights(layer, weight, bias)
    return CutLayer(module, layer.dim, _unless_all(inputs, len(foldable)), _unless_all(outputs, layer.channels))


def whole_layer(operation: Operation) -> nn.Module:
    """A layer with all of its channels, and with what is folded into it."""
    assert operation.layer is not None
    return _with_weights(operation.layer, operation.layer.weight(), operation.layer.bias())


def _choose(layer: Layer, keep: Tensor | None, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The groups to keep, and of each its outputs and inputs, as indices within the group."""
    wanted = torch.zeros(layer.channels, dtype=torch.bool)
    wanted[slice(None) if keep is None else keep] = True
    rows, columns = wanted.reshape(layer.groups, -1), read.reshape(layer.groups, -1)
    alive = rows.any(1).nonzero().reshape(-1)
    in_order = _largest_first(rows[alive]) if keep is None or layer.groups > 1 else keep[None]
    return alive, in_order, _largest_first(columns[alive])


def _unless_all(index: Tensor, size: int) -> Tensor | None:
    return None if torch.equal(index, torch.arange(size)) else index


def _largest_first(chosen: Tensor) -> Tensor:
    """Which of each row [groups, size] are chosen, all rows filled up to the longest: indices, in order."""
    longest = max(int(chosen.sum(1).max()), 1)
    order = torch.argsort((~chosen).to(torch.uint8), dim=1, stable=True)
    return order[:, :longest].sort(1).values


def _with_weights(layer: Layer, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer's module with other weights [groups, out / groups, in / groups, ...]."""
    old = layer.module
    groups, outputs, inputs = weight.shape[:3]
    weight = (weight.transpose(1, 2) if layer.transposed else weight).flatten(0, 1)
    module: nn.Module = copy.copy(old)
    made = {"weight": weight, "bias": bias}
    module.__dict__["_parameters"] = {
        name: None if x is None else nn.Parameter(x.to(layer.parameter.dtype).contiguous(), requires_grad=False)
        for name, x in made.items()
    }
    sizes = {"in_features": inputs, "out_features": outputs}
    if not isinstance(old, nn.Linear):
        sizes = {"in_channels": groups * inputs, "out_channels": groups * outputs, "groups": groups}
    for name, size in sizes.items():
        setattr(module, name, size)
    return module

"""Attention heads that can be masked as wholes, found on the graph: what a projection reads of softmax times values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from masksurgery.axes import Axis, Dim, Dims
from masksurgery.candidates import Candidate
from masksurgery.flow import Flow
from masksurgery.kinds import is_layer
from masksurgery.layout import layout_of
from masksurgery.types import Site, SiteError

REPEATED = "heads: its values serve several heads or places (grouped-query attention, overlapping windows)"


@dataclass(frozen=True)
class _Merged:
    """The tensor that a projection reads, and its dimension of the heads (outermost) and their channels."""

    node: fx.Node
    dim: int
    axes: Dim

    @property
    def heads(self) -> int:
        return self.axes[0].size


def find_heads(flow: Flow, candidates: Sequence[Candidate]) -> Mapping[fx.Node, Site | str]:
    """The site of every layer that makes values for attention heads, or why their heads cannot be masked.

    The site is the tensor that the next layer reads: attention weights times values, norms and activations included,
    where a dimension consists of the heads and the channels of one head.

    Args:
        flow: Of the model itself.
        candidates: The layers that may be masked; others are left out.
    Returns:
        By the node of the layer. Masks have no name yet.
    Raises:
        SiteError: The model has no attention with several heads. (nn.MultiheadAttention is one, although its heads
            cannot be masked: it is one node.)
    """
    by_node = {candidate.node: candidate for candidate in candidates}
    found: dict[fx.Node, Site | str] = {}
    owners: dict[fx.Node, str] = {}
    has_attention = any(isinstance(module, nn.MultiheadAttention) for module in flow.root.modules())
    for here, node in flow.walk({}):
        values = _values(here, node)
        if values is None or not _head_axes(here, node):
            continue
        has_attention = True
        layer, grown = _layer_of(here, values)
        if layer not in by_node or isinstance(found.get(layer), Site):
            continue
        candidate = by_node[layer]
        fewer = _count(_head_axes(here, values)) < _count(_head_axes(here, node))
        merged = REPEATED if grown or fewer else _merged(here, node)
        if isinstance(merged, _Merged) and merged.node in owners:
            merged = f"masked: its heads are masked with those of '{owners[merged.node]}'"
        found[layer] = merged if isinstance(merged, str) else _site(here, candidate, merged)
        if isinstance(merged, _Merged):
            owners[merged.node] = candidate.layer
    if not has_attention:
        raise SiteError(
            f"heads=True finds no attention in {type(flow.root).__name__}: no softmax is multiplied with the values of "
            f"several heads. Leave heads out."
        )
    return found


def _site(flow: Flow, candidate: Candidate, merged: _Merged) -> Site | str:
    layout = layout_of(flow.facts[merged.node].dims[0], merged.node.name)
    if layout.batch_dim is None:
        return "no batch: its output has no batch dimension"
    return Site(
        candidate.layer, candidate.call, merged.node.name, "", math.prod(axis.size for axis in merged.axes), 0,
        layout.batch_dim, merged.dim, layout.fold, part=flow.region.name, outer=layout.outer, heads=merged.heads,
    )  # fmt: skip


# --- before the product: the values, and the layer that makes them ---------------------------------------------------


def _values(flow: Flow, node: fx.Node) -> fx.Node | None:
    """The values of an attention product; None if a node is none."""
    if node.op == "call_function" and flow.is_attention(node):
        values = node.kwargs.get("value", node.args[2] if len(node.args) > 2 else None)
        return values if isinstance(values, fx.Node) else None
    operands = flow.data_inputs(node) if node.op != "output" else []
    if len(operands) != 2 or "product" not in flow.facts[node].kinds:
        return None
    if any(len(flow.facts[one].dims) != 1 for one in (node, *operands)):  # a module that returns several tensors
        return None
    weights = [operand for operand in operands if _is_softmax(flow, operand)]
    return next(operand for operand in operands if operand not in weights) if len(weights) == 1 else None


def _is_softmax(flow: Flow, node: fx.Node) -> bool:
    """It is a softmax, or what dropout, moves, factors or talking heads make of one."""
    while flow.gate_kind(flow.facts[node], node) != "softmax":
        sources = flow.data_inputs(node)
        if len(sources) != 1 or not set(flow.facts[node].kinds) <= {"move", "pointwise", "mul", "mix", "product"}:
            return False
        (node,) = sources
    return True


def _layer_of(flow: Flow, node: fx.Node) -> tuple[fx.Node | None, bool]:
    """The convolution or Linear that makes the values, and whether they are repeated on the way from it."""
    grown = False
    while not {"mix", "product"} & set(flow.facts[node].kinds):
        sources = [source for source in flow.data_inputs(node) if source in flow.facts[node].reads]
        if len(sources) != 1:
            return None, grown
        grown |= _numel(flow, node) > _numel(flow, sources[0])
        (node,) = sources
    made = node.op == "call_module" and is_layer(flow.root.get_submodule(str(node.target)))
    axis = flow.channel_axis(node)
    depthwise = axis is not None and axis.parents  # what is channel-wise there may have a mask of its own
    return (node if made and not depthwise else None), grown


def _numel(flow: Flow, node: fx.Node) -> int:
    return sum(x.numel() for x in tree_leaves(flow.facts[node].value) if isinstance(x, Tensor))


# --- after the product: the heads, and who reads them ----------------------------------------------------------------


def _head_axes(flow: Flow, node: fx.Node) -> set[Axis]:
    """What may count heads: the axes before the two that a product of matrices has, without the batch."""
    (dims,) = flow.facts[node].dims
    return {axis for dim in dims[:-2] for axis in dim if not axis.batch}


def _count(axes: set[Axis]) -> int:
    return math.prod(axis.size for axis in axes)


def _merged(flow: Flow, product: fx.Node) -> _Merged | str:
    """Where the heads of a product are merged and read by a layer that mixes them; otherwise why they are not."""
    heads = _head_axes(flow, product)
    (dims,) = flow.facts[product].dims
    inner = {axis for dim in dims[-2:] for axis in dim}
    node = product
    while (reader := _only_reader(flow, node)) and not _mixes(flow, reader):
        heads, inner = _carried(flow, reader, heads), _carried(flow, reader, inner)
        node = reader
    if reader is None:
        return f"heads: no single layer reads '{node.name}'"
    found = _heads_outermost(flow.facts[node].dims[0], heads, inner)
    if found is None:
        return f"heads: their channels do not stand together, head by head, in '{node.name}'"
    dim, axes = found
    if flow.facts[reader].children.keys() & set(axes):
        return f"heads: '{reader.name}' reads them channel by channel"
    while flow.passes(node):  # the mask stands before an Identity or dropout, as everywhere
        (node,) = flow.data_inputs(node)
    return _Merged(node, dim, axes)


def _only_reader(flow: Flow, node: fx.Node) -> fx.Node | None:
    readers = flow.readers(node)
    return readers[0] if len(readers) == 1 and readers[0].op != "output" else None


def _mixes(flow: Flow, node: fx.Node) -> bool:
    """It is a convolution or a Linear: it multiplies a single tensor with weights."""
    return bool({"mix", "product"} & set(flow.facts[node].kinds)) and len(flow.data_inputs(node)) == 1


def _carried(flow: Flow, reader: fx.Node, axes: set[Axis]) -> set[Axis]:
    """The same axes in the output of a node."""
    children = flow.facts[reader].children
    return {child for axis in axes for child in children.get(axis, ()) if child.size == axis.size}


def _heads_outermost(dims: Dims, heads: set[Axis], inner: set[Axis]) -> tuple[int, Dim] | None:
    for d, dim in enumerate(dims):
        if dim and dim[0] in heads and inner.issuperset(dim[1:]):
            return d, dim
    return None

"""What can be computed once: BatchNorm, per-channel scales and the rescaling of masks go into the weights of layers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from masksurgery.kinds import channel_dim_of
from masksurgery.pack.layers import Affine, Layer, is_plain_layer
from masksurgery.pack.network import Network, masked

NAMED_NORMS = ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d", "FrozenBatchNorm2d")
HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d)
LINEAR = (
    nn.Identity, nn.Flatten, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
)  # fmt: skip
HOMOGENEOUS_CALLS = {"relu", "leaky_relu", "max_pool1d", "max_pool2d", "max_pool3d", "mean", "avg_pool2d", "amax"}

RESHAPES = {
    "view", "reshape", "flatten", "unflatten", "permute", "transpose", "swapaxes", "movedim", "moveaxis", "squeeze",
    "unsqueeze", "contiguous", "clone", "t", "mT", "getattr",
}  # fmt: skip
"""Moves that keep every number, and the order of the channels."""


@dataclass
class Folding:
    """What becomes of the nodes of a network.

    Attributes:
        layers: With weights that can be cut.
        affines: What is left of BatchNorms and scales, to be computed.
        rest: What a node still computes: a module, or None for nothing.
        rescale: What is left of a mask's rescaling.
    """

    layers: dict[fx.Node, Layer] = field(default_factory=dict)
    affines: dict[fx.Node, Affine] = field(default_factory=dict)
    rest: dict[fx.Node, nn.Module | None] = field(default_factory=dict)
    rescale: dict[fx.Node, float] = field(default_factory=dict)


def fold(net: Network) -> Folding:
    """Decide what goes into which weights; nothing is changed."""
    folding = Folding()
    for node in net.graph.nodes:
        module = net.module(node)
        if module is not None and is_plain_layer(module) and len(net.tensors(node)) == 1:
            rank = net.tensors(node)[0].dim()
            folding.layers[node] = Layer(module, rank + (channel_dim_of(net.root, node) or -1))
        elif _computes_nothing(net, node):
            folding.rest[node] = None
    for node in net.graph.nodes:
        affine, rest = _as_affine(net, node)
        if affine is None:
            continue
        folding.affines[node], folding.rest[node] = affine, rest
        if _fold_back(net, folding, node, affine):
            del folding.affines[node]
    for node in net.graph.nodes:
        if node.target is masked:
            mask = net.masks[str(node.args[1])]
            scale = mask.channels / mask.kept if mask.rescale else 1.0
            if scale == 1 or _fold_back(net, folding, node, Affine(scale)) or _fold_on(net, folding, node, scale):
                scale = 1.0
            folding.rescale[node] = scale
    return folding


def _computes_nothing(net: Network, node: fx.Node) -> bool:
    """Identity, or dropout in eval."""
    fact = net.facts[node]
    inputs = net.data_inputs(node)
    if node.op not in ("call_module", "call_function") or fact.kinds or fact.unknown or len(inputs) != 1:
        return False
    if len(net.tensors(node)) != 1 or not isinstance(fact.value, Tensor) or node in net.opaque:
        return False
    named = "dropout" in str(node.target).lower() or node.op == "call_module"
    source = net.facts[inputs[0]].value
    return (
        named and isinstance(source, Tensor) and source.shape == fact.value.shape and source.dtype == fact.value.dtype
    )


def _as_affine(net: Network, node: fx.Node) -> tuple[Affine | None, nn.Module | None]:
    """A BatchNorm, or a multiplication by one number a channel; and what is computed after it."""
    module = net.module(node)
    if module is not None:
        return _batch_norm(module)
    if node.target in (torch.mul, "mul") or getattr(node.target, "__name__", "") == "mul":
        inputs = [n for n in node.all_input_nodes if net.facts[n].has_tensor]
        constants = [n for n in inputs if net.constant(n) is not None]
        if len(inputs) == 2 and len(constants) == 1 and not node.kwargs:
            return _scale(net, node, constants[0]), None
    return None, None


def _scale(net: Network, node: fx.Node, constant: fx.Node) -> Affine | None:
    value = net.constant(constant)
    rank = net.tensors(node)[0].dim()
    if value is None or not value.is_floating_point() or value.dim() > rank or _source(net, node) is None:
        return None
    if _shape(net, _source(net, node)) != _shape(net, node):
        return None
    wide = [d + rank - value.dim() for d, size in enumerate(value.shape) if size > 1]
    if len(wide) > 1 or 0 in wide:
        return None
    return Affine(value.detach().double().reshape(-1), None, wide[0] if wide else rank - 1)


def _shape(net: Network, node: fx.Node | None) -> tuple[int, ...]:
    return tuple(net.tensors(node)[0].shape) if node is not None else ()


def _source(net: Network, node: fx.Node) -> fx.Node | None:
    inputs = net.data_inputs(node)
    return inputs[0] if len(inputs) == 1 and isinstance(net.facts[inputs[0]].value, Tensor) else None


def _batch_norm(module: nn.Module) -> tuple[Affine | None, nn.Module | None]:
    name = type(module).__name__
    known = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm) or name in NAMED_NORMS
    mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if not known or mean is None or variance is None or module._forward_hooks or module._forward_pre_hooks:
        return None, None
    scale = (variance.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double()  # type: ignore[operator]
    shift = -mean.double() * scale
    if module.bias is not None:
        shift = shift + module.bias.detach().double()  # type: ignore[operator]
    after = [getattr(module, part, None) for part in ("drop", "act")]
    rest = [m for m in after if isinstance(m, nn.Module) and not isinstance(m, (nn.Identity, nn.Dropout))]
    return Affine(scale, shift, 1), nn.Sequential(*rest) if len(rest) > 1 else (rest[0] if rest else None)


def _fold_back(net: Network, folding: Folding, node: fx.Node, affine: Affine) -> bool:
    """Fold what a node does to its input into the layer before it, if nothing else reads what is between them."""
    dim: int | None = affine.dim
    while True:
        source = _source(net, node)
        if source is None or len(net.readers(source)) != 1 or source in folding.affines:
            return False
        if not isinstance(affine.scale, float):
            dim = _same_dim(net, node, source, dim)
        if dim is None:
            return False
        if source in folding.layers:
            layer = folding.layers[source]
            if isinstance(affine.scale, float) or dim == layer.dim:
                layer.follow(affine)
                return True
            return False
        if not _commutes(net, folding, source, affine):
            return False
        node = source


def _same_dim(net: Network, node: fx.Node, source: fx.Node, dim: int | None) -> int | None:
    """The dimension of a node's input that is one of its output, index by index."""
    if dim is None:
        return None
    out = net.facts[node].dims[0]
    if len(out[dim]) != 1:
        return None
    found = [d for d, axes in enumerate(net.facts[source].dims[0]) if len(axes) == 1 and axes[0] in out[dim][0].parents]
    return found[0] if len(found) == 1 else None


def _commutes(net: Network, folding: Folding, node: fx.Node, affine: Affine) -> bool:
    """A node computes the same of a scaled input as if its output is scaled."""
    if node in folding.rest and folding.rest[node] is None:
        return True
    module = folding.rest.get(node) or net.module(node)
    positive = isinstance(affine.scale, float) and affine.scale > 0
    if module is not None:
        if affine.shift is not None or not (positive or isinstance(module, LINEAR)):
            return False
        return type(module) in (*HOMOGENEOUS, *LINEAR)
    if _name(node) in RESHAPES and set(net.facts[node].kinds) <= {"move"} and len(net.tensors(node)) == 1:
        source = _source(net, node)
        return source is not None and net.tensors(node)[0].numel() == net.tensors(source)[0].numel()
    return positive and _name(node) in HOMOGENEOUS_CALLS


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")


def _fold_on(net: Network, folding: Folding, node: fx.Node, scale: float) -> bool:
    """Fold a scale into all layers that read what it scales."""
    layers: list[Layer] = []
    carried, stack = {node}, [node]
    while stack:
        for reader in net.readers(stack.pop()):
            if reader in folding.layers:
                layers.append(folding.layers[reader])
            elif reader.op == "output" or reader.target is masked or reader in folding.affines or reader in carried:
                return False  # reached twice it would be scaled twice
            elif _passes_on(net, folding, reader, scale):
                carried.add(reader)
                stack.append(reader)
            else:
                return False
    if any(sum(source in carried for source in net.data_inputs(n)) > 1 for n in carried):
        return False
    for layer in layers:
        layer.input_scale *= scale
    return True


def _passes_on(net: Network, folding: Folding, node: fx.Node, scale: float) -> bool:
    if len(net.data_inputs(node)) == 1:
        return _commutes(net, folding, node, Affine(scale))
    product = _name(node) == "mul" and len(net.data_inputs(node)) == len(node.all_input_nodes) == 2
    return product and isinstance(net.facts[node].value, Tensor)

"""What kind of operation each node of a network is: the families that liveness and slicing have rules for."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from masksurgery.pack.folding import Folding
from masksurgery.pack.layers import Layer
from masksurgery.pack.network import Network, masked

CASTS = ("to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "detach")
ALONG = ("softmax", "log_softmax", "cumsum", "cumprod", "layer_norm", "rms_norm", "logcumsumexp")
ROW_NORMS = ("LayerNorm", "RMSNorm", "RmsNorm", "SimpleNorm", "LayerNormFp32")
SOFTMAXES = (nn.Softmax, nn.LogSoftmax)
BY_ROW = ("log_softmax", "cumsum", "cumprod", "logcumsumexp", "tril", "triu", "LogSoftmax", "GLU", "normalize")

Place = tuple[fx.Node, int]
"""A tensor: a node, and which of the tensors that it returns."""


@dataclass(frozen=True)
class Operation:
    """A node, and what there is to know of it.

    Attributes:
        family: One of source, constant, size, output, mask, layer, same, affine, elementwise, channelwise, move, leaf,
            along, attention, matmul, barrier.
        inputs: The tensors that it reads and that are computed.
        constants: The parameters and buffers that it reads.
        layer: Its weights, in the family `layer`.
        module: What is called on its input alone, where that is a module.
        over: Dimensions that it reads as a whole, in the family `along`.
        why: Why it is a barrier.
    """

    node: fx.Node
    family: str
    inputs: tuple[Place, ...] = ()
    constants: tuple[fx.Node, ...] = ()
    layer: Layer | None = None
    module: nn.Module | None = None
    over: frozenset[int] = frozenset()
    why: str = ""


@dataclass
class Operations:
    """The operations of a network by node, in its order."""

    net: Network
    folding: Folding
    by_node: dict[fx.Node, Operation] = field(default_factory=dict)

    def __getitem__(self, node: fx.Node) -> Operation:
        return self.by_node[node]


def classify(net: Network, folding: Folding) -> Operations:
    """The operation of each node."""
    result = Operations(net, folding)
    for node in net.graph.nodes:
        result.by_node[node] = _operation(net, folding, node)
    return result


def shape_of(net: Network, place: Place) -> tuple[int, ...]:
    return tuple(net.tensors(place[0])[place[1]].shape)


def sample_shape(net: Network, place: Place) -> tuple[int, ...]:
    """The shape of a tensor with 1 where the samples are."""
    dims = net.facts[place[0]].dims[place[1]]
    return tuple(1 if any(axis.batch for axis in dim) else n for dim, n in zip(dims, shape_of(net, place), strict=True))


def pattern_shape(net: Network, place: Place) -> tuple[int, ...]:
    """The same with 1 along free dimensions too: what is known or read of one entry there holds for all."""
    free = net.free.of(*place)
    return tuple(1 if d in free else size for d, size in enumerate(sample_shape(net, place)))


def single(net: Network, node: fx.Node) -> bool:
    """Its value is one tensor."""
    return isinstance(net.facts[node].value, Tensor)


def _operation(net: Network, folding: Folding, node: fx.Node) -> Operation:
    if node.op == "output":
        return Operation(
            node, "output", tuple((n, k) for n in node.all_input_nodes for k in range(len(net.tensors(n))))
        )
    fact = net.facts[node]
    inputs = tuple((n, 0) for n in net.data_inputs(node))
    constants = tuple(n for n in node.all_input_nodes if n.op == "get_attr" and fact.has_tensor)
    if not fact.has_tensor:
        return Operation(node, "size", inputs)
    if node.op in ("placeholder", "get_attr"):
        return Operation(node, "source" if node.op == "placeholder" else "constant")

    def made(family: str, **more: Any) -> Operation:
        return Operation(node, family, inputs, constants, **more)

    def barrier(why: str) -> Operation:
        every = tuple((n, k) for n, _ in inputs for k in range(len(net.tensors(n))))
        return Operation(node, "barrier", every, constants, why=why)

    if node.target is operator.getitem and inputs and not single(net, inputs[0][0]):
        leaf = _leaf(net, node)
        return Operation(node, "leaf", ((inputs[0][0], leaf),)) if leaf is not None else barrier("tuple")
    if any(not single(net, n) for n, _ in inputs):
        return barrier("it reads several tensors as one value")
    if node.target is masked:
        return made("mask")
    if node in folding.layers:
        return made("layer", layer=folding.layers[node])
    if node in folding.affines:
        return made("affine", module=folding.rest[node])
    if node in folding.rest:
        rest = folding.rest[node]
        return made("same") if rest is None else made("elementwise", module=rest)
    return _by_kinds(net, node, made, barrier)


def _leaf(net: Network, node: fx.Node) -> int | None:
    """Which tensor of a tuple `x[k]` is."""
    source, key = node.args[0], node.args[1]
    value = net.facts[cast(fx.Node, source)].value
    if (
        not isinstance(value, (tuple, list))
        or not isinstance(key, int)
        or not all(isinstance(x, Tensor) for x in value)
    ):
        return None
    return key % len(value)


def _by_kinds(
    net: Network, node: fx.Node, made: Callable[..., Operation], barrier: Callable[[str], Operation]
) -> Operation:
    fact, module, name = net.facts[node], net.module(node), name_of(net, node)
    kinds, inputs = set(fact.kinds), net.data_inputs(node)
    if node in net.opaque or fact.unknown:
        return barrier(f"no rule for {', '.join(fact.unknown)}" if fact.unknown else "it cannot be traced")
    if node.target is F.scaled_dot_product_attention:
        plain = len(inputs) == len(node.all_input_nodes) - len(constants_of(node)) and not node.kwargs.get("enable_gqa")
        return made("attention") if plain and len(inputs) >= 3 else barrier("grouped queries")
    if name in ("matmul", "bmm", "__matmul__") and len(inputs) == 2 and single(net, node):
        same = net.tensors(inputs[0])[0].dim() == net.tensors(inputs[1])[0].dim() >= 2
        return made("matmul") if same else barrier("a matrix times a vector")
    over = _over(net, node, module, name)
    if over is not None and len(inputs) == 1:
        return made("along", over=over, module=module)
    if name == "type_as" and len({net.tensors(source)[0].dim() for source in inputs}) > 1:
        return barrier("the type of a tensor of another rank")
    if single(net, node) and name in CASTS and kinds <= {"move", "pointwise"} and inputs and _same_shape(net, node):
        return made("elementwise", module=module)
    if not inputs or not kinds or name in BY_ROW or (module is not None and not _without_parameters(module)):
        return barrier(f"no rule for {name}")
    if kinds <= {"move"} and not constants_of(node) - _cat_constants(node):
        return made("move", module=module)
    if single(net, node) and kinds <= {"pointwise", "gate", "mul"} and _broadcasts(net, node):
        return made("elementwise", module=module) if _is_known(net, node, module) else barrier(f"no rule for {name}")
    alone = len(inputs) == len(node.all_input_nodes) - _sizes(net, node) == 1 and single(net, node)
    if (
        alone
        and "pool" in kinds
        and kinds <= {"pool", "move", "pointwise", "gate", "mul"}
        and _is_known(net, node, module)
    ):
        return made("channelwise", module=module)
    return barrier(f"no rule for {name}")


def name_of(net: Network, node: fx.Node) -> str:
    """What a node calls."""
    module = net.module(node)
    if module is not None:
        return type(module).__name__
    return str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))


def constants_of(node: fx.Node) -> set[fx.Node]:
    return {n for n in node.all_input_nodes if n.op == "get_attr"}


def _cat_constants(node: fx.Node) -> set[fx.Node]:
    return constants_of(node) if node.target in (torch.cat, torch.stack, torch.concat) else set()


def _sizes(net: Network, node: fx.Node) -> int:
    return sum(not net.facts[n].has_tensor for n in node.all_input_nodes)


def _over(net: Network, node: fx.Node, module: nn.Module | None, name: str) -> frozenset[int] | None:
    """The dimensions that a softmax or a norm of rows reads as a whole."""
    if not single(net, node):
        return None
    rank = net.tensors(node)[0].dim()
    if isinstance(module, SOFTMAXES):
        return frozenset({module.dim % rank}) if module.dim is not None else None
    known = type(module).__module__.startswith(("torch.nn.", "timm.layers."))  # others norm what they like by this name
    if module is not None and known and name in ROW_NORMS and hasattr(module, "normalized_shape"):
        return frozenset(range(rank - len(module.normalized_shape), rank))  # type: ignore[arg-type]
    if module is None and name in ("softmax", "log_softmax", "cumsum"):
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        return frozenset({dim % rank}) if isinstance(dim, int) else None
    return None


def _without_parameters(module: nn.Module) -> bool:
    return all(x.numel() == 1 for x in (*module.parameters(), *module.buffers()))


def _same_shape(net: Network, node: fx.Node) -> bool:
    return net.tensors(net.data_inputs(node)[0])[0].shape == net.tensors(node)[0].shape


def _broadcasts(net: Network, node: fx.Node) -> bool:
    shapes = [net.tensors(n)[0].shape for n in node.all_input_nodes if net.facts[n].has_tensor]
    try:
        return torch.broadcast_shapes(*shapes) == net.tensors(node)[0].shape
    except RuntimeError:
        return False


def _is_known(net: Network, node: fx.Node, module: nn.Module | None) -> bool:
    """It is torch's, or found to compute each channel by itself: other modules are tried on numbers."""
    if module is None:
        origin = str(getattr(node.target, "__module__", ""))
        known = getattr(torch, name_of(net, node), None) is node.target or origin.startswith(("torch", "_operator"))
        return node.op == "call_method" or known
    return type(module).__module__.startswith("torch.nn") or _computes_by_channel(net, node, module)


def _computes_by_channel(net: Network, node: fx.Node, module: nn.Module) -> bool:
    """Half of the channels alone give the same as among all, whichever dimension is cut."""
    if len(node.all_input_nodes) != 1:
        return False
    shape = [min(size, 4) for size in net.tensors(net.data_inputs(node)[0])[0].shape]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    dims = [d for d, size in enumerate(shape) if size > 1]
    try:
        with torch.no_grad():
            twin = copy.deepcopy(module).to_empty(device="cpu").float()
            for tensor in (*twin.parameters(), *twin.buffers()):
                tensor.fill_(0.5)  # whatever its value is, for the model may have none
            whole = twin(x)
            parts = [twin(x.narrow(d, 0, shape[d] // 2)) for d in dims]
        return all(torch.allclose(whole.narrow(d, 0, shape[d] // 2), part) for d, part in zip(dims, parts, strict=True))
    except (RuntimeError, ValueError, TypeError):
        return False

"""The MACs of all members together, counted on the base model: what varies under a mask, and what is read.

For every member the base model runs with that member's masks multiplied in, forwards and backwards. An input channel
that is constant over all samples and places costs nothing (it belongs to the bias of the next layer), nor does an
output channel without a gradient. This knows nothing of graphs and rules: it looks at numbers.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from masksurgery.copying import copy_module, meta_copy
from masksurgery.model import ConvertedModel
from masksurgery.oracle import Oracle


@dataclass(frozen=True)
class Product:
    """One call of a convolution, a Linear or a product of activations.

    Attributes:
        macs: Of the whole batch, at full width.
        inputs: Which channels vary in what it reads, [groups, i]. The groups of an attention are its heads.
        outputs: Which channels are read of it, [groups, o].
        seen: Equal where what it reads is equal.
        layer: Qualified name; "" of a product without a parameter.
    """

    macs: int
    inputs: Tensor
    outputs: Tensor
    seen: str = ""
    layer: str = ""

    @property
    def share(self) -> float:
        """Of the multiply-adds, those that are needed."""
        needed = (self.inputs.sum(1) * self.outputs.sum(1)).sum()
        return float(needed) / (self.inputs.numel() * self.outputs.shape[1])


# What a call comes to, and which of its outputs [groups, o] a gradient reads.
Note = tuple[Product, Callable[[Tensor], Tensor]]


class Watch(TorchFunctionMode):
    """Notes every product of a forward and, once its backward has run, what is read of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.products: list[Product] = []
        self.names = {id(p): name.rpartition(".")[0] for name, p in model.named_parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = SMOOTH.get(func, func)(*args, **kwargs)
        if func in NOTES:
            product, read = NOTES[func](out, *args, **kwargs)
            layer = next((self.names[id(x)] for x in tree_leaves((args, kwargs)) if id(x) in self.names), "")
            call = len(self.products)
            self.products.append(replace(product, layer=layer))
            if out.requires_grad:
                out.register_hook(lambda grad: self._read(call, read(grad)))
        return out

    def _read(self, call: int, outputs: Tensor) -> None:
        self.products[call] = replace(self.products[call], outputs=outputs)


def _leaky(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.leaky_relu(x, 0.3)


def _line(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return 0.5 + 0.1 * x


_nn: Any = torch._C._nn
# Where an activation is flat a channel, or its gradient, dies by chance; float64 has no number for silu(-800) or the
# slope of a sigmoid at 40. One that is nowhere flat takes its place, and is zero at zero where the other is.
SMOOTH: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu, F.relu6, F.hardtanh), _leaky),
    **dict.fromkeys((F.silu, _nn.silu, _nn.silu_, F.gelu, _nn.gelu), _leaky),
    **dict.fromkeys((F.hardswish, _nn.hardswish, _nn.hardswish_), _leaky),
    **dict.fromkeys((torch.sigmoid, torch.sigmoid_, Tensor.sigmoid, Tensor.sigmoid_), _line),
    **dict.fromkeys((F.hardsigmoid, _nn.hardsigmoid, _nn.hardsigmoid_), _line),
}


def _fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(b"" if x.is_meta else x.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _all(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def _live(x: Tensor, channel_dim: int, *, constants: bool = True) -> Tensor:
    """[c]: which channels are not zero everywhere, nor (if they can be left out) constant."""
    rows = x.detach().movedim(channel_dim, 0).flatten(1)
    if x.is_meta:
        return _all(len(rows))
    if not constants:
        return rows.ne(0).any(1)
    return (rows.amax(1) - rows.amin(1)) > 1e-12 * rows.abs().amax(1)


def _read(grad: Tensor, channel_dim: int, groups: int = 1) -> Tensor:
    return grad.movedim(channel_dim, 0).flatten(1).ne(0).any(1).view(groups, -1)


def _convolution(
    out: Tensor, input: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Note:  # fmt: skip
    borders = padding != "valid" and any(padding if isinstance(padding, (tuple, list)) else [padding])
    inputs = _live(input, 1, constants=not borders).view(groups, -1)  # beside a border of zeros nothing is constant
    outputs = _all(groups, len(weight) // groups)
    product = Product(out.numel() * weight[0].numel(), inputs, outputs, _fingerprint(input))
    return product, lambda grad: _read(grad, 1, groups)


def _linear(out: Tensor, input: Tensor, weight: Tensor, bias: Any = None) -> Note:
    inputs, outputs = _live(input, -1)[None], _all(1, len(weight))
    product = Product(out.numel() * weight.shape[1], inputs, outputs, _fingerprint(input))
    return product, lambda grad: _read(grad, -1)


def _factor(x: Tensor, dim: int) -> Tensor:
    """Of a factor [b, groups, ., .] what is not zero, in the dimension that is summed over: [groups, k]."""
    rows = x.detach().movedim(dim, -1)
    used = _all(*rows.shape) if x.is_meta else rows.ne(0)
    return used.any(-2).any(0).view(-1, rows.shape[-1])


def _product(out: Tensor, a: Tensor, b: Tensor) -> Note:
    """[b, groups, m, k] by [b, groups, k, n]: what is zero in one of them is needed in neither."""
    inputs = _factor(a, -1) & _factor(b, -2)
    outputs = _all(len(inputs), out[0].numel() // len(inputs))
    product = Product(out.numel() * a.shape[-1], inputs, outputs, _fingerprint(a, b))
    return product, lambda grad: grad.ne(0).any(0).view(len(inputs), -1)


def _attention(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Note:
    """Heads [b, h, t, d]: a head that is read needs both of its products, with the channels that are not zero."""
    inputs = torch.cat([_factor(query, -1) & _factor(key, -1), _factor(value, -1)], 1)
    macs = query.numel() * key.shape[2] + query[..., 0].numel() * value[0, 0].numel()
    product = Product(macs, inputs, _all(len(inputs), 1), _fingerprint(query, key, value))
    return product, lambda grad: _read(grad, 1, len(inputs))


NOTES: dict[Any, Callable[..., Note]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    **dict.fromkeys((F.linear, _nn.linear), _linear),
    **dict.fromkeys((torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__), _product),
    F.scaled_dot_product_attention: _attention,
}


def products_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Product]:
    """The products of a model in eval, without values."""
    duplicate = meta_copy(model)
    with torch.no_grad(), Watch(duplicate) as watch:
        duplicate(*(x.to("meta") for x in inputs))
    return watch.products


def member_products(oracle: Oracle, inputs: tuple[Tensor, ...], i: int) -> list[Product]:
    """The products of the base model under the masks of member i, in the order of the calls."""
    given = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
    with Watch(oracle.base) as watch:
        outputs = oracle.run((given, {}), {name: rows[i] for name, rows in oracle.masks.items()})
    leaves = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
    generator = torch.Generator().manual_seed(i)
    torch.autograd.backward(leaves, [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in leaves])
    return watch.products


def needed_macs(
    model: ConvertedModel, base: nn.Module, inputs: tuple[Tensor, ...], whole: list[Product] | None = None
) -> Counter[str]:
    """By layer what all members together have to multiply and add.

    What has the same input for all members is computed once, with all that any of them reads.

    Args:
        model: Converted from `base`.
        base: In float64 and eval, randomised.
        inputs: Several random samples; they may be smaller than those to count for.
        whole: The products of the base model at the size to count for; by default at that of `inputs`.
    """
    oracle = Oracle(copy_module(base).requires_grad_(False), model, (inputs, {}))
    runs = [member_products(oracle, inputs, i) for i in range(model.surgery.n)]
    found: Counter[str] = Counter()
    for full, *members in zip(whole or products_of(base, inputs), *runs, strict=True):
        if len({call.seen for call in members}) == 1:
            members = [replace(members[0], outputs=torch.stack([call.outputs for call in members]).any(0))]
        found[full.layer] += round(full.macs * sum(call.share for call in members))
    return found


def packed_macs(products: list[Product]) -> Counter[str]:
    """By layer of the base model what a packed one multiplies and adds."""
    found: Counter[str] = Counter()
    for call in products:
        found[re.sub(r"^(shared|members\.\d+)\.", "", call.layer)] += call.macs
    return found

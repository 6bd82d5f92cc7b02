"""The MACs of all members together, counted on the base model: what varies under a mask, and what is read.

For every member the base model runs with that member's masks multiplied in, forwards and backwards. An input channel
that is constant over all samples and places costs nothing (it is a bias of the next layer), nor does an output channel
without a gradient. This knows nothing of graphs and rules: it looks at numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from masksurgery.copying import copy_module, meta_copy
from masksurgery.model import ConvertedModel
from masksurgery.oracle import Oracle


@dataclass
class Product:
    """One call of a convolution, a Linear or a product of activations.

    Attributes:
        macs: At full width, of the whole batch.
        inputs: Which channels it has to read, [groups, i]. The groups of an attention are its heads.
        outputs: Which channels are read of it, [groups, o].
        seen: Equal where the input is.
    """

    name: str
    macs: int
    inputs: Tensor
    outputs: Tensor
    seen: str

    @property
    def share(self) -> float:
        """Of the multiply-adds, those that are needed."""
        needed = (self.inputs.sum(1) * self.outputs.sum(1)).sum()
        return float(needed) / (self.inputs.numel() * self.outputs.shape[1])


@dataclass
class Watch(TorchFunctionMode):
    """Notes every product of a forward, and with its backward what is read of it."""

    products: list[Product] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = SMOOTH.get(func, func)(*args, **(kwargs or {}))
        note = NOTES.get(func)
        if note is not None:
            product, read = note(out, *args, **(kwargs or {}))
            self.products.append(product)
            if out.requires_grad:
                product.outputs = torch.zeros_like(product.outputs)
                out.register_hook(lambda grad: setattr(product, "outputs", read(grad)))
        return out


def _leaky(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.leaky_relu(x, 0.3)


def _silu(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.silu(x)


def _sigmoid(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return torch.sigmoid(x)


_nn: Any = torch._C._nn
# Where an activation is flat, a channel or its gradient dies by chance. One that is nowhere flat takes its place, and is
# zero at zero where the other is.
SMOOTH: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys((torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu, F.relu6, F.hardtanh), _leaky),
    **dict.fromkeys((F.hardswish, _nn.hardswish, _nn.hardswish_), _silu),
    **dict.fromkeys((F.hardsigmoid, _nn.hardsigmoid, _nn.hardsigmoid_), _sigmoid),
}


def _fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for x in tensors:
        digest.update(b"" if x.is_meta else x.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _varies(x: Tensor, channel_dim: int, zero: bool = False) -> Tensor:
    """Which channels are not the same value everywhere, or not zero everywhere: [c]."""
    rows = x.detach().movedim(channel_dim, 0).flatten(1)
    if x.is_meta:
        return torch.ones(len(rows), dtype=torch.bool)
    return rows.ne(0).any(1) if zero else (rows.amax(1) - rows.amin(1)) > 1e-12 * rows.abs().amax(1)


def _read(channel_dim: int, groups: int = 1) -> Callable[[Tensor], Tensor]:
    return lambda grad: grad.movedim(channel_dim, 0).flatten(1).ne(0).any(1).view(groups, -1)


def _convolution(
    out: Tensor, x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> tuple[Product, Any]:  # fmt: skip
    padded = any(padding) if isinstance(padding, (tuple, list)) else padding not in (0, "valid")
    inputs = _varies(x, 1, zero=padded).view(groups, -1)  # a constant is none next to a border of zeros
    outputs = torch.ones(groups, len(weight) // groups, dtype=torch.bool)
    return Product("conv", out.numel() * weight[0].numel(), inputs, outputs, _fingerprint(x)), _read(1, groups)


def _linear(out: Tensor, input: Tensor, weight: Tensor, bias: Any = None) -> tuple[Product, Any]:
    outputs = torch.ones(1, len(weight), dtype=torch.bool)
    inputs = _varies(input, -1)[None]
    return Product("linear", out.numel() * weight.shape[1], inputs, outputs, _fingerprint(input)), _read(-1)


def _attention(out: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Product, Any]:
    """Of heads [b, h, t, d]: a head that nobody reads costs nothing, and as few channels as its factors have."""
    per_head = [
        _varies(x.movedim(1, -1).flatten(-2), -1, zero=True).view(-1, x.shape[1]).T for x in (q, k, v)
    ]  # [h, d] each
    inputs = torch.cat([per_head[0] & per_head[1], per_head[2]], 1)
    macs = q.numel() * k.shape[-2] + q[..., 0].numel() * v[0, 0].numel()
    outputs = torch.ones(len(inputs), 1, dtype=torch.bool)
    read = _read(1)
    return Product("attention", macs, inputs, outputs, _fingerprint(q, k, v)), lambda grad: read(grad).T


def _product(out: Tensor, a: Tensor, b: Tensor) -> tuple[Product, Any]:
    """[b, ..., m, k] by [b, ..., k, n]: in each of the groups between, what is not zero in both, and what is read."""
    inputs = [x.detach().flatten(1, -3).ne(0).any(0).any(dim) for x, dim in ((a, 1), (b, 2))]  # [groups, k] each
    found = torch.ones_like(inputs[0], device="cpu") if out.is_meta else inputs[0] & inputs[1]
    outputs = torch.ones(len(found), out[0].numel() // len(found), dtype=torch.bool)
    macs = out.numel() * a.shape[-1]
    return Product("product", macs, found, outputs, _fingerprint(a, b)), lambda grad: grad.ne(0).any(0).view(
        len(found), -1
    )


NOTES: dict[Any, Callable[..., tuple[Product, Any]]] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _convolution),
    **dict.fromkeys((F.linear, _nn.linear), _linear),
    **dict.fromkeys((torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__), _product),
    F.scaled_dot_product_attention: _attention,
}


def watch_member(oracle: Oracle, inputs: tuple[Tensor, ...], i: int) -> list[Product]:
    """The products of member i, in the order of the calls.

    Args:
        oracle: Of a randomised base model in float64, whose parameters take no gradient.
        inputs: Several random samples.
        i: The member.
    """
    given = tuple(x.clone().requires_grad_() if x.is_floating_point() else x for x in inputs)
    with Watch() as watch:
        outputs = oracle.run((given, {}), {name: rows[i] for name, rows in oracle.masks.items()})
    leaves = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
    generator = torch.Generator().manual_seed(i)
    torch.autograd.backward(leaves, [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in leaves])
    return watch.products


def full_products(base: nn.Module, inputs: tuple[Tensor, ...]) -> list[Product]:
    """The products of the base model, without values."""
    with torch.no_grad(), Watch() as watch:
        meta_copy(base)(*(x.to("meta") for x in inputs))
    return watch.products


def count_members(
    model: ConvertedModel, base: nn.Module, inputs: tuple[Tensor, ...], large: tuple[Tensor, ...] | None = None
) -> tuple[int, float]:
    """The MACs of the base model, and of all members together.

    What has the same input for all members is computed once, with what any of them reads.

    Args:
        model: Converted from `base`.
        base: In float64, randomised.
        inputs: Several random samples, small if need be.
        large: One sample of the size to count for, where that is another.
    """
    oracle = Oracle(copy_module(base).requires_grad_(False), model, (inputs, {}))
    members = [watch_member(oracle, inputs, i) for i in range(model.surgery.n)]
    full = full_products(base, large or inputs)
    assert {len(products) for products in members} == {len(full)}
    total = 0.0
    for whole, *products in zip(full, *members, strict=True):
        if len({product.seen for product in products}) == 1:
            shared = torch.stack([product.outputs for product in products]).any(0)
            products = [replace(products[0], outputs=shared)]
        total += whole.macs * sum(product.share for product in products)
    return sum(whole.macs for whole in full), total

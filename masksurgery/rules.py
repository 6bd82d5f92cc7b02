"""Which axis of an operator's output is which axis of its inputs: one rule for each family of aten operators."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from masksurgery.axes import Axis, Call, Dim, Dims, anonymous, broadcast, derived, get_dims, merge, reshape

Kind = str
"""pointwise, mul, gate, softmax, norm, move, pool, mix, product, make, unknown; and sum, noted beside pointwise where a
module that has mixed channels adds two branches"""

Rule = Callable[[Call], Sequence[Dims]]


def pointwise(call: Call) -> Sequence[Dims]:
    tensors = [x for x in tree_leaves(tuple(call.arguments.values())) if isinstance(x, Tensor)]
    return [broadcast(tensors, out.shape) for out in call.outputs]


def like_first(call: Call) -> Sequence[Dims]:
    """The first output has the axes of the first input; statistics beside it are nobody's."""
    x = call.first()
    return [get_dims(x) if out.shape == x.shape else tuple(map(anonymous, out.shape)) for out in call.outputs]


def shape_like(call: Call) -> Sequence[Dims]:
    """`zeros_like` and its kind: the batch of the input, none of its values."""
    dims = get_dims(call.first())
    return [tuple(tuple(Axis(axis.size, axis.batch) for axis in dim) for dim in dims)]


def layer_norm(call: Call) -> Sequence[Dims]:
    """A single element less its mean is zero: such a norm reads nothing."""
    if math.prod(call.arguments["normalized_shape"]) != 1:
        return like_first(call)
    call.constant = True
    return [*shape_like(call), *(tuple(map(anonymous, out.shape)) for out in call.outputs[1:])]


def view(call: Call) -> Sequence[Dims]:
    return [reshape(call, get_dims(call.first()), out.shape) for out in call.outputs]


def permute(call: Call) -> Sequence[Dims]:
    dims = get_dims(call.first())
    order = list(range(len(dims)))
    if call.name in ("t", "numpy_T", "mT", "mH", "adjoint"):
        order = order[:-2] + order[:-3:-1]
    elif call.name == "permute":
        order = [d % len(dims) for d in call.arguments["dims"]]
    elif dims:
        one, other = call.arguments["dim0"], call.arguments["dim1"]
        order[one], order[other] = order[other], order[one]
    return [tuple(dims[d] for d in order)]


def expand(call: Call) -> Sequence[Dims]:
    out = call.outputs[0]
    dims = get_dims(call.first())
    dims = ((),) * (out.dim() - len(dims)) + dims
    return [tuple(dim or anonymous(size) for dim, size in zip(dims, out.shape, strict=True))]


def tile(call: Call) -> Sequence[Dims]:
    out = call.outputs[0]
    dims = get_dims(call.first())
    dims = ((),) * (out.dim() - len(dims)) + dims
    lengths = [math.prod(axis.size for axis in dim) for dim in dims]
    return [tuple(anonymous(size // length) + dim for dim, length, size in zip(dims, lengths, out.shape, strict=True))]


def take(call: Call) -> Sequence[Dims]:
    """Part of one dimension: select, slice, split, unbind, topk ... The others stay."""
    x = call.first()
    dims = list(get_dims(x))
    d = call.arguments.get("dim", 0) % max(x.dim(), 1)
    results, start = [], call.arguments.get("start") or 0
    for out in call.outputs:
        if out.shape == x.shape and call.name == "slice":
            results.append(tuple(dims))
            continue
        gone = out.dim() < x.dim()
        rows = () if gone else _rows(call, dims[d], start % max(x.shape[d], 1), out.shape[d])
        call.mark_split(dims[d] if gone else [axis for axis in dims[d] if axis not in rows])
        results.append(tuple(dims[:d] + ([] if gone else [rows]) + dims[d + 1 :]))
        start += 0 if gone else out.shape[d]
    return results


def _rows(call: Call, dim: Dim, start: int, size: int) -> Dim:
    """Some of the outermost axis of a dimension keep the axes inside of it: one of two batches."""
    inner = math.prod(axis.size for axis in dim[1:])
    whole = call.name in ("slice", "split", "split_with_sizes", "chunk", "narrow", "unsafe_split")
    if whole and len(dim) > 1 and call.arguments.get("step", 1) == 1 and start % inner == size % inner == 0:
        return anonymous(size // inner) + dim[1:]
    return anonymous(size)


def window(call: Call) -> Sequence[Dims]:
    """Pooling, resizing, padding, rolling: a dimension of a new length is a new axis made of the old one."""
    x, rolled = call.first(), set()
    if call.name in ("roll", "flip"):
        rolled = {d % x.dim() for d in call.arguments["dims"] or range(x.dim())}
    results = []
    for out in call.outputs:
        dims = []
        for d, (dim, size) in enumerate(zip(get_dims(x), out.shape, strict=True)):
            mixed = d in rolled and any(axis.batch for axis in dim)
            dims.append(anonymous(size) if mixed else derived(dim, size))
        results.append(tuple(dims))
    return results


def cat(call: Call) -> Sequence[Dims]:
    out = call.outputs[0]
    tensors = [x for x in call.arguments["tensors"] if x.dim() == out.dim()]
    d = call.arguments.get("dim", 0) % out.dim()
    dims = [anonymous(size) for size in out.shape]
    for i in range(out.dim()):
        columns = [get_dims(x)[i] for x in tensors]
        if i != d:
            dims[i] = merge(columns) or anonymous(out.shape[i])
        elif len(tensors) == 1:
            dims[i] = columns[0]
        elif any(axis.batch for dim in columns for axis in dim):
            same = len({x.shape[d] for x in tensors}) == 1
            dims[i] = anonymous(len(tensors)) + merge(columns) if same else anonymous(out.shape[d])
        else:
            axes = [axis for dim in columns for axis in dim]
            sources = frozenset().union(*(axis.sources for axis in axes))
            dims[i] = (Axis(out.shape[d], False, any(axis.channel for axis in axes), sources),)
    return [tuple(dims)]


def stack(call: Call) -> Sequence[Dims]:
    out, tensors = call.outputs[0], call.arguments["tensors"]
    d = call.arguments.get("dim", 0) % out.dim()
    inner = broadcast(tensors, tensors[0].shape)
    return [inner[:d] + (anonymous(out.shape[d]),) + inner[d:]]


def convolution(call: Call) -> Sequence[Dims]:
    x, weight, out = call.tensor("input"), call.tensor("weight"), call.outputs[0]
    dims = get_dims(x)
    groups = call.arguments["groups"]
    channels = out.dim() - (weight.dim() - 1)  # 1, or 0 without a batch
    kept, axes = dims[:channels], dims[channels]
    # Samples may stand before the channels, each with groups of its own (a convolution with weights for each sample).
    samples = axes[:1] if axes and axes[0].batch and groups % axes[0].size == 0 else ()
    size = out.shape[channels] // math.prod(axis.size for axis in samples)
    if groups == x.shape[channels] > 1:  # depthwise: every output channel is made of one input channel
        kept = (*kept, samples + derived(axes[len(samples) :], size))
    elif samples:
        kept = (*kept, samples + anonymous(size))
    return [kept + tuple(map(anonymous, out.shape[len(kept) :]))]


def matmul(call: Call) -> Sequence[Dims]:
    """mm, bmm and their kind: rows of the first, columns of the second."""
    pairs = {"addmm": ("mat1", "mat2"), "addbmm": ("batch1", "batch2"), "baddbmm": ("batch1", "batch2")}
    first, second = pairs.get(call.name, ("self", "vec" if call.name == "mv" else "mat2"))
    a, b = get_dims(call.tensor(first)), get_dims(call.tensor(second))
    if call.name == "mv":
        return [(a[0],)]
    if call.name == "addbmm":
        return [(a[1], b[2])]
    if len(a) == 2:
        return [(a[0], b[1])]
    return [(merge([a[0], b[0]]), a[1], b[2])]


def linear(call: Call) -> Sequence[Dims]:
    return [get_dims(call.tensor("input"))[:-1] + (anonymous(call.outputs[0].shape[-1]),)]


def attention(call: Call) -> Sequence[Dims]:
    query, value = get_dims(call.tensor("query")), get_dims(call.tensor("value"))
    first = (*query[:-1], value[-1])
    return [first if i == 0 else tuple(map(anonymous, out.shape)) for i, out in enumerate(call.outputs)]


def reduce(call: Call) -> Sequence[Dims]:
    x = call.first()
    dims = get_dims(x)
    given = call.arguments.get("dim")
    over = range(x.dim()) if given is None or given == [] else [given] if isinstance(given, int) else given
    reduced = {d % x.dim() for d in over} if x.dim() else set()
    results = []
    for out in call.outputs:
        if out.dim() == x.dim():
            results.append(tuple(() if d in reduced else dim for d, dim in enumerate(dims)))
        else:
            results.append(tuple(dim for d, dim in enumerate(dims) if d not in reduced))
    return results


def gather(call: Call) -> Sequence[Dims]:
    x, index = call.first(), call.tensor("index")
    d = call.arguments["dim"] % max(x.dim(), 1)
    dims, picks = get_dims(x), get_dims(index)
    if call.name == "index_select":
        call.mark_split(dims[d])
        return [(*dims[:d], picks[0], *dims[d + 1 :])]
    call.mark_split(dims[d])
    alike = zip(dims, picks, x.shape, index.shape, strict=True)
    return [tuple(merge([a, b]) if i != d and m == n else b for i, (a, b, m, n) in enumerate(alike))]


def index(call: Call) -> Sequence[Dims]:
    """Advanced indexing: the broadcast index tensors stand where the first of them was (first of all if apart)."""
    x, out = call.first(), call.outputs[0]
    dims, picks = get_dims(x), list(call.arguments["indices"])
    picked = [d for d, pick in enumerate(picks) if pick is not None]
    if any(picks[d].dtype == torch.bool for d in picked):
        return [tuple(map(anonymous, out.shape))]
    for d in picked:
        call.mark_split(dims[d])
    shape = torch.broadcast_shapes(*(picks[d].shape for d in picked))
    middle = broadcast([picks[d] for d in picked], shape)
    rest = [dim for d, dim in enumerate(dims) if d not in picked]
    at = picked[0] if picked == list(range(picked[0], picked[-1] + 1)) else 0
    return [(*rest[:at], *middle, *rest[at:])]


def embedding(call: Call) -> Sequence[Dims]:
    return [(*get_dims(call.tensor("indices")), anonymous(call.outputs[0].shape[-1]))]


def unfold(call: Call) -> Sequence[Dims]:
    """Windows along one dimension: it counts them, and a new last dimension counts what is in them."""
    x, out = call.first(), call.outputs[0]
    dims, d = get_dims(x), call.arguments["dimension"] % max(x.dim(), 1)
    call.mark_split(dims[d])
    return [(*dims[:d], anonymous(out.shape[d]), *dims[d + 1 :], anonymous(out.shape[-1]))]


def im2col(call: Call) -> Sequence[Dims]:
    x, out = call.first(), call.outputs[0]
    batch, channels = get_dims(x)[:2] if x.dim() == 4 else ((), get_dims(x)[0])
    columns = (*channels, *anonymous(out.shape[-2] // x.shape[-3])), anonymous(out.shape[-1])
    return [(batch, *columns) if x.dim() == 4 else columns]


def unshuffle(call: Call) -> Sequence[Dims]:
    """Blocks of pixels become channels, those of one channel together."""
    dims, out = get_dims(call.first()), call.outputs[0]
    channels = (*dims[-3], *anonymous(out.shape[-3] // call.first().shape[-3]))
    return [(*dims[:-3], channels, anonymous(out.shape[-2]), anonymous(out.shape[-1]))]


def grid_sample(call: Call) -> Sequence[Dims]:
    """The values of an image, at places of one's own for each sample."""
    image, grid = get_dims(call.tensor("input")), get_dims(call.tensor("grid"))
    return [(merge([image[0], grid[0]]), image[1], *grid[1:-1])]


def make(call: Call) -> Sequence[Dims]:
    return [tuple(map(anonymous, out.shape)) for out in call.outputs]


def restride(call: Call) -> Sequence[Dims]:
    """as_strided changes the memory format where the shape stays; otherwise nothing is known of its output."""
    x, out = call.first(), call.outputs[0]
    return [get_dims(x) if x.shape == out.shape else tuple(map(anonymous, out.shape))]


def col2im(call: Call) -> Sequence[Dims]:
    dims, out = get_dims(call.first()), call.outputs[0]
    call.mark_split(dims[-2])
    return [dims[:-2] + tuple(map(anonymous, out.shape[len(dims) - 2 :]))]


def keep_batch(call: Call) -> Sequence[Dims]:
    """Only what stands before the channels is kept: pixel_shuffle and other shuffles of channels."""
    dims = get_dims(call.first())
    call.mark_split([axis for dim in dims[-3:] for axis in dim])
    return [dims[:-3] + tuple(map(anonymous, out.shape[len(dims) - 3 :])) for out in call.outputs]


def _table() -> dict[str, tuple[Kind, Rule]]:
    families: list[tuple[Kind, Rule, str]] = [
        ("pointwise", pointwise, "hardswish hardtanh native_dropout bernoulli masked_fill silu mish softplus elu "
         "leaky_relu log_sigmoid_forward _prelu_kernel prelu nan_to_num gelu relu clamp rrelu_with_noise copy "
         "where dropout threshold hardshrink softshrink floor_divide remainder pow fmod copysign"),
        ("gate", pointwise, "sigmoid hardsigmoid"),
        ("softmax", like_first, "_softmax _safe_softmax"),
        ("norm", like_first, "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
         "_batch_norm_with_update _batch_norm_no_update cudnn_batch_norm miopen_batch_norm native_group_norm "
         "_fused_rms_norm"),
        ("norm", layer_norm, "native_layer_norm"),
        ("pointwise", like_first, "_log_softmax cumsum cumprod tril triu"),
        ("move", like_first, "clone contiguous detach alias lift_fresh _to_copy to view_of"),
        ("make", shape_like, "zeros_like ones_like full_like empty_like rand_like randn_like fill zero uniform normal"),
        ("make", make, "new_zeros new_ones new_full new_empty zeros ones full empty arange linspace eye rand randn "
         "randint randperm scalar_tensor empty_strided"),
        ("move", view, "view _unsafe_view reshape _reshape_alias flatten squeeze unsqueeze unflatten"),
        ("move", permute, "permute transpose t numpy_T mT mH adjoint swapaxes"),
        ("move", expand, "expand broadcast_to"),
        ("move", tile, "repeat"),
        ("move", take, "select slice split split_with_sizes unbind unsafe_split chunk narrow topk sort"),
        ("pool", window, "max_pool1d max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d "
         "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d adaptive_max_pool3d "
         "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_trilinear3d "
         "upsample_bicubic2d upsample_linear1d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
         "_upsample_nearest_exact2d"),
        ("move", window, "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
         "replication_pad2d replication_pad3d roll flip"),
        ("move", cat, "cat"),
        ("move", stack, "stack"),
        ("mix", convolution, "convolution convolution_overrideable"),
        ("product", matmul, "mm bmm addmm baddbmm addbmm mv"),
        ("mix", linear, "linear"),
        ("product", attention, "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention "
         "_scaled_dot_product_flash_attention _scaled_dot_product_cudnn_attention"),
        ("pool", reduce, "mean sum amax amin max min var var_mean std std_mean linalg_vector_norm norm logsumexp prod "
         "any all argmax argmin"),
        ("move", gather, "gather index_select"),
        ("move", index, "index _unsafe_index"),
        ("move", grid_sample, "grid_sampler_2d grid_sampler_3d cudnn_grid_sampler"),
        ("move", embedding, "embedding"),
        ("move", unfold, "unfold"),
        ("move", im2col, "im2col"),
        ("move", col2im, "col2im"),
        ("move", restride, "as_strided"),
        ("move", unshuffle, "pixel_unshuffle"),
        ("move", keep_batch, "pixel_shuffle channel_shuffle native_channel_shuffle"),
    ]  # fmt: skip
    return {name: (kind, rule) for kind, rule, names in families for name in names.split()}


RULES = _table()


def find_rule(func: Any) -> tuple[Kind, Rule | None]:
    """The family and the rule of an aten overload; ("unknown", None) if there is none."""
    name = func.overloadpacket.__name__
    base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    if base in ("max", "min") and "other" in func._overloadname:
        return "pointwise", pointwise
    if base in RULES:
        return RULES[base]
    return (
        ("mul" if base == "mul" else "pointwise", pointwise) if torch.Tag.pointwise in func.tags else ("unknown", None)
    )

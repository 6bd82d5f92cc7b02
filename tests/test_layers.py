"""The modules that a conversion inserts: masks, the root that deals out members, repeats; and targets to match."""

from __future__ import annotations

import copy
import io
import math
import pickle
import statistics
import time
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from masksurgery import MaskError, Masksembles1D, Masksembles2D, Masksembles3D, repeat_targets
from masksurgery.layers import Assignment, Members, Repeat, draw_members, mask_type

LAYERS = {2: Masksembles1D, 3: Masksembles1D, 4: Masksembles2D, 5: Masksembles3D}
C = 12


def all_members(n: int) -> Assignment:
    return Assignment(n, None, True)


def assigned(*member: int) -> Assignment:
    return Assignment(1, torch.tensor(member), False)


def x_of(rank: int, rows: int, channel_dim: int | None = None, channels: int = C, size: int = 3) -> Tensor:
    """Random activations with the batch in dimension 0 and channels where a layer of this rank has them."""
    channel_dim = (2 if rank == 3 else 1) if channel_dim is None else channel_dim
    shape = [rows, *[size] * (rank - 1)]
    shape[channel_dim] = channels
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def masked_rows(x: Tensor, masks: Tensor, member: list[int], channel_dim: int) -> Tensor:
    """Row by row: x times the mask of its member."""
    shape = [1] * (x.dim() - 1)
    shape[channel_dim - 1] = -1
    return torch.stack([row * masks[i].view(shape) for row, i in zip(x, member, strict=True)])


# --- as the reference layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (Masksembles1D, (4, 10)),
        (Masksembles1D, (4, 7, 10)),
        (Masksembles2D, (4, 10, 3, 2)),
        (Masksembles3D, (4, 10, 3, 2, 2)),
    ],
)
def test_readme_example_of_the_reference(kind: Any, shape: tuple[int, ...]) -> None:
    layer = kind(10, 4, 2.0)
    y = layer(torch.ones(shape))
    assert y.dtype == torch.float32 and y.shape == shape
    assert set(y.unique().tolist()) == {0.0, 1.0}
    positions = math.prod(shape) // 40
    assert y.flatten(1).sum(1).tolist() == [5.0 * positions] * 4
    assert layer.masks.any(0).all()
    channel_dim = 2 if len(shape) == 3 else 1
    assert torch.equal(y, masked_rows(torch.ones(shape), layer.masks, [0, 1, 2, 3], channel_dim))


def test_fresh_entropy_by_default_and_one_seed_one_mask() -> None:
    assert not torch.equal(Masksembles1D(1000, 4, 2.0).masks, Masksembles1D(1000, 4, 2.0).masks)
    one, two = Masksembles2D(1000, 4, 2.0, seed=3), Masksembles2D(1000, 4, 2.0, seed=3)
    assert torch.equal(one.masks, two.masks)
    assert not torch.equal(one.masks, Masksembles2D(1000, 4, 2.0, seed=4).masks)


def test_construction_leaves_the_global_random_states_alone() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    Masksembles2D(64, 4, 2.0)
    Masksembles2D(64, 4, 2.0, seed=0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state[1]).all() and np.random.get_state()[2] == numpy_state[2]


# --- rows and members ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", LAYERS)
@pytest.mark.parametrize("n", [1, 4, 7])
@pytest.mark.parametrize("rescale", [False, True])
def test_every_way_through_equals_row_by_row(rank: int, n: int, rescale: bool) -> None:
    layer = LAYERS[rank](C, n, 2.0, rescale=rescale, seed=1)
    channel_dim = 2 if rank == 3 else 1
    weights = layer.masks * (C / int(layer.masks[0].sum()) if rescale else 1.0)
    x, b = x_of(rank, 3 * n), 3
    dealt = [i for i in range(n) for _ in range(b)]
    torch.testing.assert_close(layer(x), masked_rows(x, weights, dealt, channel_dim), rtol=0, atol=0)
    torch.testing.assert_close(layer(x, all_members(n)), layer(x), rtol=0, atol=0)
    shared = x[:b]
    expanded = masked_rows(torch.cat([shared] * n), weights, dealt, channel_dim)
    torch.testing.assert_close(layer(shared, all_members(n), expand=True), expanded, rtol=0, atol=0)
    torch.testing.assert_close(layer(shared, None, expand=True), expanded, rtol=0, atol=0)
    member = [(5 * k + 2) % n for k in range(3 * n)]
    picked = masked_rows(x, weights, member, channel_dim)
    for expand in (False, True):  # one member each: nothing to expand
        torch.testing.assert_close(layer(x, assigned(*member), expand=expand), picked, rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 2, 4, 7])
@pytest.mark.parametrize("rows", range(16))
def test_any_number_of_rows_is_dealt_out_in_near_equal_groups(n: int, rows: int) -> None:
    masks = np.zeros((n, 8), dtype=bool)
    masks[:, 7] = True
    masks[range(n), range(n)] = True
    if n == 1:
        masks[:] = True
    layer = Masksembles1D(8, n, 2.0, masks=masks)
    y = layer(torch.ones(rows, 8))
    assert y.shape == (rows, 8)
    member = y[:, : n if n > 1 else 1].argmax(1).tolist()
    assert member == sorted(member)
    counts = Counter(member)
    assert all(counts[i] in (rows // n, -(-rows // n)) for i in range(n))
    assert torch.equal(y, torch.from_numpy(masks)[member].float())


@pytest.mark.parametrize(
    ("rank", "channel_dim", "kind"),
    [
        (4, -1, Masksembles2D),
        (4, 3, Masksembles2D),
        (5, -1, Masksembles3D),
        (3, 1, Masksembles1D),
        (4, -1, Masksembles1D),
    ],
)
def test_channels_elsewhere(rank: int, channel_dim: int, kind: Any) -> None:
    layer = kind(C, 4, 2.0, channel_dim=channel_dim)
    at = channel_dim % rank
    x = x_of(rank, 8, at)
    assert torch.equal(layer(x), masked_rows(x, layer.masks, [0, 0, 1, 1, 2, 2, 3, 3], at))


@pytest.mark.parametrize(("batch_dim", "channel_dim"), [(0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (0, 1)])
@pytest.mark.parametrize("rows", [4, 8, 3, 5])
def test_samples_in_another_dimension(batch_dim: int, channel_dim: int, rows: int) -> None:
    layer = Masksembles1D(C, 4, 2.0, batch_dim=batch_dim, channel_dim=channel_dim)
    shape = [5, 5, 5]
    shape[batch_dim], shape[channel_dim] = rows, C
    x = torch.randn(shape)
    plain = Masksembles1D(C, 4, 2.0, masks=layer.masks.numpy())

    def moved(y: Tensor) -> Tensor:
        return y.movedim((batch_dim, channel_dim), (0, -1))

    torch.testing.assert_close(moved(layer(x)), plain(moved(x)), rtol=0, atol=0)
    expanded = moved(layer(x, all_members(4), expand=True))
    torch.testing.assert_close(expanded, plain(moved(x), all_members(4), expand=True), rtol=0, atol=0)
    member = [(3 * k) % 4 for k in range(rows)]
    torch.testing.assert_close(moved(layer(x, assigned(*member))), plain(moved(x), assigned(*member)), rtol=0, atol=0)


@pytest.mark.parametrize("samples", [4, 8, 1, 2, 3, 5])
def test_folded_rows_of_one_sample_have_one_member(samples: int) -> None:
    fold = 4  # two samples of four rows are eight rows: a multiple of n, and still two samples
    layer = Masksembles1D(C, 4, 2.0, fold=fold)
    x = torch.randn(samples * fold, 5, C)
    member = [k * 4 // samples for k in range(samples)]
    by_row = [i for i in member for _ in range(fold)]
    assert torch.equal(layer(x), masked_rows(x, layer.masks, by_row, 2))
    assert torch.equal(layer(x, assigned(*member)), masked_rows(x, layer.masks, by_row, 2))
    everyone = [i for i in range(4) for _ in range(samples * fold)]
    expanded = masked_rows(torch.cat([x] * 4), layer.masks, everyone, 2)
    assert torch.equal(layer(x, all_members(4), expand=True), expanded)
    assert torch.equal(layer(torch.cat([x] * 4), all_members(4)), expanded)


@pytest.mark.slow
@given(st.data())
def test_layouts_in_general(data: st.DataObject) -> None:
    rank = data.draw(st.integers(2, 5))
    batch_dim, channel_dim = data.draw(st.permutations(range(rank)))[:2]
    n, fold, samples = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    layer = Masksembles1D(3, n, 2.0, seed=0, batch_dim=batch_dim, channel_dim=channel_dim - rank, fold=fold)
    if rank in (4, 5):
        layer = mask_type(rank)(3, n, 2.0, seed=0, batch_dim=batch_dim, channel_dim=channel_dim - rank, fold=fold)
    shape = [2] * rank
    shape[batch_dim], shape[channel_dim] = samples * fold, 3
    x = torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)
    y = layer(x)
    for k in range(samples * fold):
        mask = layer.masks[(k // fold) * n // samples]
        expected = x.select(batch_dim, k).movedim(channel_dim - (channel_dim > batch_dim), -1) * mask
        assert torch.equal(y.select(batch_dim, k).movedim(channel_dim - (channel_dim > batch_dim), -1), expected)


def test_a_nan_stays_in_its_row_and_masks_of_others_do_not_matter() -> None:
    layer = Masksembles2D(C, 4, 2.0)
    x = x_of(4, 8)
    before = layer(x)
    x[3] = math.nan
    rows = [k for k in range(8) if k != 3]
    assert torch.equal(layer(x)[rows], before[rows]) and layer(x)[3].isnan().all()
    layer.masks[1] ^= True
    changed = (layer(x_of(4, 8)) != before).flatten(1).any(1).tolist()
    assert changed == [False, False, True, True, False, False, False, False]


# --- dtype, memory, gradients ----------------------------------------------------------------------------------------


WAYS = {
    "rows": lambda layer, x: layer(x),
    "rest": lambda layer, x: layer(x[:-1]),
    "all": lambda layer, x: layer(x, all_members(layer.n)),
    "expand": lambda layer, x: layer(x, all_members(layer.n), expand=True),
    "index": lambda layer, x: layer(x, Assignment(1, torch.arange(len(x)) % layer.n, False)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype, rescale: bool, way: str) -> None:
    layer = Masksembles2D(C, 4, 2.0, rescale=rescale, seed=0)
    x = x_of(4, 8).to(dtype)
    y = WAYS[way](layer, x)
    assert y.dtype == dtype
    wide = WAYS[way](layer, x.double())
    torch.testing.assert_close(y.double(), wide, rtol=2 * torch.finfo(dtype).eps, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert WAYS[way](layer, x).dtype == dtype


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(
    ("kind", "memory_format"),
    [
        (Masksembles2D, torch.channels_last),
        (Masksembles3D, torch.channels_last_3d),
        (Masksembles2D, torch.contiguous_format),
        (Masksembles3D, torch.contiguous_format),
    ],
)
def test_memory_format_is_kept(kind: Any, memory_format: torch.memory_format, size: int, way: str) -> None:
    layer = kind(C, 4, 2.0)
    x = x_of(4 if kind is Masksembles2D else 5, 8, size=size)
    y = WAYS[way](layer, x.contiguous(memory_format=memory_format))
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(y, WAYS[way](layer, x))


def test_gradients_flow_to_what_is_kept_and_nowhere_else() -> None:
    layer = Masksembles2D(C, 4, 2.0, rescale=True)
    x = x_of(4, 8).requires_grad_()
    layer(x).sum().backward()
    factor = C / layer.kept
    expected = masked_rows(torch.full_like(x, factor), layer.masks, [0, 0, 1, 1, 2, 2, 3, 3], 1)
    assert torch.equal(x.grad, expected) and (expected == 0).any()
    shared = x_of(4, 2).requires_grad_()
    layer(shared, all_members(4), expand=True).sum().backward()
    used = layer.masks.sum(0).float() * factor
    torch.testing.assert_close(shared.grad, used.view(1, C, 1, 1).expand_as(shared))


def test_rescale_keeps_the_mean() -> None:
    masks = np.array([[1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [1, 0, 0, 0, 1]], dtype=bool)
    assert Masksembles1D(5, 3, 2.0, masks=masks)(torch.ones(3, 5)).mean(1).tolist() == pytest.approx([0.4] * 3)
    layer = Masksembles1D(5, 3, 2.0, masks=masks, rescale=True)
    assert layer(torch.ones(3, 5)).mean(1).tolist() == [1.0] * 3
    assert layer(torch.ones(3, 5))[0].tolist() == [2.5, 2.5, 0.0, 0.0, 0.0]


class Allocations(TorchDispatchMode):
    """Notes each operator whose result is new memory (no view) of at least `numel` elements."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.found = numel, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        if isinstance(out, Tensor) and out.numel() >= self.numel and out.untyped_storage().data_ptr() not in given:
            self.found.append(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_one_multiplication_and_no_copy(memory_format: torch.memory_format, rescale: bool, way: str) -> None:
    layer = Masksembles2D(C, 4, 2.0, rescale=rescale)
    x = x_of(4, 8, size=9).contiguous(memory_format=memory_format)
    with Allocations(7 * C * 81) as allocations:
        WAYS[way](layer, x)
    assert allocations.found == ["mul"]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 64, 56, 56), (128, 197, 768), (16384, 1024)])
def test_no_slower_than_a_multiplication(shape: tuple[int, ...]) -> None:
    layer = LAYERS[len(shape)](shape[2] if len(shape) == 3 else shape[1], 4, 2.0)
    x = torch.randn(shape)
    mask = layer.masks[0].float().view(-1, 1, 1) if len(shape) == 4 else layer.masks[0].float()
    ways = (lambda: x * mask, lambda: layer(x))

    def ratio() -> float:
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(9):
            for kept, way in zip(seconds, ways, strict=True):
                start = time.perf_counter()
                way()
                kept.append(time.perf_counter() - start)
        return statistics.median(seconds[1]) / statistics.median(seconds[0])

    ratio()  # the first run touches memory for the first time
    assert min(ratio() for _ in range(3)) <= 1.15  # another process can slow one of them down


# --- as a module -----------------------------------------------------------------------------------------------------


def test_masks_are_saved_and_restored() -> None:
    layer, other = Masksembles2D(64, 4, 2.0), Masksembles2D(64, 4, 2.0)
    assert list(layer.state_dict()) == ["masks"]
    assert layer.masks.dtype == torch.bool and layer.masks.shape == (4, 64)
    assert list(layer.parameters()) == []
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert not torch.equal(other.masks, layer.masks)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.masks, layer.masks)
    with pytest.raises(RuntimeError, match="size mismatch for masks"):
        Masksembles2D(64, 5, 2.0).load_state_dict(layer.state_dict())


def test_given_masks_are_copied() -> None:
    masks = np.eye(4, dtype=bool)
    layer = Masksembles1D(4, 4, 3.0, masks=masks)
    masks[:] = True
    assert torch.equal(layer.masks, torch.eye(4, dtype=torch.bool))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_mask_alike_and_are_their_own(duplicate: Any) -> None:
    layer = Masksembles2D(C, 4, 2.0, channel_dim=-1, rescale=True)
    x = x_of(4, 8, 3)
    before = layer(x)
    twin = duplicate(layer)
    layer.masks ^= True
    assert torch.equal(twin(x), before) and repr(twin) == repr(layer)


def test_casts_leave_the_masks_boolean() -> None:
    layer = nn.Sequential(Masksembles1D(10, 4, 2.0))
    for cast in (layer.half, layer.double, layer.bfloat16, lambda: layer.to("cpu", torch.float16)):
        assert cast()[0].masks.dtype == torch.bool
    assert layer.to("meta")[0].masks.is_meta
    assert layer(torch.empty(8, 10, device="meta")).shape == (8, 10)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (Masksembles1D(10, 4, 2.0), "Masksembles1D(10, n=4, scale=2.0, ones=5)"),
        (Masksembles1D(10, 4, 2, channel_dim=1), "Masksembles1D(10, n=4, scale=2, ones=5, channel_dim=1)"),
        (Masksembles2D(64, 4, 2.0, channel_dim=1), "Masksembles2D(64, n=4, scale=2.0, ones=34)"),
        (Masksembles3D(8, 1, 3.0), "Masksembles3D(8, n=1, scale=3.0, ones=8)"),
        (
            Masksembles2D(64, 4, 2.0, channel_dim=3, batch_dim=1, fold=49, rescale=True),
            "Masksembles2D(64, n=4, scale=2.0, ones=34, channel_dim=3, batch_dim=1, fold=49, rescale=True)",
        ),
        (Members(4), "Members(n=4, train_mode='split')"),
        (Repeat([None, "scale", (0, 1)]), "Repeat(None, scale, (0, 1))"),
    ],
)
def test_repr(layer: nn.Module, text: str) -> None:
    assert repr(layer) == text


@pytest.mark.parametrize("rank", LAYERS)
def test_mask_type(rank: int) -> None:
    assert mask_type(rank) is LAYERS[rank]
    assert mask_type(6) is Masksembles1D


@pytest.mark.parametrize("rows", [8, 6])
def test_export(rows: int) -> None:
    net, x = nn.Sequential(nn.Conv2d(C, C, 1), Masksembles2D(C, 4, 2.0, rescale=True)).eval(), x_of(4, rows)
    program = torch.export.export(net, (x,), strict=False)
    assert torch.equal(program.module()(x), net(x))
    assert torch.equal(program.state_dict["1.masks"], net[1].masks)


def test_export_with_any_multiple_of_n() -> None:
    layer, x = Masksembles1D(C, 4, 2.0), torch.randn(8, C)
    rows = {"x": {0: 4 * torch.export.Dim("b", min=1, max=64)}}
    program = torch.export.export(layer, (x,), dynamic_shapes=rows, strict=False)
    wide = torch.randn(20, C)
    assert torch.equal(program.module()(wide), layer(wide))


@pytest.mark.parametrize("rows", [8, 6])
def test_compile(rows: int) -> None:
    layer, x = Masksembles2D(C, 4, 2.0, rescale=True), x_of(4, rows)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled(x[:4], all_members(4), expand=True), layer(x[:4], all_members(4), expand=True))


def test_traced_as_a_leaf() -> None:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return isinstance(m, Masksembles1D) or super().is_leaf_module(m, name)

    net = nn.Sequential(nn.Linear(C, C), Masksembles1D(C, 4, 2.0))
    graph = fx.GraphModule(net, Tracer().trace(net))
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1"]
    x = torch.randn(8, C)
    assert torch.equal(graph(x), net(x))


# --- errors of the layers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "text"),
    [
        (Masksembles2D(10, 4, 2.0), (4, 12, 3, 3), r"^Masksembles2D\(10, n=4, .*: x of shape \(4, 12, 3, 3\) has"),
        (Masksembles1D(10, 4, 2.0), (4, 12), r"12 channels in dimension -1. Pass channel_dim= if they are elsewhere"),
        (Masksembles1D(10, 4, 2.0), (4, 10, 3), r"x of shape \(4, 10, 3\) has 3 channels in dimension -1"),
        (Masksembles2D(10, 4, 2.0), (4, 10), r"x of shape \(4, 10\) has 2 dimensions, not 4"),
        (Masksembles2D(10, 4, 2.0), (4, 10, 3, 3, 3), "has 5 dimensions, not 4"),
        (Masksembles3D(10, 4, 2.0), (4, 10, 3, 3), "has 4 dimensions, not 5"),
        (Masksembles1D(10, 4, 2.0), (10,), "has no dimensions batch_dim=0 and channel_dim=-1 beside each other"),
        (Masksembles1D(10, 4, 2.0), (), "has no dimensions batch_dim=0 and channel_dim=-1"),
        (Masksembles1D(10, 4, 2.0, channel_dim=2), (4, 10), "has no dimensions batch_dim=0 and channel_dim=2"),
        (Masksembles1D(10, 4, 2.0, batch_dim=2), (4, 10), "has no dimensions batch_dim=2 and channel_dim=-1"),
        (Masksembles1D(10, 4, 2.0, fold=3), (8, 10), "has 8 rows in dimension 0, which is no multiple of fold=3"),
    ],
)  # fmt: skip
def test_what_does_not_suit_the_masks(layer: nn.Module, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(MaskError, match=text):
        layer(torch.ones(shape))


def test_rows_that_do_not_suit_the_assignment() -> None:
    layer = Masksembles1D(10, 4, 2.0)
    with pytest.raises(MaskError, match="has 6 samples in dimension 0, which is no multiple of n=4"):
        layer(torch.ones(6, 10), all_members(4))
    with pytest.raises(MaskError, match="has 6 samples in dimension 0, and members were assigned to 5"):
        layer(torch.ones(6, 10), assigned(0, 1, 2, 3, 0))


@pytest.mark.parametrize(
    ("masks", "text"),
    [
        (np.ones((4, 9), dtype=bool), r"masks have the shape \(4, 9\), not \(n, channels\) = \(4, 10\)"),
        (np.ones((10, 4), dtype=bool), r"masks have the shape \(10, 4\)"),
        (np.ones(10, dtype=bool), r"masks have the shape \(10,\)"),
        (np.ones((4, 10)), "masks are float64, not boolean"),
        (np.ones((4, 10), dtype=np.int64), "masks are int64, not boolean"),
        (np.tri(4, 10, dtype=bool), r"masks have \[1, 2, 3, 4\] ones. Every mask needs the same number"),
        (np.zeros((4, 10), dtype=bool), r"masks have \[0, 0, 0, 0\] ones"),
    ],
)
def test_masks_of_the_wrong_kind(masks: np.ndarray, text: str) -> None:
    with pytest.raises(MaskError, match=text):
        Masksembles1D(10, 4, 2.0, masks=masks)


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        ((10, 0, 2.0), {}, "n=0 is not a number of members"),
        ((10, 0, 2.0), {"masks": np.ones((0, 10), dtype=bool)}, "n=0 is not a number of members"),
        ((10, 4, 0.5), {}, "scale=0.5 is not a finite number of at least 1"),
        ((10, 4, math.nan), {}, "scale=nan is not a finite number"),
        ((0, 4, 2.0), {}, "channels=0 is not a number of channels"),
        ((10, 4, 2.0), {"seed": -1}, "seed=-1 is not what"),
        ((10, 4, 2.0), {"batch_dim": -1}, "batch_dim=-1, fold=1, outer=1: count dimensions from 0"),
        ((10, 4, 2.0), {"fold": 0}, "batch_dim=0, fold=0, outer=1: count"),
    ],
)
def test_arguments_that_no_masks_exist_for(arguments: Any, options: Any, text: str) -> None:
    with pytest.raises(MaskError, match=text):
        Masksembles2D(*arguments, **options)


# --- the root --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("batch", range(21))
def test_groups_are_near_equal(batch: int, n: int) -> None:
    state = torch.get_rng_state()
    member = draw_members(batch, n)
    assert member.shape == (batch,) and member.dtype == torch.int64
    counts = torch.bincount(member, minlength=n)
    assert len(counts) == n
    assert set(counts.tolist()) <= {batch // n, -(-batch // n)}
    assert torch.equal(member[: batch // n * n], torch.arange(n).repeat_interleave(batch // n))
    if batch % n == 0:
        assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    elif n > 1:
        assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)


@pytest.mark.parametrize(("batch", "n"), [(1, 4), (3, 4), (6, 4), (9, 7)])
def test_every_member_has_the_same_share_of_many_batches(batch: int, n: int) -> None:
    times = 4000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        counts = sum(torch.bincount(draw_members(batch, n), minlength=n) for _ in range(times))
        torch.manual_seed(0)
        again = sum(torch.bincount(draw_members(batch, n), minlength=n) for _ in range(times))
    assert torch.equal(counts, again)  # from the default generator
    share = (batch % n) / n
    extra = counts - times * (batch // n)
    deviation = math.sqrt(times * share * (1 - share))
    assert (extra - times * share).abs().max() < 4 * deviation


def test_the_root_decides_by_its_mode() -> None:
    x = torch.randn(6, 3)
    members = Members(4)
    assert members.eval()(x) == (4, None, True)
    repeats, member, aggregate = members.train()(x)
    assert (repeats, aggregate) == (1, False)
    assert member[:4].tolist() == [0, 1, 2, 3] and len(set(member[4:].tolist())) == 2
    members.train_mode = "repeat"
    assert members(x) == (4, None, False)
    assert members.eval()(x) == (4, None, True)


def test_a_fixed_assignment_is_for_training_alone() -> None:
    members, x = Members(4), torch.randn(3, 2)
    members.fixed = torch.tensor([2, 2, 0])
    state = torch.get_rng_state()
    assert members.train()(x).index.tolist() == [2, 2, 0]
    assert torch.equal(torch.get_rng_state(), state)
    assert members.eval()(x).index is None
    assert list(members.state_dict()) == []
    layer = Masksembles1D(2, 4, 1.0)
    with pytest.raises(MaskError, match="has 5 samples in dimension 0, and members were assigned to 3"):
        layer(torch.ones(5, 2), members.train()(torch.ones(5, 2)))


@pytest.mark.parametrize(
    "inputs",
    [(3, torch.zeros(5, 2)), {"flag": None, "x": torch.zeros(5, 2)}, [torch.zeros(()), torch.zeros(5)]],
)
def test_the_batch_size_is_that_of_one_leaf(inputs: Any) -> None:
    assert Members(2, leaf=1).train()(inputs).index.shape == (5,)


# --- repeats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 4, 5])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_repeat_of_a_tensor(n: int, rank: int) -> None:
    x = torch.randn(2, 3, 4, 5, 2)[(...,) + (0,) * (5 - rank)]
    for batch_dim in range(rank):
        y = Repeat([(batch_dim, 1)])(x, all_members(n))
        assert [torch.equal(part, x) for part in y.chunk(n, batch_dim)] == [True] * n


@pytest.mark.parametrize(("rank", "memory_format"), [(4, torch.channels_last), (5, torch.channels_last_3d)])
def test_repeat_keeps_the_memory_format(rank: int, memory_format: torch.memory_format) -> None:
    x = x_of(rank, 2).contiguous(memory_format=memory_format)
    y = Repeat([(0, 1)])(x, all_members(3))
    assert y.is_contiguous(memory_format=memory_format) and y.shape[0] == 6


@pytest.mark.parametrize("batch_dim", [0, 1])
def test_repeat_within_each_of_the_outer_batches(batch_dim: int) -> None:
    outer, b, n = 3, 2, 4
    x = torch.arange(outer * b * 2).reshape(outer * b, 2).movedim(0, batch_dim)
    y = Repeat([(batch_dim, outer)])(x, all_members(n)).movedim(batch_dim, 0)
    x = x.movedim(batch_dim, 0)
    assert y.shape == (outer * n * b, 2)
    for o in range(outer):
        for i in range(n):
            for k in range(b):
                assert torch.equal(y[(o * n + i) * b + k], x[o * b + k])


def test_repeat_of_integers_and_trees() -> None:
    x, mask = torch.arange(6).reshape(2, 3), torch.tensor([True, False])
    value = (x, [2, 7, None], {"size": torch.Size([2, 3]), "mask": mask}, OrderedDict(text="a"))
    plan: Any = [(0, 1), "scale", None, None, "scale", None, (0, 1), None]
    found = Repeat(plan)(value, all_members(2))
    assert torch.equal(found[0], torch.cat([x, x]))
    assert found[1] == [4, 7, None] and tuple(found[2]["size"]) == (4, 3)
    assert found[2]["mask"].tolist() == [True, False, True, False]
    assert found[3] == OrderedDict(text="a") and type(found[3]) is OrderedDict
    assert Repeat(["scale"])(5, all_members(3)) == 15


def test_repeat_of_a_size_is_a_size() -> None:
    size = Repeat(["scale", None])(torch.Size([2, 3]), all_members(4))
    assert type(size) is torch.Size and size == (8, 3) and size.numel() == 24


def test_repeat_hands_on_what_is_for_one_member_each() -> None:
    value = (torch.ones(2), 3)
    assert Repeat([(0, 1), "scale"])(value, assigned(0, 1)) is value
    assert Repeat([(0, 1), "scale"])(value, all_members(1)) is value


def test_repeat_of_another_tree_than_planned() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Repeat(["scale"])((1, 2), all_members(2))


# --- targets ---------------------------------------------------------------------------------------------------------


def test_repeat_targets() -> None:
    y = torch.tensor([5, 6, 7])
    assert repeat_targets(y, 2).tolist() == [5, 6, 7, 5, 6, 7]
    assert repeat_targets(y, 1).tolist() == [5, 6, 7]
    soft = torch.rand(3, 4)
    assert torch.equal(repeat_targets(soft, 3), torch.cat([soft, soft, soft]))
    weight = torch.tensor(0.5)
    found = repeat_targets({"y": (y, [y]), "weight": weight, "name": "a", "none": None, "lam": 0.3}, 2)
    assert found["y"][0].tolist() == found["y"][1][0].tolist() == [5, 6, 7, 5, 6, 7]
    assert found["weight"] is weight and (found["name"], found["none"], found["lam"]) == ("a", None, 0.3)


def test_repeat_targets_matches_the_outputs_of_repeat_training() -> None:
    members, y = Members(3, "repeat").train(), torch.arange(4.0)
    x = torch.stack([y, y], 1)
    out = Masksembles1D(2, 3, 1.0)(x, members(x), expand=True)
    assert torch.equal(out[:, 0], repeat_targets(y, 3))


@pytest.mark.parametrize(
    ("y", "n", "text"),
    [
        (torch.arange(3), 0, "n=0 is not a number of members"),
        (np.arange(3), 2, "cannot repeat a ndarray. Pass the tensors in it"),
        ({"boxes": object()}, 2, "cannot repeat a object"),
    ],
)
def test_targets_that_cannot_be_repeated(y: Any, n: int, text: str) -> None:
    with pytest.raises(MaskError, match=text):
        repeat_targets(y, n)


@pytest.mark.parametrize("expand", [False, True])
def test_a_batch_that_stands_there_several_times(expand: bool) -> None:
    layer = Masksembles1D(10, 4, 2.0, seed=0, outer=3, fold=2)
    x = torch.randn(3, 5 if expand else 20, 2, 10)  # batches, samples, rows of a sample, channels
    rows = layer(x.flatten(0, 2), Assignment(4, None, True), expand=expand).unflatten(0, (3, 4, 5, 2))
    for i in range(4):
        samples = x if expand else x[:, 5 * i : 5 * i + 5]
        assert torch.equal(rows[:, i], samples * layer.masks[i])
    index = torch.tensor([2, 0, 1, 3, 2])
    x = torch.randn(3, 5, 2, 10)
    split = layer(x.flatten(0, 2), Assignment(1, index, False)).view(3, 5, 2, 10)
    assert torch.equal(split, x * layer.masks[index][:, None])
    with pytest.raises(MaskError, match="no multiple of fold=2 times outer=3"):
        layer(torch.ones(20, 10))

"""The hazard nets: the sites worked out by hand, and every member against the base model with its masks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import masksurgery
from masksurgery.model import ConvertedModel
from masksurgery.rewrite import repeats_in
from nets import NETS, REFUSED, Net, randomise
from oracles import by_member, flips_found, input_repeat


def make(net: Net, batch: int = 3) -> tuple[nn.Module, tuple]:
    torch.manual_seed(1)
    base = randomise(net.build(), 1).double().eval()
    return base, as_double(net.inputs(batch))


def as_double(inputs: tuple) -> tuple:
    return tuple(x.double() if x.is_floating_point() else x for x in inputs)


def convert(net: Net, base: nn.Module, inputs: tuple, **kwargs) -> ConvertedModel:
    return masksurgery.convert(base, example_inputs=inputs, **{**net.convert_kwargs, **kwargs})


def end_name(model: ConvertedModel, node_name: str) -> str:
    """The end of a chain as the nets write it: a module's name, or fn: and the name of a function."""
    node = next(node for node in model.graph.nodes if node.name == node_name)
    if node.op == "call_module":
        return str(node.target)
    return f"fn:{node.target if isinstance(node.target, str) else node.target.__name__}"


nets = pytest.mark.parametrize("net", NETS.values(), ids=lambda net: net.name)


@nets
def test_sites_are_those_worked_out_by_hand(net: Net) -> None:
    base, inputs = make(net)
    model = convert(net, base, inputs)
    surgery = model.surgery
    assert tuple((site.layer, end_name(model, site.node)) for site in surgery.sites) == net.sites
    reasons = {skip.layer: skip.reason for skip in surgery.skipped}
    assert set(reasons) == set(net.skipped)
    for layer, word in net.skipped.items():
        assert word in reasons[layer], (layer, reasons[layer])
    assert set(surgery.output_layers) == {layer for layer, reason in reasons.items() if reason.startswith("output")}
    assert {layer: site.layer for site in surgery.sites for layer in site.chain} == net.chained
    dims = {site.layer: (site.batch_dim, site.channel_dim) for site in surgery.sites}
    assert {layer: dims[layer] for layer in net.dims} == net.dims
    assert {site.layer for site in surgery.sites if site.fold > 1} == set(net.folded)
    assert {site.layer: site.outer for site in surgery.sites if site.outer > 1} == net.outer


@nets
def test_members_are_the_base_model_with_masks(net: Net) -> None:
    base, _ = make(net)
    for batch in (1, 3, 5):
        inputs = as_double(net.inputs(batch))
        model = convert(net, base, inputs)
        masksurgery.verify(model, base, *inputs)


@pytest.mark.slow(parts=8)
@nets
def test_training_rows_are_those_of_their_member(net: Net) -> None:
    base, inputs = make(net, 5)
    # Functional dropout cannot be switched off, and draws once for all members where it stands before the masks.
    for mode in ("split",) if net.stochastic else ("split", "repeat"):
        model = convert(net, base, inputs, train_mode=mode)
        masksurgery.verify(model, base, *inputs, mode="train")


@pytest.mark.slow(parts=8)
@nets
def test_base_model_is_unchanged(net: Net) -> None:
    base, inputs = make(net)
    before, flags = copy.deepcopy(base.state_dict()), [m.training for m in base.modules()]
    model = convert(net, base, inputs)
    model(*inputs)
    assert flags == [m.training for m in base.modules()]
    assert all(torch.equal(x, before[name]) for name, x in base.state_dict().items())
    keys = list(base.state_dict())
    assert list(model.state_dict())[: len(keys)] == keys


def members_of(model: ConvertedModel, inputs: tuple) -> list[Tensor]:
    """The members [b, n, ...] of every output."""
    model.eval()
    model.output = "members"
    with torch.no_grad():
        return [x for x in tree_leaves(model(*inputs)) if isinstance(x, Tensor)]


def assert_near(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.mark.slow(parts=8)
@nets
def test_late_repeat_is_input_repeat(net: Net) -> None:
    base, inputs = make(net)
    layers = [site[0] for site in net.sites]
    some = dict.fromkeys((layers[0], layers[-1], layers[len(layers) // 2]))
    for include in (*([layer] for layer in some), None):
        model = convert(net, base, inputs, include=include)
        late = members_of(model, inputs)
        dims = [d for d in model.head_module.batch_dims if d is not None]
        rows = [x for x in tree_leaves(input_repeat(model, inputs)) if isinstance(x, Tensor)]
        for a, x, d in zip(late, rows, dims, strict=True):
            assert_near(a, by_member(x, 4, d))
        if include is not None:  # else it is verified above
            masksurgery.verify(model, base, *inputs)


@pytest.mark.slow(parts=8)
@nets
def test_scale_one_is_the_base_model(net: Net) -> None:
    base, inputs = make(net)
    model = convert(net, base, inputs, scale=1.0)
    outputs = [x for x in tree_leaves(base(*inputs)) if isinstance(x, Tensor)]
    dims = [d for d in model.head_module.batch_dims if d is not None]
    for members, x, d in zip(members_of(model, inputs), outputs, dims, strict=True):
        for i in range(4):
            assert_near(members[:, i], x.detach().movedim(d, 0))


@pytest.mark.slow(parts=8)
@nets
def test_any_flipped_bit_is_found(net: Net) -> None:
    base, inputs = make(net)
    model = convert(net, base, inputs, n=2)
    for site in model.surgery.sites:
        assert flips_found(model, base, site.mask, inputs), site


@pytest.mark.slow(parts=8)
@nets
def test_members_and_samples_are_isolated(net: Net) -> None:
    base, inputs = make(net)
    model = convert(net, base, inputs)
    before = members_of(model, inputs)
    names = [node.target for node in model.graph.nodes if node.op == "placeholder"]
    broken = tuple(x.clone() for x in inputs)
    for name, x in zip(names, broken, strict=True):
        if name not in net.unbatched and x.is_floating_point():
            x[1] = float("nan")
    for a, b in zip(members_of(model, broken), before, strict=True):
        assert net.spreads_nan or torch.equal(a[[0, 2]], b[[0, 2]])
    for site in model.surgery.sites:
        masks = model.get_submodule(site.mask).masks
        masks[2] = masks[2].roll(1)
    for a, b in zip(members_of(model, inputs), before, strict=True):
        assert_near(a[:, [0, 1, 3]], b[:, [0, 1, 3]])


@pytest.mark.slow(parts=8)
@nets
def test_copies_predict_the_same(net: Net) -> None:
    base, inputs = make(net)
    model = convert(net, base, inputs)
    expected = members_of(model, inputs)
    for twin in (copy.deepcopy(model), copy.copy(model)):
        assert all(torch.equal(a, b) for a, b in zip(members_of(twin, inputs), expected, strict=True))
        assert twin.surgery == model.surgery
        assert twin.train().training and model.training is False


@pytest.mark.parametrize("net", [net for net in NETS.values() if net.half], ids=lambda net: net.name)
def test_half_precision_stays_and_the_head_is_wide(net: Net) -> None:
    torch.manual_seed(1)
    base, inputs = randomise(net.build(), 1).eval().bfloat16(), net.inputs(3)
    inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)
    model = convert(net, base, inputs)
    seen = []
    for site in model.surgery.sites:
        model.get_submodule(site.mask).register_forward_hook(
            lambda _, args, out: seen.append((args[0].dtype, out.dtype))
        )
    assert all(x.dtype == torch.float32 for x in members_of(model, inputs))
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize(
    ("name", "include", "repeats"),
    [
        ("conv_bn_relu", ["conv2"], {"act_repeat"}),  # the shortcut, which a masked branch is added to
        ("conv_bn_relu", ["stem"], set()),  # the mask itself expands
        ("arange_index", ["fc1"], {"argmax_repeat", "getitem_repeat"}),  # the size: arange(B) is made again from it
        ("class_token_after_masks", ["stem"], {"getitem_repeat"}),  # so is cls_token.expand(B, -1, -1)
    ],
)
def test_only_what_is_shared_is_repeated(name: str, include: list[str], repeats: set[str]) -> None:
    net = NETS[name]
    base, inputs = make(net)
    model = convert(net, base, inputs, include=include)
    assert {str(node.target) for node in repeats_in(model.graph, model)} == repeats


@pytest.mark.parametrize("net", REFUSED.values(), ids=lambda net: net.name)
def test_mixed_samples_are_refused(net) -> None:
    torch.manual_seed(0)
    with pytest.raises(masksurgery.LayoutError, match=net.node):
        masksurgery.convert(net.build().eval(), example_inputs=net.inputs(3))

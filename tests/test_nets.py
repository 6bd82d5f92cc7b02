"""The hazard nets: the sites worked out by hand, and every member against the base model with its masks."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import NETS, REFUSED, Net, randomise
from torch import nn

import masksurgery
from masksurgery.model import ConvertedModel


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
    assert {layer: site.layer for site in surgery.sites for layer in site.chain} == net.chained
    dims = {site.layer: (site.batch_dim, site.channel_dim) for site in surgery.sites}
    assert {layer: dims[layer] for layer in net.dims} == net.dims
    assert {site.layer for site in surgery.sites if site.fold > 1} == set(net.folded)


@nets
def test_members_are_the_base_model_with_masks(net: Net) -> None:
    base, _ = make(net)
    for batch in (1, 3, 5):
        inputs = as_double(net.inputs(batch))
        model = convert(net, base, inputs)
        masksurgery.verify(model, base, *inputs)


@nets
def test_training_rows_are_those_of_their_member(net: Net) -> None:
    base, inputs = make(net, 5)
    # Functional dropout cannot be switched off, and draws once for all members where it stands before the masks.
    for mode in ("split",) if net.stochastic else ("split", "repeat"):
        model = convert(net, base, inputs, train_mode=mode)
        masksurgery.verify(model, base, *inputs, mode="train")


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


@pytest.mark.parametrize("net", REFUSED.values(), ids=lambda net: net.name)
def test_mixed_samples_are_refused(net) -> None:
    torch.manual_seed(0)
    with pytest.raises(masksurgery.LayoutError, match=net.node):
        masksurgery.convert(net.build().eval(), example_inputs=net.inputs(3))

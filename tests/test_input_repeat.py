"""Inputs repeated n times, and nothing later: the same predictions, by another graph."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.utils._pytree import tree_leaves

import masksurgery
from masksurgery.input_repeat import repeat_inputs
from masksurgery.inputs import random_inputs
from masksurgery.macs import count_macs
from masksurgery.rewrite import repeats_in
from masksurgery.types import TraceError
from nets import NETS, Net
from oracles import by_member, input_repeat
from test_nets import assert_near, convert, make, members_of


@pytest.mark.slow(parts=8)
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_it_is_the_converted_model(net: Net) -> None:
    base, inputs = make(net)
    model = convert(net, base, inputs, include=[net.sites[-1][0]])
    late = members_of(model, inputs)
    early = repeat_inputs(model)
    assert repeats_in(early.graph, early) == []
    with torch.no_grad():
        found = [x for x in tree_leaves(early(*inputs)) if isinstance(x, torch.Tensor)]
    for a, b in zip(found, late, strict=True):
        assert_near(a, b)
    dims = [d for d in model.head_module.batch_dims if d is not None]
    rows = [x for x in tree_leaves(input_repeat(model, inputs)) if isinstance(x, torch.Tensor)]
    for a, x, d in zip(found, rows, dims, strict=True):
        assert_near(a, by_member(x, 4, d))


@pytest.mark.parametrize("where", ["all", "head"])
def test_it_costs_n_times_the_base_model(where: str) -> None:
    base, x = timm.create_model("test_resnet").eval(), torch.zeros(1, 3, 160, 160)
    model = masksurgery.convert(base, n=3, where=where)  # type: ignore[arg-type]
    before = model.code
    assert count_macs(repeat_inputs(model), (x,)) == 3 * count_macs(base, (x,))
    assert model.code == before and model(x).members.shape == (1, 3, 1000)


def test_modules_are_the_model_s_own() -> None:
    model = masksurgery.convert(timm.create_model("test_vit"), where="head").eval()
    parameters = {id(x) for x in model.parameters()}
    assert {id(x) for x in repeat_inputs(model).parameters()} <= parameters


def test_a_model_in_training_is_refused() -> None:
    model = masksurgery.convert(timm.create_model("test_resnet"), where="head").train()
    with pytest.raises(TraceError, match=r"is in training mode, and has no head there. Call model\.eval\(\) first"):
        repeat_inputs(model)


def test_random_inputs_are_the_same_again_and_draw_nothing_from_torch() -> None:
    description = {
        "args": [{"shape": [2, 3], "dtype": "bfloat16"}, {"shape": [2], "dtype": "int64"}],
        "kwargs": {"flag": True},
    }
    before = torch.get_rng_state()
    (x, ids), kwargs = random_inputs(description)
    (again, _), _ = random_inputs(description)
    (other, _), _ = random_inputs(description, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert (x.dtype, x.unique().numel(), ids.tolist(), kwargs) == (torch.bfloat16, 6, [0, 0], {"flag": True})

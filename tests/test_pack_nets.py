"""The hazard nets, packed: the same predictions, members that stand alone, and a converted model left as it was."""

from __future__ import annotations

import copy
import pickle
import time
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import masksurgery
from masksurgery import ConfigError, MasksurgeryError
from masksurgery.layers import _Masksembles
from masksurgery.macs import count_macs
from masksurgery.model import ConvertedModel
from masksurgery.pack import PackedModel
from masksurgery.pack.choosing import fastest
from nets import NETS, Net, randomise
from packing import as_dtype, assert_members, assert_packed, assert_same, in_dtype, largest, members_of, run

BATCHES = (1, 3, 5)
# Their members differ in more than values, or vmap has no rule for a layer.
UNGROUPED = {
    "grouped_conv", "two_batches_in_one", "weights_for_each_sample", "lstm",
    "lstm_sequence_first", "gru", "gru_sequence_first",
}  # fmt: skip
# torch cannot pickle these converted either: a parametrised module, and the function behind F.max_pool2d.
UNPICKLED = {"parametrised", "flatten_to_linear"}
# What comes after the masks is a barrier, or stands behind one and reads all channels: all members share it.
WITHOUT_OWN_WEIGHTS = {"encoder_layer_as_output", "arange_index"}

nets = pytest.mark.parametrize("net", NETS.values(), ids=lambda net: net.name)


def samples(net: Net, batch: int = 3, dtype: torch.dtype = torch.float64) -> tuple:
    torch.manual_seed(batch)
    return as_dtype(net.inputs(batch), dtype)


def convert(net: Net, **kwargs: Any) -> tuple[nn.Module, ConvertedModel]:
    torch.manual_seed(1)
    base = randomise(net.build(), 1).double().eval()
    return base, masksurgery.convert(base, example_inputs=samples(net), **{**net.convert_kwargs, **kwargs})


@cache
def converted(net_name: str) -> tuple[nn.Module, ConvertedModel]:
    """Base and converted model, for tests that change neither."""
    return convert(NETS[net_name])


@cache
def packed(net_name: str, layout: str = "unrolled", dense: bool | None = False) -> PackedModel:
    """For tests that do not change it."""
    return masksurgery.pack(converted(net_name)[1], layout, dense=dense)


@nets
@pytest.mark.parametrize("dense", [False, pytest.param(True, marks=pytest.mark.slow(parts=8))], ids=["sums", "dense"])
def test_packed_is_converted(net: Net, dense: bool) -> None:
    _, model = converted(net.name)
    ours = packed(net.name, dense=dense)
    assert (ours.layout, ours.dense, ours.training) == ("unrolled", dense, False)
    for batch in BATCHES:
        assert_packed(ours, model, samples(net, batch))


@pytest.mark.slow(parts=8)
@nets
def test_grouped_is_converted(net: Net) -> None:
    _, model = converted(net.name)
    if net.name in UNGROUPED:
        with pytest.raises(MasksurgeryError, match='layout="grouped" is not possible'):
            masksurgery.pack(model, "grouped")
        return
    ours = packed(net.name, "grouped", None)
    assert (ours.layout, ours.dense) == ("grouped", True)
    for batch in BATCHES:
        assert_packed(ours, model, samples(net, batch))


@pytest.mark.slow(parts=8)
@nets
def test_single_precision(net: Net) -> None:
    model = in_dtype(converted(net.name)[1], torch.float32)
    for dense in (False, True):
        assert_packed(masksurgery.pack(model, "unrolled", dense=dense), model, samples(net, 3, torch.float32))


@pytest.mark.slow(parts=8)
@nets
def test_a_member_alone_is_the_base_model_with_its_masks(net: Net) -> None:
    base, model = converted(net.name)
    ours = packed(net.name)
    assert_members(ours, model, base, samples(net, 5))
    alone = ours.member(1)
    assert isinstance(alone, fx.GraphModule) and not isinstance(alone, PackedModel)
    assert not any(isinstance(module, _Masksembles) for module in alone.modules())


@pytest.mark.slow(parts=8)
@nets
def test_members_are_isolated(net: Net) -> None:
    """Other masks for one member change that one alone."""
    _, model = convert(net)
    inputs = samples(net)
    before = members_of(packed(net.name), inputs)
    for site in model.surgery.sites:
        masks = model.get_submodule(site.mask).masks
        masks[2] = masks[2].roll(1)
    ours = masksurgery.pack(model, "unrolled", dense=False)
    assert_packed(ours, model, inputs)
    others = [0, 1, 3]
    for a, b in zip(members_of(ours, inputs), before, strict=True):
        assert (a[:, others] - b[:, others]).abs().max() <= 1e-12 * b.abs().max()
    assert any(not torch.equal(a[:, 2], b[:, 2]) for a, b in zip(members_of(ours, inputs), before, strict=True))


@pytest.mark.slow(parts=8)
@nets
def test_weights_of_a_member_are_its_own(net: Net) -> None:
    """One weight of member 0, changed: member 0 changes, and no other."""
    ours = copy.deepcopy(packed(net.name))
    inputs = samples(net)
    before = members_of(ours, inputs)
    own = [p for name, p in ours.named_parameters() if name.startswith("members.0.") and p.numel()]
    changed = []
    for parameter in own:
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[0] += 1.0
        after = members_of(ours, inputs)
        assert all(torch.equal(a[:, 1:], b[:, 1:]) for a, b in zip(after, before, strict=True))
        changed.append(any(not torch.equal(a[:, 0], b[:, 0]) for a, b in zip(after, before, strict=True)))
        with torch.no_grad():
            parameter.copy_(kept)
    assert any(changed) != (net.name in WITHOUT_OWN_WEIGHTS)


@pytest.mark.slow(parts=8)
@nets
def test_the_converted_model_is_unchanged(net: Net) -> None:
    _, model = convert(net)
    inputs = samples(net)
    state = copy.deepcopy(model.state_dict())
    flags, code, surgery = [m.training for m in model.modules()], model.code, model.surgery.to_json()
    expected = run(model, inputs)
    ours = masksurgery.pack(model, "unrolled", dense=False)
    with torch.no_grad():
        for tensor in (*ours.parameters(), *ours.buffers()):  # they are no views of the model's
            if tensor.is_floating_point():
                tensor.fill_(0.5)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert (model.code, model.surgery.to_json()) == (code, surgery)
    assert_same(run(model, inputs), expected, 1, 0)
    assert model.train().training


@pytest.mark.slow(parts=8)
@nets
def test_packed_costs_no_more(net: Net) -> None:
    _, model = converted(net.name)
    inputs = samples(net)
    assert count_macs(packed(net.name), inputs) <= count_macs(model, inputs)


@pytest.mark.slow(parts=8)
@nets
def test_copies_predict_the_same(net: Net) -> None:
    ours, inputs = packed(net.name), samples(net)
    expected = run(ours, inputs)
    pickled = [] if net.name in UNPICKLED else [pickle.loads(pickle.dumps(ours))]
    for twin in (copy.deepcopy(ours), *pickled):
        assert isinstance(twin, PackedModel)
        assert (twin.layout, twin.dense, twin.surgery) == (ours.layout, ours.dense, ours.surgery)
        assert [barrier.reason for barrier in twin.barriers] == [barrier.reason for barrier in ours.barriers]
        assert_same(run(twin, inputs), expected, 1, 0)
        next(p for p in twin.parameters() if p.numel()).data.fill_(0.5)  # its own
        assert_same(run(ours, inputs), expected, 1, 0)


# --- settings --------------------------------------------------------------------------------------------------------

SOME = pytest.mark.parametrize("name", ["conv_bn_relu", "squeeze_excite", "auxiliary_head", "class_token_after_masks"])


@pytest.mark.slow
@SOME
@pytest.mark.parametrize(("n", "scale"), [(1, 2.0), (1, 1.0), (3, 1.0), (5, 3.0)])
def test_other_numbers_of_members(name: str, n: int, scale: float) -> None:
    net = NETS[name]
    base, model = convert(net, n=n, scale=scale)
    for layout in ("unrolled", "grouped"):
        ours = masksurgery.pack(model, layout)
        assert_packed(ours, model, samples(net))
        assert_members(ours, model, base, samples(net))


@pytest.mark.slow
@SOME
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("where", ["all", "head"])
def test_other_masks(name: str, rescale: bool, where: str) -> None:
    net = NETS[name]
    _, model = convert(net, rescale=rescale, where=where)
    for dense in (False, True):
        assert_packed(masksurgery.pack(model, "unrolled", dense=dense), model, samples(net))


@SOME
def test_a_model_in_training_is_packed_for_eval(name: str) -> None:
    net = NETS[name]
    _, model = convert(net)
    model.train()
    ours = masksurgery.pack(model, "unrolled")
    assert model.training and not any(module.training for module in ours.modules())
    assert_packed(ours, model.eval(), samples(net))


@pytest.mark.parametrize("net", [net for net in NETS.values() if net.half], ids=lambda net: net.name)
def test_half_precision(net: Net) -> None:
    """What is folded stays in the model's dtype, and loses no more than the model itself does."""
    exact = converted(net.name)[1]
    inputs = samples(net, 3, torch.bfloat16)
    expected = members_of(exact, as_dtype(inputs, torch.float64))
    model = in_dtype(exact, torch.bfloat16)
    ours = masksurgery.pack(model, "unrolled", dense=False)
    assert {p.dtype for p in ours.parameters()} <= {torch.bfloat16}
    size = largest(expected)
    for a, b, x in zip(members_of(ours, inputs), members_of(model, inputs), expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.is_floating_point():
            assert (a.double() - x).abs().max() <= max(2 * float((b.double() - x).abs().max()), 0.02 * size)


@SOME
def test_settings_go_along(name: str) -> None:
    net = NETS[name]
    _, model = convert(net)
    model.temperature, model.output = 2.0, "logits"
    ours = masksurgery.pack(model, "unrolled")
    assert (ours.temperature, ours.output, ours.surgery) == (2.0, "logits", model.surgery)
    assert_same(run(ours, samples(net)), run(model, samples(net)), 10, 1e-10)
    ours.output = "mean"
    assert model.output == "logits"


def test_on_the_meta_device_the_structure_is_the_same() -> None:
    _, model = converted("squeeze_excite")
    shapes = {name: x.shape for name, x in packed("squeeze_excite").state_dict().items()}
    shadow = masksurgery.pack(copy.deepcopy(model).to("meta"), "unrolled", dense=False)
    assert {name: x.shape for name, x in shadow.state_dict().items()} == shapes
    assert all(x.is_meta for x in shadow.parameters())


def test_layout_auto_chooses_one() -> None:
    _, model = converted("conv_bn_relu")
    ours = masksurgery.pack(model)
    assert ours.layout in ("unrolled", "grouped") and isinstance(ours.dense, bool)
    assert_packed(ours, model, samples(NETS["conv_bn_relu"]))


@pytest.mark.parametrize(
    ("unrolled", "grouped", "chosen"),
    [
        ((0.02, 0.02), (0.0, 0.0), "grouped"),
        ((0.02, 0.0), (0.0, 0.02), "unrolled"),  # side by side only on a single sample
        ((0.0, 0.02), (0.02, 0.0), "unrolled"),
    ],
)
def test_the_fastest_is_fast_on_a_batch_too(
    unrolled: tuple[float, float], grouped: tuple[float, float], chosen: str
) -> None:
    """Seconds that a forward of one sample and of more takes longer."""
    _, model = convert(NETS["conv_bn_relu"])
    models = [masksurgery.pack(model, "unrolled"), masksurgery.pack(model, "grouped")]
    for one, pauses in zip(models, (unrolled, grouped), strict=True):
        one.inputs["args"][0]["shape"][0] = 1
        one.register_forward_pre_hook(lambda _, args, pauses=pauses: time.sleep(pauses[len(args[0]) > 1]))
    assert fastest(models).layout == chosen


def test_no_random_number_is_drawn() -> None:
    _, model = converted("conv_bn_relu")
    before = torch.get_rng_state()
    masksurgery.pack(model)
    assert torch.equal(torch.get_rng_state(), before)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_packed() -> None:
    base, model = converted("conv_bn_relu")
    with pytest.raises(ConfigError, match=f"converted model.*{type(base).__name__}"):
        masksurgery.pack(base)
    with pytest.raises(ConfigError, match="packed already"):
        masksurgery.pack(packed("conv_bn_relu"))
    with pytest.raises(ConfigError, match=r"layout='wide'.*unrolled.*grouped"):
        masksurgery.pack(model, "wide")
    with pytest.raises(ConfigError, match=r"grouped.*dense=False"):
        masksurgery.pack(model, "grouped", dense=False)


def test_a_packed_model_cannot_be_trained() -> None:
    ours = copy.deepcopy(packed("conv_bn_relu"))
    with pytest.raises(MasksurgeryError, match="packed"):
        ours.train()
    assert not ours.training and ours.eval() is ours and ours.train(False) is ours


@pytest.mark.parametrize("i", [-1, 4])
def test_there_is_no_such_member(i: int) -> None:
    with pytest.raises(ConfigError, match=rf"{i}.*0.*3"):
        packed("conv_bn_relu").member(i)


def test_samples_do_not_reach_each_other() -> None:
    ours, inputs = packed("conv_bn_relu"), samples(NETS["conv_bn_relu"])
    before = members_of(ours, inputs)[0]
    broken: tuple[Tensor, ...] = tuple(x.clone() for x in inputs)
    broken[0][1] = float("nan")
    after = members_of(ours, broken)[0]
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and after[1].isnan().all()

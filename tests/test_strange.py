"""Unusual modules, beyond what holds for every hazard net: frozen, shared, parametrised, compiled, lazy."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import masksurgery
import nets_strange
from masksurgery.model import ConvertedModel
from nets import NETS, randomise


def make(name: str, batch: int = 5) -> tuple[nn.Module, ConvertedModel, tuple[Tensor, ...]]:
    """A hazard net in float64 and eval, the ensemble made of it, and inputs."""
    net = NETS[name]
    torch.manual_seed(1)
    base = randomise(net.build(), 1).double().eval()
    inputs = tuple(x.double() for x in net.inputs(batch))
    return base, masksurgery.convert(base, example_inputs=inputs, **net.convert_kwargs), inputs


def train_step(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """One step of gradient descent on whatever may be trained."""
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    output = model(*inputs)
    (output[0] if isinstance(output, tuple) else output).square().mean().backward()
    optimiser.step()


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[bool]:
    return [torch.equal(a[name], b[name]) for name in a]


# --- frozen parts ----------------------------------------------------------------------------------------------------


def base_with_rows_masked(base: nn.Module, model: ConvertedModel, index: Tensor, x: Tensor) -> Tensor:
    """The base model in the mode that it is in, with the mask of its member on each sample, by hooks of our own."""
    handles = []
    for site in model.surgery.sites:
        rows = torch.from_numpy(model.surgery.masks[site.mask])[index] * (site.channels / site.ones)
        end = base.get_submodule(site.node)
        handles.append(end.register_forward_hook(lambda m, args, out, rows=rows: out * rows[:, :, None, None]))
    try:
        return base(x)
    finally:
        for handle in handles:
            handle.remove()


def test_frozen_batchnorm_keeps_its_statistics_and_every_layer_its_members() -> None:
    base, model, (x,) = make("conv_bn_relu", 6)
    index = model.members_module.fixed = torch.tensor([2, 0, 3, 1, 1, 0])
    for frozen in (base.train(), model.train()):
        frozen.bn1.eval()
    model.get_submodule(model.surgery.sites[1].mask).eval()  # a mask's own flag means nothing
    before = state(model)
    expected = base_with_rows_masked(base, model, index, x)
    assert (model(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
    after = model.state_dict()
    assert torch.equal(after["bn1.running_mean"], before["bn1.running_mean"])
    assert torch.equal(after["bn1.running_var"], before["bn1.running_var"])
    assert after["bn1.num_batches_tracked"] == 0
    for name in ("bn", "bn2"):
        assert not torch.equal(after[f"{name}.running_mean"], before[f"{name}.running_mean"])
        assert torch.allclose(after[f"{name}.running_mean"], base.state_dict()[f"{name}.running_mean"])


def test_a_drawn_assignment_is_the_same_in_all_layers_of_a_partly_frozen_model() -> None:
    _, model, (x,) = make("conv_bn_relu", 6)
    model.train()
    for name in ("stem", "bn", "act", "bn1"):
        model.get_submodule(name).eval()
    seen = []
    for site in model.surgery.sites:
        model.get_submodule(site.mask).register_forward_hook(lambda m, args, out: seen.append(args[1].index))
    for _ in range(3):
        seen.clear()
        model(x)
        assert len(seen) == 3 and all(torch.equal(index, seen[0]) for index in seen)
        assert sorted(seen[0].bincount(minlength=4).tolist()) == [1, 1, 2, 2]


def test_a_frozen_stage_stays_while_the_rest_trains() -> None:
    base, _, inputs = make("conv_bn_relu")
    stage = ("stem", "bn")
    for name in stage:
        base.get_submodule(name).requires_grad_(False)
    model = masksurgery.convert(base, example_inputs=inputs).train()
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in base.parameters()]
    for name in stage:
        model.get_submodule(name).eval()
    before = state(model)
    for _ in range(2):
        train_step(model, inputs)
    for name, x in model.state_dict().items():
        frozen = name.partition(".")[0] in stage or name.endswith("masks")
        assert torch.equal(x, before[name]) == frozen, name
    model.train()  # thaws its BatchNorm, as in any model
    assert model.get_submodule("bn").training


def test_sites_do_not_depend_on_the_mode_of_the_base_model() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.3), nn.ReLU(), nn.Dropout2d(0.2))
    base = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 4))
    x = torch.randn(2, 3, 2, 2)
    for mode in (True, False):
        (site,) = masksurgery.convert(base.train(mode), example_inputs=(x,)).surgery.sites
        assert site.node == "_3"


# --- shared and computed weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tied_weights", "tied_convolutions"])
def test_shared_weights_stay_shared_under_both_keys(name: str, tmp_path: Path) -> None:
    base, model, inputs = make(name)
    one, other = ("fc1", "fc2") if name == "tied_weights" else ("conv1", "conv2")
    masksurgery.save(model, tmp_path / "dir")
    loaded = masksurgery.load(tmp_path / "dir", base=base)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert twin.get_submodule(one).weight is twin.get_submodule(other).weight
        assert {f"{one}.weight", f"{other}.weight"} < set(twin.state_dict())
        assert len(list(twin.parameters())) == len(list(base.parameters()))
    train_step(model.train(), inputs)
    assert torch.equal(model.state_dict()[f"{one}.weight"], model.state_dict()[f"{other}.weight"])
    assert not torch.equal(model.state_dict()[f"{one}.weight"], base.state_dict()[f"{one}.weight"])


@pytest.mark.parametrize("name", ["parametrised", "weights_by_hook"])
def test_computed_weights_follow_their_parameters(name: str) -> None:
    base, model, inputs = make(name)
    train_step(model.train(), inputs)
    # Both hold weights that autograd computed, in their hooks' way, which copy.deepcopy alone refuses.
    base.train()(*inputs)
    keys = list(base.state_dict())
    missing, unexpected = base.load_state_dict({key: model.state_dict()[key] for key in keys})
    assert not missing and not unexpected
    for mode in ("eval", "train"):
        masksurgery.verify(model, base, *inputs, mode=mode)
    again = masksurgery.convert(base, example_inputs=inputs)
    masksurgery.verify(again, base, *inputs)
    assert list(AveragedModel(model).module.state_dict()) == list(model.state_dict())  # EMA


@pytest.mark.parametrize("name", ["parametrised", "weights_by_hook", "compiled_block", "einops_functions", "lstm"])
def test_saved_loaded_and_pickled(name: str, tmp_path: Path) -> None:
    _, model, inputs = make(name)
    expected = model(*inputs).members
    masksurgery.save(model, tmp_path / "dir")
    other = randomise(NETS[name].build(), 7).double().eval()
    assert torch.equal(masksurgery.load(tmp_path / "dir", base=other)(*inputs).members, expected)
    if name != "parametrised":  # which torch itself does not pickle
        assert torch.equal(pickle.loads(pickle.dumps(model))(*inputs).members, expected)


# --- compiled, lazy, None, and torch's fast path ---------------------------------------------------------------------


def refuse(*args: object) -> None:
    raise AssertionError("compiled")


def compiled_in_place() -> nn.Module:
    base = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nets_strange.Block(), nn.Linear(8, 4))
    base[2].compile(backend=refuse)
    base[0].compile(backend=refuse)
    return base


def compiled_block() -> nn.Module:
    class Net(nets_strange.CompiledBlock):
        backend = staticmethod(refuse)

    return Net()


@pytest.mark.parametrize("build", [compiled_in_place, compiled_block])
def test_nothing_is_compiled_by_a_conversion_nor_by_its_proof(build) -> None:
    torch.manual_seed(0)
    base, x = build().double().eval(), torch.randn(3, 5, dtype=torch.float64)
    with pytest.raises(Exception, match="compiled"):
        base(x)
    model = masksurgery.convert(base, example_inputs=(x,))
    masksurgery.verify(model, base, x)
    train_step(model.train(), (x,))


def test_what_is_not_compiled_any_more_is_said() -> None:
    base, model, _ = make("compiled_block")
    assert "'block' is not compiled any more: compile the converted model" in model.surgery.notes
    assert "block._orig_mod.fc1.weight" in model.state_dict()
    assert list(model.state_dict())[: len(base.state_dict())] == list(base.state_dict())


def test_a_compiled_model_is_refused() -> None:
    base = torch.compile(nn.Linear(5, 4), backend="eager")
    with pytest.raises(masksurgery.ConfigError, match=r"compiled\. Convert what torch\.compile was given"):
        masksurgery.convert(base, example_inputs=(torch.zeros(2, 5),))


def test_lazy_layers_have_to_run_first() -> None:
    base, x = nets_strange.Lazy(), torch.zeros(2, 3, 8, 8)
    with pytest.raises(masksurgery.ConfigError, match=r"'conv' is a LazyConv2d .* Run the model once"):
        masksurgery.convert(base, example_inputs=(x,))
    base(x)
    assert [site.layer for site in masksurgery.convert(base, example_inputs=(x,)).surgery.sites] == ["conv", "fc"]


def test_none_stays_none() -> None:
    _, model, inputs = make("none_in_tuple")
    prediction, nothing = model(*inputs)
    assert isinstance(prediction, masksurgery.Prediction) and nothing is None
    logits, nothing = model.train()(*inputs)
    assert logits.shape == (5, 4) and nothing is None


@pytest.mark.parametrize("name", ["encoder_layer", "encoder_layer_sequence_first"])
def test_the_fast_path_of_an_encoder_layer_sees_the_masks(name: str) -> None:
    base, model, inputs = make(name)
    members, fused = [], torch.backends.mha.get_fastpath_enabled()
    try:
        for enabled in (True, False):
            torch.backends.mha.set_fastpath_enabled(enabled)
            with torch.no_grad():
                members.append(model(*inputs).members)
            masksurgery.verify(model, base, *inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    assert (members[0] - members[1]).abs().max() <= 1e-12 * members[0].abs().max()
    with pytest.raises(masksurgery.SiteError, match=r"layer\.linear1.*inside TransformerEncoderLayer 'layer'"):
        masksurgery.convert(base, example_inputs=inputs, include=["layer.linear1"])


def test_einops_stays_in_the_graph_as_one_call_each() -> None:
    _, model, _ = make("einops_functions")
    names = [node.target.__name__ for node in model.graph.nodes if node.op == "call_function"]
    assert [name for name in names if name in ("rearrange", "reduce")] == ["rearrange", "rearrange", "reduce"]

"""adopt: layers of other packages give way to ours, with their masks and their outputs."""

from __future__ import annotations

import copy
import logging
import pickle

import numpy as np
import pytest
import torch
import torchvision
from masksembles.torch import Masksembles1D as Reference1D
from masksembles.torch import Masksembles2D as Reference2D
from torch import Tensor, nn
from torch.nn.utils import parametrize

import masksurgery
import peers
from masksurgery import MaskError, Masksembles1D, Masksembles2D, adopt
from masksurgery.adopt import implied_scale
from masksurgery.masks import kept_channels

N = 4


class Masked(nn.Module):
    """A block, and the mask that its author typed in behind it."""

    def __init__(self, block: nn.Module, mask: nn.Module) -> None:
        super().__init__()
        self.block, self.mask = block, mask

    def forward(self, x: Tensor) -> Tensor:
        return self.mask(self.block(x))


def hand_masked_resnet18() -> nn.Module:
    """torchvision's resnet18 with reference layers after each stage and before the classifier, typed in by hand."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    for channels, name in zip((64, 128, 256, 512), ("layer1", "layer2", "layer3", "layer4"), strict=True):
        setattr(model, name, Masked(getattr(model, name), Reference2D(channels, N, 2.0)))
    model.avgpool = nn.Sequential(model.avgpool, nn.Flatten(), Reference1D(512, N, 2.0))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def small(mask: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3), mask, nn.ReLU()).eval()


def images(count: int = 2 * N) -> Tensor:
    return torch.randn(count, 3, 6, 5, generator=torch.Generator().manual_seed(1))


def test_resnet18_with_reference_layers_typed_in_by_hand():
    model = hand_masked_resnet18()
    x = torch.randn(2 * N, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        masks = {
            name: layer.masks.bool()
            for name, layer in model.named_modules()
            if "masks" in dict(layer.named_buffers(recurse=False))
        }
        assert adopt(model) is model
        assert torch.equal(model(x), before)
    state = model.state_dict()
    assert len(masks) == 5
    for name, expected in masks.items():
        assert torch.equal(state[f"{name}.masks"], expected)
    assert {type(layer) for layer in model.modules() if "Masksembles" in type(layer).__name__} == {
        Masksembles1D,
        Masksembles2D,
    }
    with torch.no_grad():  # the members do differ, or nothing of this would be seen
        rows = model(x[:1].expand(N, -1, -1, -1))
    assert len(torch.unique(rows, dim=0)) == N


def test_training_goes_on_as_before():
    model = hand_masked_resnet18().train()
    adopted = adopt(copy.deepcopy(model))
    assert all(layer.training for layer in adopted.modules())
    x = torch.randn(2 * N, 3, 64, 64)
    for one in (model, adopted):
        one(x).square().mean().backward()
    gradients = [[p.grad for p in one.parameters()] for one in (model, adopted)]
    assert len(gradients[0]) == len(gradients[1])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("make", "ours"),
    [
        (peers.named("Masksembles2D", peers.Old), Masksembles2D),
        (peers.Mask2d, Masksembles2D),
        (peers.named("Masksembles2D", peers.Probly), Masksembles2D),
        (peers.named("Masksembles2DLayer", peers.Probly), Masksembles2D),
        (peers.MasksemblesLayer, Masksembles1D),
        (Reference2D, Masksembles2D),
    ],
    ids=["masksembles 1.1", "torch-uncertainty", "probly", "probly before", "lightning-uq-box", "masksembles 1.1.1"],
)
def test_images(make, ours):
    mask = make(16, N, 2.0)
    model = small(mask)
    with torch.no_grad():
        before = model(images())
        after = adopt(model)(images())
    assert type(model[1]) is ours
    assert model[1].scale == pytest.approx(2.0, abs=0.2)
    assert torch.equal(model[1].masks, mask.masks.bool())
    assert before.dtype == after.dtype == torch.float32
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    "make",
    [
        peers.named("Masksembles1D", peers.Old),
        peers.Mask1d,
        peers.MasksemblesLinear,
        peers.named("MasksemblesLinearLayer", peers.Probly),
        peers.MasksemblesLayer,
        Reference1D,
    ],
    ids=["masksembles 1.1", "torch-uncertainty", "probly", "probly before", "lightning-uq-box", "masksembles 1.1.1"],
)
def test_vectors(make):
    mask = make(16, N, 2.0)
    model = nn.Sequential(nn.Linear(3, 16), mask).eval()
    x = torch.randn(3 * N, 3)
    with torch.no_grad():
        before = model(x)
        assert torch.equal(adopt(model)(x), before)
    assert type(model[1]) is Masksembles1D
    assert torch.equal(model[1].masks, mask.masks.bool())


def test_a_mask_layer_inside_of_another_layer():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), peers.MaskedConv2d(16, 8, N, 2.0)).eval()
    with torch.no_grad():
        before = model(images())
        assert torch.equal(adopt(model)(images()), before)
    assert type(model[1].mask) is Masksembles2D


def test_a_layer_in_two_places_stays_one():
    mask = Reference2D(16, N, 2.0)
    model = nn.ModuleDict({"a": nn.Sequential(mask, mask), "b": mask})
    adopt(model)
    assert type(model["b"]) is Masksembles2D
    assert model["a"][0] is model["a"][1] is model["b"]


def test_a_layer_by_itself():
    ours = adopt(Reference1D(16, N, 2.0).eval())
    assert type(ours) is Masksembles1D
    assert not ours.training


def test_a_single_image_goes_through_all_members():
    """The reference makes n rows of one, which the layers behind it take for the members'."""
    model = hand_masked_resnet18()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        adopted = adopt(model)
        assert len(before) == N and torch.equal(adopted(x), before)
        assert torch.equal(copy.deepcopy(adopted)(x), before)
        assert len(adopt(small(peers.Mask2d(16, N, 2.0)))(images(1))) == 1  # its own layers take no such batch


def test_subclasses():
    class Mine(Reference2D): ...

    model = adopt(small(Mine(16, N, 2.0)))
    assert type(model[1]) is Masksembles2D


def test_what_only_has_the_name_is_left_alone():
    other = type("Mask2d", (nn.Identity,), {})()
    model = adopt(nn.Sequential(other, small(Reference2D(16, N, 2.0))))
    assert model[0] is other
    assert type(model[1][1]) is Masksembles2D


def test_a_model_that_refuses_attributes():
    class Fixed(nn.Sequential):
        def __setattr__(self, name: str, value: object) -> None:
            if "mask" in type(value).__module__:
                raise AttributeError("no")
            super().__setattr__(name, value)

    model = adopt(Fixed(nn.Conv2d(3, 16, 3), Reference2D(16, N, 2.0)))
    assert type(model[1]) is Masksembles2D


def test_other_batches_and_dtypes_than_the_reference_takes():
    model = adopt(small(Reference2D(16, N, 2.0)))
    assert model(images(6)).shape == (6, 16, 4, 3)
    assert model.double()(images().double()).dtype == torch.float64


def test_copies_and_pickles():
    model = adopt(small(Reference2D(16, N, 2.0)))
    with torch.no_grad():
        expected = model(images())
        assert torch.equal(copy.deepcopy(model)(images()), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images()), expected)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [peers.named("Masksembles2D", peers.Old), peers.Mask2d])
def test_checkpoints_with_float64_masks_load(make):
    theirs, ours = small(make(16, N, 2.0)), adopt(small(make(16, N, 2.0)))
    assert theirs.state_dict()["1.masks"].dtype == torch.float64
    assert not torch.equal(theirs[1].masks.bool(), ours[1].masks)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        assert torch.equal(ours(images()), theirs(images()))


def test_an_old_checkpoint_loads_where_the_new_reference_stands():
    old = small(peers.named("Masksembles2D", peers.Old)(16, N, 2.0))
    new = small(Reference2D(16, N, 2.0))
    with pytest.raises(RuntimeError, match=r"Unexpected key.*1\.masks"):
        new.load_state_dict(old.state_dict())
    adopt(new).load_state_dict(old.state_dict())
    with torch.no_grad():
        assert torch.equal(new(images()), old(images()))


def test_who_adopts_layers_whose_masks_were_never_saved_is_told(caplog):
    with caplog.at_level(logging.WARNING, "masksurgery"):
        adopt(small(peers.Mask2d(16, N, 2.0)))
        assert not caplog.records
        adopt(small(Reference2D(16, N, 2.0)))
    assert "Sequential: no checkpoint of it holds its masks (1). masksembles 1.1.1 leaves its masks out" in caplog.text


def test_masks_of_other_dtypes_become_boolean_even_where_tensors_are_taken_over():
    ours, old = adopt(small(Reference2D(16, N, 2.0))), small(peers.Mask2d(16, N, 2.0))
    ours.load_state_dict(old.state_dict(), assign=True)
    assert ours[1].masks.dtype == torch.bool
    assert torch.equal(ours[1].masks, old[1].masks.bool())


@pytest.mark.parametrize("within", ["the model", "a part of a model", "what is wrapped"])
def test_who_loads_a_checkpoint_without_masks_is_told(caplog, within):
    trained = small(Reference2D(16, N, 2.0))
    adopted = small(Reference2D(16, N, 2.0))
    if within == "what is wrapped":
        adopted = adopt(nn.DataParallel(adopted)).module
    else:
        adopt(adopted)
    if within == "a part of a model":
        trained, adopted = nn.ModuleDict({"net": trained}), nn.ModuleDict({"net": adopted})
    caplog.clear()
    with caplog.at_level(logging.WARNING, "masksurgery"), pytest.raises(RuntimeError, match=r"Missing key.*1\.masks"):
        adopted.load_state_dict(trained.state_dict())
    assert f"has no {'net.' if within.startswith('a part') else ''}1.masks. masksembles 1.1.1 leaves" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "masksurgery"):
        adopted.load_state_dict(trained.state_dict(), strict=False)
        assert "numpy.random.seed" in caplog.text
        caplog.clear()
        adopted.load_state_dict(adopted.state_dict())
    assert not caplog.records


def test_who_loads_many_missing_masks_is_told_once(caplog):
    trained, adopted = hand_masked_resnet18().state_dict(), adopt(hand_masked_resnet18())
    caplog.clear()
    with caplog.at_level(logging.WARNING, "masksurgery"):
        adopted.load_state_dict(trained, strict=False)
    assert len(caplog.records) == 1


def test_masks_that_are_no_parameters_are_in_no_checkpoint_either(caplog):
    """What torch-uncertainty's become on a GPU: a tensor that `Parameter(...).to(device)` returned."""
    mask = peers.Mask2d(16, N, 2.0)
    values = mask.masks.detach()
    del mask.masks
    mask.masks = values
    with caplog.at_level(logging.WARNING, "masksurgery"):
        adopt(small(mask))
    assert "no checkpoint of it holds its masks (1)" in caplog.text


def test_the_masks_of_a_seeded_reference_model_can_be_had_again():
    """What the warning advises: the same numpy.random.seed gives the same masks."""
    state = np.random.get_state()
    try:
        trained, again = [(np.random.seed(7), small(Reference2D(16, N, 2.0)))[1] for _ in range(2)]
    finally:
        np.random.set_state(state)
    again.load_state_dict(trained.state_dict())
    with torch.no_grad():
        assert torch.equal(adopt(again)(images()), trained(images()))


# --- errors: nothing is changed ---------------------------------------------------------------------------------------


def broken(change: str) -> nn.Module:
    mask = peers.named("Masksembles2D", peers.Counting if change == "counting" else peers.Old)(16, N, 2.0)
    if change == "halves":
        mask.masks.data *= 0.5
    elif change == "unequal":
        mask.masks.data[0] = 1
    elif change == "hook":
        mask.register_forward_hook(lambda *_: None)
    elif change == "state hook":
        mask.register_state_dict_post_hook(lambda *_: None)
    elif change == "meta":
        mask.to("meta")
    elif change == "parametrised":
        parametrize.register_parametrization(mask, "masks", nn.Identity())
    elif change == "compiled":
        return torch.compile(mask, backend="eager")
    elif change == "vectors only":
        mask.forward = lambda x: x @ x  # type: ignore[method-assign]
    return mask


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("halves", r"adopt: 2\.1 \(peers\.Masksembles2D\) has masks of other numbers than 0 and 1"),
        ("unequal", r"cannot be replaced: masks have \[16, .* ones\. Every mask needs the same number"),
        ("hook", r"has hooks, which would be lost\. Remove them first"),
        ("state hook", r"has hooks, which would be lost\. Remove them first"),
        ("meta", r"is on the meta device, where masks have no values\. Adopt the model once it has its weights"),
        ("parametrised", r"is parametrised\. Remove its parametrisations first"),
        ("compiled", r"a mask layer is compiled by itself, as it is\. Adopt the model first, then compile it"),
        ("counting", r"computes something else than its masks, one after another"),
        ("vectors only", r"fails on \(8, 16, 3, 2\): "),
    ],
)
def test_what_cannot_be_replaced(change, message):
    model = nn.Sequential(small(peers.Mask2d(16, N, 2.0)), nn.Identity(), small(broken(change)))
    modules, state = list(model.modules()), getattr(model[2][1], "calls", None)
    with pytest.raises(MaskError, match=message):
        adopt(model)
    assert list(model.modules()) == modules  # the first one, which could have been replaced, is there too
    assert getattr(model[2][1], "calls", None) == state


def test_nothing_to_replace():
    with pytest.raises(
        MaskError, match=r"adopt: Sequential has no mask layer of another package, of a class Masksembles1D, "
    ):
        adopt(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(MaskError, match=r"the mask layers in Sequential are masksurgery's already"):
        adopt(adopt(small(Reference2D(16, N, 2.0))))
    with pytest.raises(MaskError, match="already"):
        adopt(
            masksurgery.convert(
                nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), example_inputs=(torch.ones(1, 8),)
            )
        )


@pytest.mark.parametrize("scale", [1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_scale_of_masks_that_do_not_say_it(n, scale):
    """Found from the kept share: with many channels the share is nearly that of the scale."""
    assert implied_scale(kept_channels(100_000, n, scale) / 100_000, n) == pytest.approx(scale, rel=1e-3)


def test_the_scale_of_masks_that_do_not_overlap_and_of_full_ones():
    assert implied_scale(0.5, 2) == pytest.approx(1e6)
    assert implied_scale(1.0, 1) == implied_scale(1.0, 4) == 1

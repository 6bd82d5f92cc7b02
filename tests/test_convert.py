"""convert(): its options, its record, what it keeps of the base model, and what it says to bad input."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import timm.optim
import torch
import torchvision
from torch import Tensor, nn

import masksurgery
from masksurgery import ConfigError, LayoutError, MaskError, SiteError, TraceError
from masksurgery.prediction import RegressionPrediction
from nets import randomise

IMAGE = (torch.zeros(2, 3, 16, 16),)


def small_net(classes: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(12, classes),
    ).eval()  # fmt: skip


def convert(model: nn.Module | None = None, **kwargs) -> masksurgery.ConvertedModel:
    return masksurgery.convert(model or small_net(), **{"example_inputs": IMAGE, **kwargs})


def layers(model: masksurgery.ConvertedModel) -> list[str]:
    return [site.layer for site in model.surgery.sites]


# --- bad input -------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict, type[Exception], str]] = {
    "n=0": ({"n": 0}, MaskError, r"n=0 is not a number of members"),
    "n=2.5": ({"n": 2.5}, MaskError, r"n=2.5 is not a number of members"),
    "scale<1": ({"scale": 0.5}, MaskError, r"scale=0.5 is not a finite number of at least 1"),
    "scale=nan": ({"scale": float("nan")}, MaskError, r"scale=nan is not a finite number of at least 1"),
    "scale=inf": ({"scale": float("inf")}, MaskError, r"scale=inf is not a finite number"),
    "scale text": ({"scale": "2"}, MaskError, r"scale='2' is not a number"),
    "after=[]": ({"after": []}, SiteError, r"after=\[\] selects nothing"),
    "after unknown name": ({"after": ["Conv2"]}, SiteError, r"after names 'Conv2', which is no class.*Conv2d"),
    "after no type": ({"after": [3]}, SiteError, r"after holds 3, which is no type of module"),
    "after absent": (
        {"after": [nn.LSTM]},
        SiteError,
        r"after=\(LSTM\) selects nothing in Sequential. It has .*Conv2d \(2\)",
    ),
    "include nothing": (
        {"include": ["3.conv"]},
        SiteError,
        r"include=\['3.conv'\] matches none of the 3 candidate layers",
    ),
    "all excluded": ({"exclude": ["*"]}, SiteError, r"exclude=\['\*'\] leaves nothing of the 3 layers selected"),
    "where": ({"where": "tail"}, ConfigError, r"where='tail' is not one of 'all', 'head'"),
    "task": ({"task": "classify"}, ConfigError, r"task='classify' is not one of 'classification'"),
    "train_mode": ({"train_mode": "both"}, ConfigError, r"train_mode='both' is not one of 'split', 'repeat'"),
    "seed": ({"seed": -1}, ConfigError, r"seed=-1 is not a non-negative integer"),
    "class_dim": ({"class_dim": 2}, ConfigError, r"class_dim=2 is not in the output's shape \(\d+, 4\)"),
    "heteroscedastic": ({"heteroscedastic": True}, ConfigError, r"heteroscedastic=True needs task=\"regression\""),
    "two outputs": ({"heteroscedastic": True, "task": "regression"}, ConfigError, r"needs two outputs of one shape"),
    "tie": ({"tie": "block"}, ConfigError, r"tie='block' is not \"stream\".* nor None"),
    "heads": ({"heads": True}, SiteError, r"heads=True finds no attention in Sequential: no softmax"),
    "heads in the head": ({"heads": True, "where": "head"}, ConfigError, r"heads=True masks attention inside"),
    "multiple_of=0": ({"multiple_of": 0}, MaskError, r"multiple_of=0 is not a positive integer"),
    "multiple_of=1.5": ({"multiple_of": 1.5}, MaskError, r"multiple_of=1.5 is not a positive integer"),
    "unbatched": (
        {"unbatched": ["mask"]},
        ConfigError,
        r"unbatched=\('mask',\) names \['mask'\]; the inputs are \['input'\]",
    ),
    "no tensor": ({"example_inputs": (3,)}, TraceError, r"hold no tensor"),
    "two inputs": ({"example_inputs": IMAGE * 2}, TraceError, r"example_inputs do not fit Sequential.forward"),
    "wrong shape": ({"example_inputs": (torch.zeros(2, 5, 16, 16),)}, LayoutError, r"cannot be run without data"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    kwargs, error, message = BAD[case]
    base = small_net()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(error, match=message):
        convert(base, **kwargs)
    assert all(torch.equal(x, before[name]) for name, x in base.state_dict().items())


def test_example_inputs_are_needed() -> None:
    with pytest.raises(TraceError, match="example_inputs is missing: Sequential does not say what it takes"):
        masksurgery.convert(small_net())


def test_converted_already() -> None:
    with pytest.raises(ConfigError, match="holds Masksembles layers already"):
        convert(convert())
    with pytest.raises(ConfigError, match="Convert its base model instead"):
        convert(nn.Sequential(nn.Conv2d(3, 8, 3), masksurgery.Masksembles2D(8, 4, 2.0)))


def test_no_candidate() -> None:
    with pytest.raises(SiteError, match=r"has no convolution and no Linear. It has .*ReLU \(1\)"):
        convert(nn.Sequential(nn.ReLU(), nn.Flatten()))


def test_no_layer_can_be_masked() -> None:
    with pytest.raises(SiteError, match=r"No layer can be masked. 1: output layer"):
        convert(nn.Sequential(nn.Flatten(), nn.Linear(768, 4)))


def test_named_in_full_but_never_called() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.used(x).relu())

    with pytest.raises(SiteError, match="include names 'unused', which cannot be masked: unused"):
        convert(Unused(), example_inputs=(torch.zeros(2, 4),), include=["unused", "used"])


def test_one_class_is_no_classification() -> None:
    with pytest.raises(ConfigError, match=r'has one class in dimension 1. Pass task="multilabel"'):
        convert(small_net(classes=1))


def test_a_child_that_the_graph_module_needs() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.graph(x).relu())

    with pytest.raises(ConfigError, match="has a child named 'graph'"):
        convert(Graph(), example_inputs=(torch.zeros(2, 4),))
    wrapped = convert(nn.Sequential(Graph()), example_inputs=(torch.zeros(2, 4),))
    assert layers(wrapped) == ["0.graph"]


# --- selection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, ["0", "3"]),
        ({"include": "0"}, ["0"]),
        ({"include": ["[03]"]}, ["0", "3"]),
        ({"exclude": ["0"]}, ["3"]),
        ({"include": lambda name, module: isinstance(module, nn.Conv2d) and module.out_channels > 8}, ["3"]),
        ({"after": nn.Conv2d}, ["0", "3"]),
        ({"after": "ReLU"}, ["2", "4"]),
        ({"after": (nn.BatchNorm2d,)}, ["1"]),
        ({"after": [nn.BatchNorm2d, "ReLU"]}, ["1", "4"]),
        ({"include": ["8", "0"]}, ["0", "8"]),  # the output layer, because it is named in full
        ({"where": "head"}, ["8"]),
    ],
)
def test_selection(kwargs: dict, expected: list[str]) -> None:
    model = convert(**kwargs)
    assert layers(model) == expected
    masked = {site.layer for site in model.surgery.sites} | {skip.layer for skip in model.surgery.skipped}
    if "after" not in kwargs:
        assert masked == {"0", "3", "8"}
    masksurgery.verify(model.double(), _base_of(model).double(), torch.randn(3, 3, 16, 16, dtype=torch.float64))


def _base_of(model: masksurgery.ConvertedModel) -> nn.Module:
    base = small_net()
    base.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith(".masks")})
    return base


def test_where_head_masks_the_input_of_the_output_layer() -> None:
    (site,) = convert(where="head").surgery.sites
    assert (site.layer, site.channels, site.batch_dim, site.channel_dim) == ("8", 12, 0, 1)
    assert site.node == "_6"  # the flattened features, before the dropout


def test_all_of_a_wildcard_may_be_skipped() -> None:
    with pytest.raises(SiteError, match=r"No layer can be masked. 8: output layer"):
        convert(include=["8*"])


def test_exclude_beats_a_name_in_full() -> None:
    with pytest.raises(SiteError, match="leaves nothing of the 1 layers selected"):
        convert(include=["0"], exclude=["0"])


# --- masks and record ------------------------------------------------------------------------------------------------


def test_record() -> None:
    model = convert(n=3, scale=1.7, seed=5)
    record = json.loads(model.surgery.to_json())
    assert (record["n"], record["scale"], record["seed"]) == (3, 1.7, 5)
    assert record["sites"][0] == {
        "layer": "0", "call": 0, "node": "_2", "mask": "_0_mask", "channels": 8, "ones": 5, "batch_dim": 0,
        "channel_dim": 1, "fold": 1, "chain": [], "readers": [], "part": "", "outer": 1, "stream": "", "heads": 0,
    }  # fmt: skip
    assert record["skipped"] == [{"layer": "8", "reason": model.surgery.skipped[0].reason}]
    assert any("fine-tune" in note for note in record["notes"])
    for site in model.surgery.sites:
        masks = model.get_submodule(site.mask).masks
        assert masks.shape == (3, site.channels)
        assert masks.dtype == torch.bool
        assert masks.sum(1).tolist() == [site.ones] * 3
        assert masks.any(0).all()


def test_hooks_of_containers_are_in_the_record() -> None:
    base = small_net()
    base.register_forward_hook(lambda *args: None)
    assert "hooks of 'the model itself' are not called" in convert(base).surgery.notes


def test_seeds() -> None:
    one, same, other = convert(seed=1), convert(seed=1), convert(seed=2)
    for name, masks in one.surgery.masks.items():
        assert np.array_equal(masks, same.surgery.masks[name])
    assert any(not np.array_equal(masks, other.surgery.masks[name]) for name, masks in one.surgery.masks.items())
    assert one.surgery == same.surgery


def test_sites_of_one_width_differ() -> None:
    base = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    masks = list(convert(base, example_inputs=(torch.zeros(1, 6),)).surgery.masks.values())
    assert masks[0].shape == masks[1].shape
    assert not np.array_equal(*masks)


def test_global_state_is_left_alone() -> None:
    base, state, numpy_state = small_net(), torch.get_rng_state(), np.random.get_state()[1].copy()
    convert(base)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.get_default_dtype() == torch.float32


def test_fine_tune_is_said(caplog: pytest.LogCaptureFixture) -> None:
    convert(where="head")
    assert not caplog.records
    convert()
    assert "fine-tune it before you use its predictions" in caplog.text


# --- what is kept of the base model ----------------------------------------------------------------------------------


def test_base_checkpoint_leaves_only_masks_missing() -> None:
    base = timm.create_model("test_resnet")
    model = masksurgery.convert(base)
    found = model.load_state_dict(base.state_dict(), strict=False)
    assert found.unexpected_keys == []
    assert found.missing_keys == [f"{site.mask}.masks" for site in model.surgery.sites]
    keys = list(base.state_dict())
    assert list(model.state_dict())[: len(keys)] == keys


def test_attributes_and_answers_of_timm() -> None:
    base = timm.create_model("test_vit", num_classes=7)
    model = masksurgery.convert(base)
    for name in ("pretrained_cfg", "num_classes", "num_features", "embed_dim"):
        assert getattr(copy.deepcopy(model), name) == getattr(base, name)
    assert model.no_weight_decay() == base.no_weight_decay()
    assert model.group_matcher() == base.group_matcher()
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.7)
    assert [g["lr_scale"] for g in groups] == [
        g["lr_scale"] for g in timm.optim.param_groups_layer_decay(base, layer_decay=0.7)
    ]
    assert not hasattr(convert(), "group_matcher")


def test_training_flags_are_those_of_the_base() -> None:
    base = timm.create_model("test_resnet").train()
    base.layer1.eval()
    model = masksurgery.convert(base)
    flags = {name: module.training for name, module in base.named_modules()}
    assert {name: module.training for name, module in model.named_modules() if name in flags} == flags
    assert model.members_module.training
    assert base.training and not base.layer1.training


def test_names_cannot_collide() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members, self.prediction, self.output = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
            self.members_mask = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.members_mask(self.prediction(self.members(x).relu()).relu()))

    base = Named().eval()
    model = convert(base, example_inputs=(torch.zeros(2, 4),))
    assert list(model.state_dict())[:6] == list(base.state_dict())
    assert model.output is model.get_submodule("output")
    model.output = "logits"
    assert isinstance(model(torch.zeros(2, 4)), Tensor)
    assert isinstance(model.output, nn.Linear)
    masksurgery.verify(model.double(), base.double(), torch.randn(3, 4, dtype=torch.float64))


def test_meta_models_can_be_converted() -> None:
    with torch.device("meta"):
        base = timm.create_model("resnet50")
    model = masksurgery.convert(base)
    assert len(model.surgery.sites) == 53
    assert model.get_parameter("conv1.weight").is_meta
    assert not model.get_buffer("conv1_mask.masks").is_meta


# --- outputs ---------------------------------------------------------------------------------------------------------


def test_outputs_of_eval() -> None:
    model, x = convert().eval(), torch.randn(5, 3, 16, 16)
    p = model(x)
    assert isinstance(p, masksurgery.Prediction)
    assert (p.mean.shape, p.entropy.shape, p.members.shape) == ((5, 4), (5,), (5, 4, 4))
    for name in p._fields:
        model.output = name
        assert torch.equal(model(x), getattr(p, name))
    with pytest.raises(ConfigError, match="output='probs' is not one of 'prediction', 'mean'"):
        model.output = "probs"


def test_outputs_of_training_are_those_of_the_base_model() -> None:
    model, x = convert(), torch.randn(5, 3, 16, 16)
    assert model.train()(x).shape == (5, 4)
    assert convert(train_mode="repeat").train()(x).shape == (20, 4)
    y = torch.arange(5)
    assert masksurgery.repeat_targets(y, 4).tolist() == list(range(5)) * 4


def test_regression() -> None:
    model = convert(small_net(classes=1), task="regression").eval()
    p = model(torch.randn(5, 3, 16, 16))
    assert isinstance(p, RegressionPrediction)
    assert p.mean.shape == (5, 1)
    torch.testing.assert_close(p.variance, p.members.var(1, correction=0))
    model.output = "logits"
    assert torch.equal(model(torch.zeros(2, 3, 16, 16)), model(torch.zeros(2, 3, 16, 16)))
    with pytest.raises(ConfigError, match="output='entropy' is not a field of a regression"):
        model.output = "entropy"


def test_heteroscedastic_regression() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.mean, self.log_variance = nn.Linear(4, 16), nn.Linear(16, 1), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.body(x).tanh()
            return self.mean(h), self.log_variance(h)

    base, x = Two().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    model = convert(base, task="regression", heteroscedastic=True, example_inputs=(x,))
    p = model(x)
    spread = base.log_variance, model.surgery.masks["body_mask"]
    h = base.body(x).tanh()
    members = [h * torch.from_numpy(m) * (16 / m.sum()) for m in spread[1]]
    expected = torch.stack([base.log_variance(m).exp() for m in members], 1).mean(1) + p.members.var(1, correction=0)
    torch.testing.assert_close(p.variance, expected)
    assert len(model.train()(x)) == 2
    masksurgery.verify(model, base, x)


def test_keyword_inputs_and_defaults() -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(
            self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor | None = None, twice: bool = False
        ) -> Tensor:
            if mask is not None:
                x = x * mask
            y = self.fc(x).relu()
            y = y * scale if scale is not None else y
            return self.head(y * 2 if twice else y)

    base, x = Keywords().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    scale = torch.rand(3, 1, dtype=torch.float64)
    model = convert(base, example_inputs={"x": x, "scale": scale, "twice": True})
    assert [node.target for node in model.graph.nodes if node.op == "placeholder"] == ["x", "scale"]
    masksurgery.verify(model, lambda_free(base), x=x, scale=scale)


def lambda_free(base: nn.Module) -> nn.Module:
    """The same model with `twice` fixed, as the conversion fixed it."""

    class Twice(type(base)):  # type: ignore[misc]
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(x, scale=scale, twice=True)

    twin = Twice().to(torch.float64).eval()
    twin.load_state_dict(base.state_dict())
    return twin


# --- other people's models -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_auxiliary_heads_live_in_training_only() -> None:
    base = randomise(torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = convert(base, example_inputs=(x,))
    assert list(model.state_dict())[: len(base.state_dict())] == list(base.state_dict())
    reasons = {skip.layer: skip.reason for skip in model.surgery.skipped}
    assert re.match("training: it runs in training only", reasons["aux1.fc1"])
    masksurgery.verify(model, base, x)
    assert isinstance(model.eval()(x), masksurgery.Prediction)
    logits, aux2, aux1 = model.train()(x)
    assert logits.shape == aux1.shape == aux2.shape == (2, 5)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(argument: str) -> None:
    with pytest.raises(SiteError, match=rf"{argument}: 'nope\.\*' matches no module of Sequential"):
        convert(**{argument: ["0", "nope.*"]})


def test_nothing_to_fine_tune_where_masks_change_nothing(caplog: pytest.LogCaptureFixture) -> None:
    assert convert(scale=1.0).surgery.notes == ()
    assert convert(n=1).surgery.notes == ()
    assert not caplog.records


class WritesIntoAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        x.view(-1, 4)[:, 0] = 0  # the trace would leave x as it was
        return x


def test_an_assignment_to_a_view_is_not_traced() -> None:
    base = randomise(nn.Sequential(nn.Linear(5, 8), nn.GELU(), WritesIntoAView(), nn.Linear(8, 4))).double().eval()
    x = torch.randn(3, 5, dtype=torch.float64)
    model = masksurgery.convert(base, example_inputs=(x,))
    assert any("'2' is called as it is" in note and "part of another tensor" in note for note in model.surgery.notes)
    masksurgery.verify(model, base, x)


def test_an_assignment_to_what_an_identity_passed_on_is_not_traced() -> None:
    class Passed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.same, self.head = nn.Sequential(nn.Linear(6, 8), nn.ReLU()), nn.Identity(), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            y = self.same(x)
            y[:, 0] = 1.0  # x has it, too
            return self.head(x)

    base, x = Passed().double().eval(), torch.randn(3, 6).double()
    model = masksurgery.convert(base, example_inputs=(x,), where="head")
    assert "part of another tensor" in model.surgery.notes[0]
    masksurgery.verify(model, base, x)

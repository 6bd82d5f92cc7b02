"""ConvertedModel: copies, pickles, modes, and statistics re-estimated under the masks."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import masksurgery
from masksurgery import ConfigError
from masksurgery.ensemble import whole_output
from masksurgery.model import ConvertedModel
from masksurgery.scores import Threshold
from nets import NETS, randomise
from oracles import FOUR, images, small


def logits(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(x).members


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "mobilenetv3_small_100")) for name in FOUR]
)
def test_pickle_and_deepcopy(name: str) -> None:
    model, x = masksurgery.convert(small(name, drop=True)), images(name, 2)
    expected = logits(model, x)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert isinstance(twin, ConvertedModel)
        assert type(twin).__name__ == type(model).__name__
        assert twin.surgery == model.surgery
        assert twin.pretrained_cfg == model.pretrained_cfg
        assert twin.group_matcher() == model.group_matcher()
        assert torch.equal(logits(twin, x), expected)
        twin.train()
        assert twin(x).shape == (2, 10)
        assert [n.name for n in twin.graph.nodes] == [n.name for n in model.train().graph.nodes]
        next(twin.parameters()).data.zero_()  # its own
        assert torch.equal(logits(model, x), expected)


def test_torch_save_reads_back() -> None:
    net = NETS["auxiliary_head"]
    model = masksurgery.convert(net.build().eval(), example_inputs=net.inputs(2), **net.convert_kwargs)
    assert model._graphs[True] is not model._graphs[False]
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert model.load_state_dict(torch.load(buffer, weights_only=True)).missing_keys == []


def test_train_and_eval_choose_their_graph() -> None:
    net = NETS["auxiliary_head"]
    model = masksurgery.convert(net.build().eval(), example_inputs=net.inputs(2), **net.convert_kwargs)
    x = net.inputs(3)
    assert isinstance(model(*x), masksurgery.Prediction)
    assert isinstance(model.train()(*x), tuple)
    assert isinstance(model.eval()(*x), masksurgery.Prediction)
    assert isinstance(copy.deepcopy(model).train()(*x), tuple)


def test_a_part_in_eval_does_not_fall_out_of_step() -> None:
    """A frozen stage hears the same assignment as the rest, and keeps its BatchNorm statistics."""
    base = randomise(timm.create_model("test_resnet", num_classes=5)).double()
    model = masksurgery.convert(base).train()
    model.layer1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert model(torch.randn(6, 3, 32, 32, dtype=torch.float64)).shape == (6, 5)
    after = model.state_dict()
    changed = {k.split(".")[0] for k in before if k.endswith("running_mean") and not torch.equal(before[k], after[k])}
    assert "layer1" not in changed
    assert {"bn1", "layer2"} <= changed


def test_ema_follows() -> None:
    model = masksurgery.convert(randomise(timm.create_model("test_vit", num_classes=5)))
    ema = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    ema.update(model)
    found, target = next(ema.module.parameters()), next(model.parameters())
    torch.testing.assert_close(found, target - 0.5)
    assert ema.module.surgery == model.surgery


def test_it_prints_its_surgery() -> None:
    model = masksurgery.convert(timm.create_model("test_resnet"))
    assert "layer1_0_conv1_mask = self.layer1_0_conv1_mask(layer1_0_act1, members)" in model.code
    assert "Masksembles2D(" in repr(model)


def test_float16_autocast() -> None:
    model = masksurgery.convert(randomise(timm.create_model("test_resnet", num_classes=5))).eval()
    x = torch.randn(3, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        p = model(x)
    assert {field.dtype for field in p} == {torch.float32}
    with torch.no_grad():
        torch.testing.assert_close(p.mean, model(x).mean, atol=0.1, rtol=0.1)


# --- recalibrate -----------------------------------------------------------------------------------------------------


def test_recalibrate_is_the_statistics_under_all_masks() -> None:
    base = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
    )
    base = randomise(base).double().train()
    batches = [torch.randn(5, 3, 6, 6, dtype=torch.float64) for _ in range(3)]
    model = masksurgery.convert(base, example_inputs=(batches[0],))
    weights = {k: v.clone() for k, v in model.named_parameters()}
    assert masksurgery.recalibrate(model, [(x, torch.zeros(5)) for x in batches]) == 1
    masks = torch.from_numpy(model.surgery.masks["_0_mask"]).double()
    masks *= masks.shape[1] / masks[0].sum()
    rows = []
    for x in batches:
        h = base[0](x).relu()
        rows.append(base[2](torch.cat([h * m.view(1, -1, 1, 1) for m in masks])))
    torch.testing.assert_close(
        model.get_buffer("3.running_mean"), torch.stack([r.mean((0, 2, 3)) for r in rows]).mean(0)
    )
    torch.testing.assert_close(model.get_buffer("3.running_var"), torch.stack([r.var((0, 2, 3)) for r in rows]).mean(0))
    assert model.training and model.get_submodule("3").training
    assert model.get_submodule("3").momentum == 0.1
    assert all(torch.equal(v, weights[k]) for k, v in model.named_parameters())


def test_recalibrate_takes_dicts_and_stops() -> None:
    net = NETS["conv_bn_relu"]
    model = masksurgery.convert(net.build().eval(), example_inputs=net.inputs(2))
    name = next(node.target for node in model.graph.nodes if node.op == "placeholder")
    seen = []

    def loader():
        for _ in range(5):
            seen.append(1)
            yield {name: net.inputs(4)[0]}

    assert masksurgery.recalibrate(model, loader(), max_batches=2) == 3
    assert len(seen) == 2
    assert not model.training


def test_recalibrate_without_batches_or_norms() -> None:
    net = NETS["conv_bn_relu"]
    model = masksurgery.convert(net.build().eval(), example_inputs=net.inputs(2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(masksurgery.ConfigError, match="The loader has no batch"):
        masksurgery.recalibrate(model, [])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    plain_model = masksurgery.convert(plain, example_inputs=(torch.zeros(2, 4),))
    assert masksurgery.recalibrate(plain_model, [torch.zeros(2, 4)]) == 0


# --- temperature and threshold ---------------------------------------------------------------------------------------


def four_classes(**kwargs: Any) -> ConvertedModel:
    base = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 4))
    return masksurgery.convert(randomise(base).double(), example_inputs=(torch.zeros(2, 6).double(),), **kwargs).eval()


def numbers(rows: int = 7) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_what_was_fitted_stays_with_the_model() -> None:
    model, x = four_classes(), numbers()
    assert (model.temperature, model.threshold) == (1.0, None)
    before = logits(model, x)
    model.temperature, model.threshold = np.float32(2), Threshold("entropy", 0.9)
    assert type(model.temperature) is float
    torch.testing.assert_close(logits(model, x), before / 2, rtol=1e-12, atol=0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model), model.to("cpu").train()):
        assert (twin.temperature, twin.threshold) == (2.0, Threshold("entropy", 0.9))
        assert torch.equal(logits(twin, x), logits(model, x))
    twin = copy.deepcopy(model)
    twin.temperature, twin.threshold = 1, None
    assert (model.temperature, model.threshold) == (2.0, Threshold("entropy", 0.9))
    assert torch.equal(logits(twin, x), before)


def test_every_output_has_the_temperature() -> None:
    model, x = four_classes(), numbers()
    model.temperature = 3.0
    p = model(x)
    for model.output in ("logits", "mean", "variance", "entropy", "members"):
        assert torch.equal(model(x), getattr(p, model.output))
    model.members_module.fixed = torch.zeros(7, dtype=torch.long)
    torch.testing.assert_close(model.train()(x), 3 * p.members[:, 0])  # in training it is what the base model returned


@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, "2", None, True, torch.tensor(2.0), nn.Identity()])
def test_a_temperature_that_cannot_be(value: Any) -> None:
    model = four_classes()
    with pytest.raises(ConfigError, match=r"temperature=.* is not a finite number above 0\. Pass 1 for none"):
        model.temperature = value
    assert model.temperature == 1.0 and "temperature" not in model._modules


def test_a_threshold_that_cannot_be() -> None:
    model = four_classes()
    for value in (0.5, "entropy", nn.Identity()):
        with pytest.raises(ConfigError, match=r"threshold=.* is not a masksurgery\.scores\.Threshold, nor None"):
            model.threshold = value
    number = four_classes(task="regression")
    with pytest.raises(ConfigError, match="score='entropy' is none of a regression, which has 'variance'"):
        number.threshold = Threshold("entropy", 0.5)
    assert number.threshold is None
    for bad in (math.nan, math.inf, "0.5", None):
        with pytest.raises(ConfigError, match=r"value=.* of a threshold is not a finite number"):
            Threshold("variance", bad)


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_unsure_is_what_the_score_says(task: Any) -> None:
    model, x = four_classes(task=task), numbers(40)
    model.temperature = 1.7
    p = model(x)
    found = {"variance": p.variance.sum(1)}
    if task == "regression":
        found = {"variance": p.variance.mean(1)}
    elif task == "multilabel":
        found = {"variance": 2 * p.variance.mean(1), "entropy": p.entropy.mean(1)}
        found["max_probability"] = torch.maximum(p.mean, 1 - p.mean).mean(1)
    else:
        found |= {"entropy": p.entropy, "max_probability": p.mean.amax(1), "mutual_information": p.mutual_information}
    for score, values in found.items():
        middle = values.sort().values[19:21].mean().item()
        model.threshold = Threshold(score, middle)
        unsure = model.unsure(p)
        assert unsure.dtype == torch.bool and unsure.sum() == 20
        assert torch.equal(unsure, values < middle if score == "max_probability" else values > middle)


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_what_is_no_number_is_unsure(task: Any) -> None:
    model, x = four_classes(task=task), numbers()
    x[2] = math.nan
    model.threshold = Threshold("variance", 1e9)
    assert model.unsure(model(x)).tolist() == [k == 2 for k in range(7)]


def test_unsure_where_the_batch_is_not_first() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden, self.out = nn.Linear(6, 24), nn.Linear(24, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.hidden(x).relu()).t()

    base = randomise(Turned()).double()
    model = masksurgery.convert(base, example_inputs=(numbers(2),), class_dim=0).eval()
    p = model(numbers())
    assert p.mean.shape == (7, 4)
    level = p.mean.amax(1).sort().values[2:4].mean().item()
    model.threshold = Threshold("max_probability", level)
    assert torch.equal(model.unsure(p), p.mean.amax(1) < level)


def test_unsure_needs_a_threshold_and_a_prediction() -> None:
    model, x = four_classes(), numbers()
    with pytest.raises(ConfigError, match=r"no threshold to be unsure by\. Fit one with masksurgery evaluate"):
        model.unsure(model(x))
    model.threshold = Threshold("entropy", 0.5)
    with pytest.raises(ConfigError, match=r'unsure takes a prediction \(model\.output = "prediction"\), not Tensor'):
        model.unsure(model(x).mean)


class Clip(nn.Module):
    """A parameter, a buffer and children under the names of the converted model's properties."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        self.hidden, self.output, self.head = nn.Linear(6, 24), nn.Linear(24, 24), nn.Linear(24, 4)
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("threshold", torch.tensor(0.1))
        for name, module in children.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        x = self.output(self.hidden(x).relu()) - self.threshold
        return self.head(x) / self.temperature


def test_a_base_model_has_children_of_these_names() -> None:
    base, x = randomise(Clip()).double().eval(), numbers()
    model = masksurgery.convert(base, example_inputs=(x,)).eval()
    before = logits(model, x)
    masksurgery.verify(model, base, x)
    assert isinstance(model.temperature, nn.Parameter) and model.output is model.get_submodule("output")
    model.temperature, model.threshold = 2.0, Threshold("entropy", 0.9)
    assert {"temperature", "threshold", "output.weight"} <= set(model.state_dict())
    assert torch.equal(model.temperature, base.temperature) and torch.equal(model.threshold, base.threshold)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(twin, x), before / 2, rtol=1e-12, atol=0)
        assert torch.equal(twin.unsure(twin(x)), twin(x).entropy > 0.9)
    model.temperature = nn.Parameter(model.temperature.detach() / 4)
    torch.testing.assert_close(logits(model, x), before * 2, rtol=1e-12, atol=0)
    model.output = "mean"
    with whole_output(model):
        assert isinstance(model(x), masksurgery.Prediction)
    torch.testing.assert_close(model(x), (before * 2).softmax(2).mean(1))


def test_a_child_that_is_called_unsure() -> None:
    with pytest.raises(ConfigError, match="Clip has a child named 'unsure', which the converted model needs itself"):
        masksurgery.convert(Clip(unsure=nn.Linear(2, 2)), example_inputs=(torch.zeros(2, 6),))


def test_verify_leaves_the_temperature_out() -> None:
    base = randomise(nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 4))).double()
    model = masksurgery.convert(base, example_inputs=(numbers(2),)).eval()
    plain = masksurgery.verify(model, base, numbers())
    model.temperature, model.threshold = 0.3, Threshold("entropy", 0.9)
    assert masksurgery.verify(model, base, numbers()) == plain
    assert (model.temperature, model.threshold) == (0.3, Threshold("entropy", 0.9))

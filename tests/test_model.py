"""ConvertedModel: copies, pickles, modes, and statistics re-estimated under the masks."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import masksurgery
from masksurgery.model import ConvertedModel
from nets import NETS, randomise
from oracles import FOUR, images, small


def logits(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(x).members


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "resnet50")) for name in FOUR])
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

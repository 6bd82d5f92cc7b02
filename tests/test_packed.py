"""PackedModel: what it takes over from the converted model, copies and pickles; with a graph made by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import Tensor, fx, nn

import masksurgery
from masksurgery import ConfigError
from masksurgery.ensemble import Ensemble, whole_output
from masksurgery.model import ConvertedModel
from masksurgery.pack import Barrier, PackedModel
from masksurgery.scores import Threshold
from nets import randomise


class Two(nn.Module):
    """Two layers, of which the first one is masked; with facts about itself, some of which hold its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(6, 24), nn.Linear(24, 4)
        self.num_classes, self.pretrained_cfg = 4, {"label_names": ["a", "b", "c", "d"]}
        self.layers, self.call, self.members, self.layout = [self.hidden], self.hidden.forward, 7, "NCHW"

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.out(self.hidden(x * scale).relu())


def converted() -> ConvertedModel:
    base = randomise(Two()).double()
    return masksurgery.convert(base, n=3, example_inputs={"x": torch.zeros(2, 6).double(), "scale": 0.5}).eval()


def pack_by_hand(model: ConvertedModel) -> PackedModel:
    """The hidden layer of each member without the masked rows, and the columns that read them."""
    root, graph = nn.Module(), fx.Graph()
    root.shared, root.members, root.prediction = nn.Module(), nn.ModuleList(), copy.deepcopy(model.head_module)
    x = graph.placeholder("x")
    outputs = []
    scaled = graph.call_function(torch.mul, (x, 0.5))
    hidden, out = model.get_submodule("hidden"), model.get_submodule("out")
    for i, mask in enumerate(model.get_submodule(model.surgery.sites[0].mask).masks):
        member = nn.Sequential(nn.Linear(6, int(mask.sum())), nn.ReLU(), nn.Linear(int(mask.sum()), 4)).double()
        values = [hidden.weight[mask], hidden.bias[mask], out.weight[:, mask] * len(mask) / mask.sum(), out.bias]
        with torch.no_grad():
            for parameter, value in zip(member.parameters(), values, strict=True):
                parameter.copy_(value)
        root.members.append(member)
        outputs.append(graph.call_module(f"members.{i}", (scaled,)))
    head = graph.get_attr("prediction")
    graph.output(graph.call_method("aggregate", (head, graph.call_function(torch.cat, (outputs,)))))
    return PackedModel(root, graph, model, "unrolled", False, [Barrier("relu", "none")], "prediction")


def numbers(rows: int = 7) -> Tensor:
    return torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_it_is_the_converted_model() -> None:
    model, x = converted(), numbers()
    model.temperature, model.threshold = 2.0, Threshold("entropy", 0.9)
    packed = pack_by_hand(model)
    assert isinstance(packed, Ensemble) and not isinstance(packed, ConvertedModel)
    assert not any(module.training for module in packed.modules())
    torch.testing.assert_close(packed(x), model(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(packed.unsure(packed(x)), model.unsure(model(x)))
    assert packed.surgery == model.surgery and packed.settings == model.settings and packed.inputs == model.inputs
    assert (packed.temperature, packed.threshold, packed.recipe) == (2.0, Threshold("entropy", 0.9), None)
    assert (packed.layout, packed.dense, packed.barriers) == ("unrolled", False, (Barrier("relu", "none"),))
    assert 'members_0 = getattr(self.members, "0")' in packed.code
    packed.temperature, packed.threshold = 1.0, None
    assert (model.temperature, model.threshold) == (2.0, Threshold("entropy", 0.9))


def test_what_the_model_says_of_itself_comes_along_and_no_weights() -> None:
    model = converted()
    packed = pack_by_hand(model)
    assert packed.num_classes == 4 and packed.pretrained_cfg == model.pretrained_cfg
    packed.pretrained_cfg["label_names"].append("e")
    assert model.pretrained_cfg["label_names"] == ["a", "b", "c", "d"]
    assert isinstance(packed.members, nn.ModuleList) and len(packed.members) == 3
    assert {"layers", "call"}.isdisjoint(vars(packed)) and {"layers", "call"} <= set(vars(model))


def test_inputs_that_are_constants() -> None:
    packed = pack_by_hand(converted())
    x = numbers()
    assert torch.equal(packed(x=x, scale=0.5).mean, packed(x).mean)
    with pytest.raises(masksurgery.TraceError, match=r"scale=2: the model was converted with scale=0\.5"):
        packed(x, scale=2)


@pytest.mark.parametrize("output", ["logits", "mean", "members"])
def test_output(output: str) -> None:
    model, x = converted(), numbers()
    model.output = output
    packed = pack_by_hand(model)
    torch.testing.assert_close(packed(x), model(x), rtol=1e-12, atol=1e-12)
    with whole_output(packed):
        assert isinstance(packed(x), masksurgery.Prediction)
    assert packed.output == output
    with pytest.raises(ConfigError, match="output='loss' is not one of"):
        packed.output = "loss"


def test_it_stays_in_eval() -> None:
    packed = pack_by_hand(converted())
    assert packed.eval() is packed and packed.train(False) is packed
    for switch in (packed.train, nn.Sequential(packed).train):
        with pytest.raises(ConfigError, match=r"train: this Two is packed.* Train the converted model that it was"):
            switch()
    assert not any(module.training for module in packed.modules())


def test_copies_and_pickles() -> None:
    packed, x = pack_by_hand(converted()), numbers()
    packed.temperature, packed.threshold = 2.0, Threshold("entropy", 0.9)
    expected = packed(x)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed)), copy.copy(packed).to("cpu")):
        assert isinstance(twin, PackedModel) and type(twin).__name__ == "Two"
        assert vars(twin).keys() == vars(packed).keys() and twin.surgery == packed.surgery
        assert (twin.layout, twin.dense, twin.barriers) == (packed.layout, packed.dense, packed.barriers)
        assert (twin.temperature, twin.threshold) == (2.0, Threshold("entropy", 0.9))
        assert all(map(torch.equal, twin(x), expected))
    twin = copy.deepcopy(packed)
    next(twin.parameters()).data.zero_()  # its own
    assert all(map(torch.equal, packed(x), expected))


def test_half_precision() -> None:
    packed, x = pack_by_hand(converted()), numbers()
    expected = packed(x).mean.float()
    p = packed.half()(x.half())
    assert {field.dtype for field in p} == {torch.float32}
    torch.testing.assert_close(p.mean, expected, atol=0.02, rtol=0.02)


def test_the_masks_are_those_that_the_model_has() -> None:
    model = converted()
    other = masksurgery.convert(Two().double(), n=3, seed=5, example_inputs=(numbers(2),))
    model.load_state_dict(other.state_dict())
    packed, name = pack_by_hand(model), model.surgery.sites[0].mask
    assert (packed.surgery.masks[name] == other.surgery.masks[name]).all()
    assert (packed.surgery.masks[name] != model.surgery.masks[name]).any()


def test_what_makes_the_base_model_again() -> None:
    base = timm.create_model("test_resnet", num_classes=4)
    model = masksurgery.convert(base, where="head")
    root, graph = nn.Module(), fx.Graph()
    root.prediction = copy.deepcopy(model.head_module)
    graph.output(graph.placeholder("x"))
    packed = PackedModel(root, graph, model, "grouped", True, (), "prediction")
    assert packed.recipe["name"] == "test_resnet.r160_in1k" and packed.recipe["kwargs"]["num_classes"] == 4
    twin = PackedModel(copy.deepcopy(root), copy.deepcopy(graph), packed, "grouped", True, (), "prediction")
    assert twin.recipe == packed.recipe


@pytest.mark.slow
def test_where_masks_are_needed(tmp_path) -> None:
    packed, x = pack_by_hand(converted()), numbers()
    again = "is packed: what its masks hide is cut out of the weights. Pass the converted model that it was packed from"
    with pytest.raises(ConfigError, match=f"verify: this Two {again}"):
        masksurgery.verify(packed, Two(), x)
    with pytest.raises(ConfigError, match=f"recalibrate: this Two {again}"):
        masksurgery.recalibrate(packed, [x])
    with pytest.raises(ConfigError, match=f"finetune: this Two {again}"):
        masksurgery.finetune(packed, masksurgery.DataConfig(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for model in (packed, nn.Sequential(packed)):
        with pytest.raises(ConfigError, match=r"holds members that are packed: it is converted\. Convert its base"):
            masksurgery.convert(model, example_inputs=(x,))

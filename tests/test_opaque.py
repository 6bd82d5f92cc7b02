"""What torch.fx cannot follow: called as it is, and the modules that it calls converted on their own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masksurgery
from masksurgery import LayoutError, SiteError
from masksurgery.model import ConvertedModel
from masksurgery.part import Part
from nets import randomise
from oracles import flips_found


def conv_bn_relu(ins: int, outs: int, **kwargs) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(ins, outs, 3, padding=1, **kwargs), nn.BatchNorm2d(outs), nn.ReLU())


class Residual(nn.Module):
    """Functional activations, and a number that its caller chooses."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, gain: float = 1.0, flip: bool = False) -> Tensor:
        y = self.conv2(F.relu(self.bn1(self.conv1(x)))) * gain
        return x + (y.flip(-1) if flip else y)

    def describe(self) -> str:
        return f"{self.conv1.in_channels} channels"


class Branching(nn.Module):
    """The user's model: its forward looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn_relu(3, 12)
        self.blocks = nn.ModuleList([Residual(12), Residual(12)])
        self.other = Residual(12)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if x.sum() > 0:
            for block in self.blocks:
                x = block(x, gain=0.5)
        else:
            x = self.other(x)
        return self.head(self.pool(x))


class Inner(nn.Module):
    """Cannot be traced either, inside of what can."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = conv_bn_relu(12, 8)
        self.spread = conv_bn_relu(8, 8, groups=8)
        self.wide = nn.Conv2d(8, 12, 1)

    def forward(self, x: Tensor, sizes: tuple[int, int]) -> Tensor:
        y = self.wide(self.spread(self.narrow(x)))
        if y.abs().max().item() > 1e9:
            raise RuntimeError("diverged")
        return y.view(x.shape[0], -1, *sizes)


class Around(nn.Module):
    """A forward that can be traced, around one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.head = conv_bn_relu(3, 12), Inner(), nn.Linear(12, 5)
        self.last = conv_bn_relu(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.inner(x, (x.shape[2], x.shape[3]))
        return self.head(self.last(x).mean((2, 3)))


def make(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return randomise(kind(), 3).double().eval(), torch.randn(3, 3, 8, 8, dtype=torch.float64)


def convert(base: nn.Module, x: Tensor, **kwargs) -> ConvertedModel:
    return masksurgery.convert(base, example_inputs=(x,), **kwargs)


def sites(model: ConvertedModel) -> list[tuple[str, str, str]]:
    return [(site.layer, site.part, site.node) for site in model.surgery.sites]


BRANCHING = [
    ("stem.0", "stem", "_2"),
    ("blocks.0.conv1", "blocks.0", "relu"),
    ("blocks.0.conv2", "blocks.0", "mul"),
    ("blocks.1.conv1", "blocks.1", "relu"),
    ("blocks.1.conv2", "blocks.1", "mul"),
]
AROUND = [("stem.0", "", "stem_2"), ("inner.narrow.0", "inner.narrow", "_2"), ("last.0", "", "last_2")]


@pytest.mark.parametrize(("kind", "expected"), [(Branching, BRANCHING), (Around, AROUND)])
def test_the_modules_that_it_calls_are_masked(kind: type[nn.Module], expected: list) -> None:
    base, x = make(kind)
    model = convert(base, x)
    assert sites(model) == expected
    names = list(base.state_dict())
    assert [name for name in model.state_dict() if name in names] == names
    assert set(model.state_dict()) - set(names) == {f"{site.mask}.masks" for site in model.surgery.sites}
    missing = model.load_state_dict(base.state_dict(), strict=False)
    assert not missing.unexpected_keys and all(name.endswith(".masks") for name in missing.missing_keys)


@pytest.mark.slow
def test_the_record_says_what_is_opaque() -> None:
    base, x = make(Branching)
    surgery = convert(base, x).surgery
    assert {skip.layer: skip.reason.split(":")[0] for skip in surgery.skipped} == {
        "other.conv1": "opaque", "other.conv2": "opaque", "head.1": "output layer",
    }  # fmt: skip
    (note,) = [note for note in surgery.notes if note.startswith("opaque")]
    assert "opaque: the model is called as it is, on all members at once" in note
    assert "control flow depends on 'gt', which is a tensor" in note
    base, x = make(Around)
    surgery = convert(base, x).surgery
    # `spread` is depthwise: its channels are those that `narrow` has masked. What follows `wide` is not known.
    reasons = {skip.layer: skip.reason for skip in surgery.skipped}
    assert reasons["inner.spread.0"] == "masked: it is channel-wise since the mask of 'inner.narrow.0'"
    assert reasons["inner.wide"].startswith("opaque: 'inner', which cannot be traced, calls it itself")
    assert reasons["head"].startswith("output layer")
    assert any("opaque: 'inner' is called as it is" in note for note in surgery.notes)


@pytest.mark.parametrize("kind", [Branching, Around])
def test_members_are_the_base_model_with_masks(kind: type[nn.Module]) -> None:
    base, x = make(kind)
    model = convert(base, x)
    assert masksurgery.verify(model, base, x).relative < 1e-12
    masksurgery.verify(model, base, torch.cat([x, x]), mode="train")
    masksurgery.verify(convert(base, x, train_mode="repeat"), base, x, mode="train")
    for site in model.surgery.sites:
        assert flips_found(model, base, site.mask, (x,)), site


def test_include_and_exclude_reach_inside() -> None:
    base, x = make(Around)
    model = convert(base, x, include=["inner.*"])
    assert sites(model) == [AROUND[1]]
    masksurgery.verify(model, base, x)
    model = convert(base, x, include=["inner.wide"])  # in full: masked where the layer ends
    assert sites(model) == [("inner.wide", "inner.wide", "conv2d")]
    masksurgery.verify(model, base, x)
    assert sites(convert(base, x, exclude=["inner.*"])) == [AROUND[0], AROUND[2]]


@pytest.mark.parametrize("kind", [Branching, Around])
def test_the_head_alone(kind: type[nn.Module]) -> None:
    base, x = make(kind)
    model = convert(base, x, where="head")
    assert [site.layer for site in model.surgery.sites] == ["head.1" if kind is Branching else "head"]
    masksurgery.verify(model, base, x)
    masksurgery.verify(model, base, x, mode="train")


def test_a_head_that_the_opaque_forward_calls_itself() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.fc = nn.Sequential(nn.Linear(6, 16), nn.ReLU()), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.features(x)
            return self.fc(y) if bool(y.isfinite().all()) else torch.zeros(len(x), 4)

    base, x = randomise(Direct(), 1).double().eval(), torch.randn(3, 6, dtype=torch.float64)
    model = convert(base, x, where="head")
    assert sites(model) == [("fc", "fc", "input_1")]
    masksurgery.verify(model, base, x)
    assert list(model.state_dict()) == [*base.state_dict(), "fc.fc_mask.masks"]


@pytest.mark.parametrize("kind", [Branching, Around])
def test_copies_and_folders(kind: type[nn.Module], tmp_path: Path) -> None:
    base, x = make(kind)
    model = convert(base, x)
    expected = model(x)
    masksurgery.save(model, tmp_path / "saved")
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), masksurgery.load(tmp_path / "saved", base=base)]
    for twin in twins:
        assert all(torch.equal(a, b) for a, b in zip(twin.eval()(x), expected, strict=True))
        assert twin.surgery == model.surgery
        twin.load_state_dict({name: torch.zeros_like(value) for name, value in twin.state_dict().items()})
        assert not torch.equal(twin(x).members, expected.members)
    assert all(torch.equal(a, b) for a, b in zip(model(x), expected, strict=True))  # nothing is shared
    assert model.float()(x.float()).mean.dtype == torch.float32


def test_the_other_branch_is_what_it_was() -> None:
    base, x = make(Branching)
    with torch.no_grad():
        base.stem[1].bias.fill_(1.0)
    model = convert(base, x)
    for module in (base, model):
        module.stem[1].bias.data.fill_(-1e3)  # all is zero after the ReLU: the sum is not positive
    assert torch.equal(model(x).members[:, 2], base(x))


def test_a_part_is_still_what_it_was() -> None:
    base, x = make(Branching)
    model = convert(base, x)
    block = model.blocks[0]
    assert isinstance(block, Residual) and isinstance(block, Part)
    assert block.describe() == "12 channels"
    with pytest.raises(LayoutError, match="runs inside of a forward of the whole"):
        block(torch.zeros(4, 12, 8, 8).double(), gain=0.5)
    assert type(block).__name__ == "Residual" and "relu" in block.code


def test_training_goes_through_the_parts() -> None:
    base, x = make(Branching)
    model = convert(base, x).train()
    model.blocks[0].eval()  # a frozen part must not freeze the decision of the root
    before = model.blocks[0].bn1.running_mean.clone()
    y = model(torch.cat([x, x]))
    assert y.shape == (6, 5)
    y.sum().backward()
    assert torch.equal(model.blocks[0].bn1.running_mean, before)
    assert model.blocks[0].conv1.weight.grad.abs().sum() > 0
    assert model.stem[1].num_batches_tracked == 1
    model.members_module.fixed = torch.tensor([3, 1, 2])
    model.eval()
    base.eval()
    rows = convert(base, x)
    members = rows(x).members
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model.load_state_dict(rows.state_dict())
    assert torch.allclose(model(x), members[torch.arange(3), [3, 1, 2]], rtol=1e-12)


def test_what_a_part_was_not_converted_for() -> None:
    class Flipping(Branching):
        flip = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = self.blocks[0](x, flip=self.flip) if x.isfinite().all() else x
            return self.head(self.pool(x))

    base, x = make(Flipping)
    model = convert(base, x)
    model(x)
    model.opaque.model.flip = True
    with pytest.raises(
        LayoutError, match=r"Residual was converted for inputs \['x'\] and {'flip': False}, and is called"
    ):
        model(x)


def test_a_module_that_is_called_in_several_ways() -> None:
    class Several(Branching):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for i in range(2 if x.isfinite().all() else 1):
                x = self.blocks[0](x, gain=0.5 + i)
            return self.head(self.pool(x))

    base, x = make(Several)
    model = convert(base, x)
    reasons = {skip.layer: skip.reason for skip in model.surgery.skipped}
    assert "calls 'blocks.0' in several ways" in reasons["blocks.0.conv1"]
    masksurgery.verify(model, base, x)


def test_a_module_that_is_called_twice_has_one_mask() -> None:
    class Twice(Branching):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(2 if x.isfinite().all() else 1):
                x = self.blocks[0](x)
            return self.head(self.pool(x))

    base, x = make(Twice)
    model = convert(base, x)
    assert sites(model) == BRANCHING[:1] + [
        ("blocks.0.conv1", "blocks.0", "relu"),
        ("blocks.0.conv2", "blocks.0", "mul"),
    ]
    masksurgery.verify(model, base, x)
    masksurgery.verify(model, base, x, mode="train")


def test_nothing_is_left_to_mask() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() >= 0 else x[:, :3]

    with pytest.raises(
        SiteError, match=r"No layer can be masked. fc: opaque: the model, which cannot be traced, calls it"
    ):
        masksurgery.convert(Bare(), example_inputs=(torch.zeros(2, 4),))


def test_what_cannot_be_run_either() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x[:, :2]) if x.sum() >= 0 else x

    with pytest.raises(LayoutError, match="The model cannot be run, on its example inputs: node 'opaque'"):
        masksurgery.convert(Broken(), example_inputs=(torch.zeros(2, 4),))


def test_a_trace_that_goes_another_way_than_the_model() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = conv_bn_relu(24, 12)

        def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
            if isinstance(skip, Tensor):  # no symbol is one
                x = torch.cat([x, skip], 1)
            return self.convs(x)

    class Concatenating(Branching):
        def __init__(self) -> None:
            super().__init__()
            self.up = Up()

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.pool(self.up(self.blocks[0](x), x)))

    base, x = make(Concatenating)
    model = convert(base, x)
    assert [site.layer for site in model.surgery.sites] == ["stem.0", "blocks.0.conv1", "blocks.0.conv2", "up.convs.0"]
    assert sum(note.startswith("opaque") for note in model.surgery.notes) == 2
    masksurgery.verify(model, base, x)
    masksurgery.verify(model, base, x, mode="train")

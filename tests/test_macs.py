"""Multiply-adds, against counts worked out by hand."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masksurgery
from masksurgery import TraceError
from masksurgery.macs import Macs, conversion_macs, count_macs, sample_inputs


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class MultiHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class OnTheCpu(nn.Module):
    """Makes a tensor on the CPU, which cannot stand beside one on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MultiHead()

    def forward(self, x: Tensor) -> Tensor:
        return Attention()(self.inner(x) + torch.ones(64, device="cpu"))


class Token(nn.Module):
    """A parameter goes into a module, as cait's class token does."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.inner = nn.Parameter(torch.zeros(1, 12)), nn.Sequential(nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.token.expand(len(x), -1)) + x


HEADS = 4 * 10 * 64 * 64 + 2 * 10 * 10 * 64  # q, k, v and out projections; products of q and k, and with v


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (nn.Linear(12, 5), (3, 12), 3 * 12 * 5),
        (nn.Conv2d(8, 16, 3, padding=1), (2, 8, 10, 10), 2 * 100 * 8 * 16 * 9),
        (nn.Conv2d(8, 16, 3, groups=4, stride=2, padding=1), (1, 8, 10, 10), 25 * 2 * 16 * 9),
        (nn.ConvTranspose2d(8, 16, 2, stride=2), (1, 8, 10, 10), 100 * 8 * 16 * 4),
        (Attention(), (1, 3, 197, 64), 2 * 3 * 197 * 197 * 64),
        (MultiHead(), (1, 10, 64), HEADS),
        (Token(), (1, 5), 12 * 5),
        (OnTheCpu(), (1, 10, 64), HEADS + 2 * 10 * 10 * 64),
        (nn.Sequential(nn.BatchNorm1d(7), nn.ReLU()), (4, 7), 0),
    ],
    ids=["linear", "conv", "grouped", "transposed", "attention", "multihead", "token", "fake tensors", "no products"],
)
def test_hand_counts(model: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert count_macs(model, (torch.zeros(shape),)) == macs


def test_a_model_that_cannot_be_run() -> None:
    with pytest.raises(TraceError, match=r"Linear cannot be run to count its MACs: .*shapes cannot be multiplied"):
        count_macs(nn.Linear(4, 4), (torch.zeros(1, 3),))


def test_the_model_is_not_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    calls = []
    model[0].register_forward_hook(lambda *args: calls.append(args))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert count_macs(model, (torch.ones(5, 4),)) == 80
    assert calls == [] and all(module.training for module in model.modules())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert count_macs(model, (), {"input": torch.ones(1, 4)}) == 16


def test_the_ratio() -> None:
    macs = Macs(100, 400, 130)
    assert macs.ratio == 1.3
    assert macs.to_dict() == {"base": 100, "input_repeat": 400, "late_repeat": 130}


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return timm.create_model("resnet50").eval()


@pytest.mark.parametrize(("arguments", "limit"), [({"include": ["layer4.*"]}, 1.45), ({"where": "head"}, 1.01)])
def test_late_repeat_is_cheap(resnet50: nn.Module, arguments: dict, limit: float) -> None:
    macs = conversion_macs(resnet50, masksurgery.convert(resnet50, n=4, **arguments))
    assert macs.base == 4_089_184_256
    assert macs.input_repeat == 4 * macs.base
    assert macs.base < macs.late_repeat <= limit * macs.base


def test_masks_everywhere_cost_the_stem_once() -> None:
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 36, 10)).eval()
    converted = masksurgery.convert(base, n=3, example_inputs=(torch.zeros(5, 3, 8, 8),))
    stem, block, head = 36 * 3 * 8 * 9, 36 * 8 * 8, 8 * 36 * 10
    expected = Macs(stem + block + head, 3 * (stem + block + head), stem + 3 * (block + head))
    assert conversion_macs(base, converted) == expected


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
        return self.last(self.first(x).relu() * scale + bias)


def test_one_sample_of_each_input_that_has_a_batch() -> None:
    base = Biased().eval()
    example = {"x": torch.zeros(5, 6), "bias": torch.zeros(8)}
    converted = masksurgery.convert(base, n=2, example_inputs=example, unbatched=["bias"])
    bound = sample_inputs(base, converted, 1)
    assert {name: tuple(value.shape) for name, value in bound.arguments.items()} == {"x": (1, 6), "bias": (8,)}
    assert conversion_macs(base, converted) == Macs(48 + 24, 2 * (48 + 24), 48 + 2 * 24)


def test_control_flow_on_values() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = (
                nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU()),
                nn.Linear(6, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x)) if x.sum() >= 0 else x[:, :3]

    base = Branching()
    model = masksurgery.convert(base, example_inputs=(torch.zeros(1, 10),))
    macs = conversion_macs(base, model)
    assert (macs.base, macs.late_repeat) == (80 + 48 + 18, 4 * (80 + 48 + 18))

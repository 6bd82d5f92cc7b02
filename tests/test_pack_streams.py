"""What packing does to streams: sums that add to slices, and layers whose weights the members share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import masksurgery
from masksurgery.model import ConvertedModel
from masksurgery.pack import PackedModel
from masksurgery.pack.parts import IndexAdd, Place, Select, SliceAdd
from nets import randomise
from packing import assert_members, assert_packed


class Block(nn.Module):
    """A residual block; `after` is what its sum goes through."""

    def __init__(self, channels: int, after: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.after = nn.ReLU() if after is None else after

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return self.after(branch + x)


def net(channels: int = 32, *after: nn.Module | None) -> nn.Module:
    """A stem, residual blocks and a classifier."""
    stem = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU())
    blocks = [Block(channels, module) for module in after or (None, None, None)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(batch)).double()


def pack(base: nn.Module, dense: bool = True, **options: object) -> tuple[ConvertedModel, PackedModel]:
    model = masksurgery.convert(base, example_inputs=(images(),), **options)  # type: ignore[arg-type]
    return model, masksurgery.pack(model, "unrolled", dense=dense)


def parts(packed: PackedModel, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in packed.modules() if isinstance(module, kind)]


def test_sums_add_to_slices() -> None:
    base = randomise(net()).double().eval()
    model, packed = pack(base)
    adds = parts(packed, SliceAdd)
    assert not parts(packed, IndexAdd)
    assert adds and all(add.inplace for add in adds)  # into what the branch has just made
    for batch in (1, 3):
        assert_packed(packed, model, (images(batch),))
    assert_members(packed, model, base, (images(),))


def test_a_stream_grows_from_sum_to_sum() -> None:
    _, packed = pack(randomise(net(64)).double().eval())
    for i in range(4):
        blocks = [packed.get_submodule(f"members.{i}.{k}.conv2").out_channels for k in (1, 2, 3)]
        stem = int(packed.get_submodule(f"members.{i}.1.conv1").in_channels)
        assert stem < blocks[0] < blocks[1] < blocks[2] <= 64
        assert blocks[0] == packed.get_submodule(f"members.{i}.2.conv1").in_channels


IN_ORDER = {
    "norm": nn.GroupNorm(4, 32),
    "depthwise": nn.Conv2d(32, 32, 3, padding=1, groups=32),
    "softmax": nn.Softmax(1),
}


@pytest.mark.parametrize("after", IN_ORDER.values(), ids=IN_ORDER)
def test_what_reads_all_channels_finds_them_in_order(after: nn.Module) -> None:
    base = randomise(net(32, None, after, None)).double().eval()
    model, packed = pack(base)
    assert_packed(packed, model, (images(),))
    assert_members(packed, model, base, (images(),))


def test_a_stream_that_is_read_as_a_whole_is_not_copied() -> None:
    _, packed = pack(randomise(net(32, None, nn.GroupNorm(4, 32), None)).double().eval())
    # The stem's mask, and what it adds to the first sum of each member.
    assert len(parts(packed, Select)) == len(parts(packed, IndexAdd)) == 4 and not parts(packed, Place)


class Branches(nn.Module):
    """A stream that two streams are added to, one of them as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = net(32)[:3], net(32)[:3]  # type: ignore[index]
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.one(x), self.other(x)
        return self.head((one + other + one).relu().mean((2, 3)))


def test_streams_in_different_orders_are_added() -> None:
    base = randomise(Branches()).double().eval()
    model, packed = pack(base)
    assert_packed(packed, model, (images(),))
    assert_members(packed, model, base, (images(),))


def classifier(packed: PackedModel) -> list[str]:
    """The names of the weights of the last layer."""
    return [name for name, p in packed.named_parameters() if p.dim() == 2 and len(p) == 5]


@pytest.mark.parametrize("dense", [False, True], ids=["sums", "dense"])
def test_members_share_a_layer_that_reads_almost_all(dense: bool) -> None:
    base = randomise(net(32, *[None] * 5)).double().eval()
    model, packed = pack(base, dense)
    assert classifier(packed) == ["shared.8.weight"]
    assert packed.get_submodule("shared.8").in_features == 32
    assert_packed(packed, model, (images(),))
    assert_members(packed, model, base, (images(),))


def test_members_have_layers_of_their_own_where_they_read_less() -> None:
    _, packed = pack(randomise(net(32, None)).double().eval())
    assert classifier(packed) == [f"members.{i}.4.weight" for i in range(4)]


@pytest.mark.parametrize("dense", [False, True], ids=["sums", "dense"])
def test_a_mask_that_hides_little_is_not_forgotten(dense: bool) -> None:
    base = randomise(nn.Sequential(nn.Flatten(), nn.Linear(243, 64), nn.ReLU(), nn.Linear(64, 5))).double().eval()
    model, packed = pack(base, dense, scale=1.05)
    (site,) = model.surgery.sites
    assert 0.9 < site.ones / site.channels < 1
    assert_packed(packed, model, (images(),))

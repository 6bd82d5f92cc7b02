"""Conversions that are cheaper to pack: aligned kept counts, masks that a stream shares, whole heads."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masksurgery
from masksurgery import SiteError
from nets import NETS, Net, randomise
from oracles import FOUR, flips_found, images, small
from test_nets import convert, make
from test_opaque import Branching

nets = pytest.mark.parametrize("net", NETS.values(), ids=lambda net: net.name)


four = pytest.mark.parametrize("name", FOUR)


def converted(name: str, **options) -> tuple[masksurgery.ConvertedModel, nn.Module, Tensor]:
    base, x = small(name), images(name, 2)
    return masksurgery.convert(base, example_inputs=(x,), **options), base, x


def assert_restored(model: masksurgery.ConvertedModel, base: nn.Module, x: Tensor, folder: Path) -> None:
    """A saved model comes back with its record, its settings, its masks and its predictions."""
    masksurgery.save(model, folder)
    again = masksurgery.load(folder, base=base)
    assert again.surgery == model.surgery and again.surgery.sites == model.surgery.sites
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    for name in ("tie", "multiple_of", "heads"):
        assert getattr(again.settings, name) == getattr(model.settings, name)
    with torch.no_grad():
        assert torch.equal(again(x).members, model.eval()(x).members)


# --- multiple_of -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@four
def test_kept_counts_are_multiples(name: str, tmp_path: Path) -> None:
    model, base, x = converted(name, multiple_of=8)
    sites = model.surgery.sites
    assert all(site.ones % 8 == 0 or site.channels <= 8 for site in sites)
    plain = masksurgery.convert(base, example_inputs=(x,)).surgery.sites
    assert [site.layer for site in sites] == [site.layer for site in plain]
    assert [site.ones for site in sites] == [
        masksurgery.generate_masks(site.channels, 4, 2.0, multiple_of=8)[0].sum() for site in plain
    ]
    assert masksurgery.verify(model, base, x).relative <= 1e-12
    assert_restored(model, base, x, tmp_path / "model")


# --- tie="stream" ----------------------------------------------------------------------------------------------------


def streams(model: masksurgery.ConvertedModel) -> list[list[str]]:
    """The layers of each stream, in order; each has the masks that its name says, and no other site has them."""
    surgery = model.surgery
    found: dict[str, list[str]] = defaultdict(list)
    for site in surgery.sites:
        rows = surgery.masks[site.mask]
        assert torch.equal(model.get_submodule(site.mask).masks, torch.from_numpy(rows))
        if site.stream:
            found[site.stream].append(site.layer)
            assert np.array_equal(rows, surgery.masks[site.stream])
    by_mask = {site.mask: site for site in surgery.sites}
    assert all(by_mask[name].stream == name and by_mask[name].layer == layers[0] for name, layers in found.items())
    assert all(len(layers) > 1 for layers in found.values())
    return list(found.values())


STREAMS = {
    "resnet50": [
        [f"layer{k}.0.conv3", f"layer{k}.0.downsample.0", *(f"layer{k}.{i}.conv3" for i in range(1, blocks))]
        for k, blocks in ((1, 3), (2, 4), (3, 6), (4, 3))
    ],
    "mobilenetv3_small_100": [  # the first block of a stage changes the width, and has no shortcut
        [f"blocks.{k}.{i}.conv_pwl" for i in range(blocks)] for k, blocks in ((1, 2), (2, 3), (3, 2), (4, 3))
    ],
    "vit_tiny_patch16_224": [
        ["patch_embed.proj", *(f"blocks.{i}.{name}" for i in range(12) for name in ("attn.proj", "mlp.fc2"))]
    ],
    "swin_tiny_patch4_window7_224": [
        [
            f"layers.{k}.downsample.reduction" if k else "patch_embed.proj",
            *(f"layers.{k}.blocks.{i}.{name}" for i in range(depth) for name in ("attn.proj", "mlp.fc2")),
        ]
        for k, depth in enumerate((2, 2, 6, 2))
    ],
}


@pytest.mark.slow
@four
def test_a_stream_shares_its_masks(name: str, tmp_path: Path) -> None:
    model, base, x = converted(name, tie="stream")
    assert streams(model) == STREAMS[name]
    assert masksurgery.verify(model, base, x).relative <= 1e-12
    assert masksurgery.verify(model, base, x, mode="train").relative <= 1e-12
    assert_restored(model, base, x, tmp_path / "model")


@pytest.mark.slow
@four
def test_other_sites_keep_their_masks(name: str) -> None:
    model, base, x = converted(name, tie="stream")
    plain = masksurgery.convert(base, example_inputs=(x,))
    assert [site.mask for site in model.surgery.sites] == [site.mask for site in plain.surgery.sites]
    for site in model.surgery.sites:
        same = np.array_equal(model.surgery.masks[site.mask], plain.surgery.masks[site.mask])
        assert same == (not site.stream)  # a stream's masks are drawn from random numbers of its own
    other = masksurgery.convert(base, example_inputs=(x,), tie="stream", seed=1).surgery
    drawn = [model.surgery.masks[layer].tobytes() for layer in {site.stream for site in model.surgery.sites} - {""}]
    assert len(set(drawn)) == len(drawn) == len(STREAMS[name])
    assert all((other.masks[site.mask] != model.surgery.masks[site.mask]).any() for site in other.sites)


NET_STREAMS = {
    "conv_bn_relu": [["stem", "conv2"]],
    "layer_scale": [["conv1", "conv2"]],
    "densenet_cat": [],  # a concatenation has other channels than what it is made of
    "split_attention": [["conv_a", "conv_b"]],
    "mbconv_with_gate": [["stem", "conv_pwl"]],
    "squeeze_excite": [],
    "product_of_branches": [],
    # block2.dw is channel-wise since the sum: with masks of its own a member would keep (m/c)^2 of it.
    "depthwise_on_residual_stream": [["stem", "block1.fc2", "block2.dw", "block2.fc2"]],
    "windows": [["stem", "fc2"]],
    "token_mixer": [["stem", "fc2"]],
    "class_token_after_masks": [["stem", "fc1"]],
    "sequence_first_attention": [["stem", "proj", "fc"]],
    "channel_split": [],
    "two_batches_in_one": [["stem", "stem"]],
}


@pytest.mark.slow(parts=8)
@nets
def test_streams_of_hazard_nets(net: Net) -> None:
    base, inputs = make(net)
    model = convert(net, base, inputs, tie="stream")
    found = streams(model)
    assert found == NET_STREAMS.get(net.name, found)
    masksurgery.verify(model, base, *inputs)
    for site in [site for site in model.surgery.sites if site.stream not in ("", site.mask)][:1]:
        assert flips_found(model, base, site.mask, inputs), site  # a bit of this site alone


class Merged(nn.Module):
    """A stream of 8 channels: one sum of a layer of 8, one of two of 4 side by side; and a second one beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.whole, self.aside, self.more, self.head = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + torch.cat([self.left(x), self.right(x)], 1).relu()
        x = x + self.whole(x).relu()
        y = self.aside(x).tanh()
        return self.head(y + self.more(y).relu())


def test_what_a_concatenation_adds_is_left_alone() -> None:
    base, x = randomise(Merged(), 1).double().eval(), torch.randn(3, 5, dtype=torch.float64)
    model = masksurgery.convert(base, example_inputs=(x,), tie="stream")
    assert streams(model) == [["stem", "whole"], ["aside", "more"]]
    assert {site.layer for site in model.surgery.sites if not site.stream} == {"left", "right"}
    masksurgery.verify(model, base, x)


def test_a_stream_goes_through_what_cannot_be_traced(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = randomise(Branching(), 3).double().eval(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    model = masksurgery.convert(base, example_inputs=(x,), tie="stream")
    assert streams(model) == [["stem.0", "blocks.0.conv2", "blocks.1.conv2"]]
    assert {site.part for site in model.surgery.sites if site.stream} == {"stem", "blocks.0", "blocks.1"}
    masksurgery.verify(model, base, x)
    assert_restored(model, base, x, tmp_path / "model")


def test_a_stream_of_multiples() -> None:
    model, base, x = converted("mobilenetv3_small_100", tie="stream", multiple_of=8)
    assert streams(model) == STREAMS["mobilenetv3_small_100"]
    assert {site.ones % 8 for site in model.surgery.sites} == {0}
    masksurgery.verify(model, base, x)


# --- heads=True ------------------------------------------------------------------------------------------------------


def heads_of(model: masksurgery.ConvertedModel) -> dict[str, tuple[str, int]]:
    """Node and number of heads by layer; each mask keeps or leaves out whole heads."""
    found = {}
    for site in model.surgery.sites:
        if site.heads:
            rows = model.surgery.masks[site.mask].reshape(model.surgery.n, site.heads, -1)
            assert (rows == rows[:, :, :1]).all() and rows.any((0, 2)).all()
            found[site.layer] = (site.node, site.heads)
    return found


HEADS = {
    "vit_tiny_patch16_224": {f"blocks.{i}.attn.qkv": 3 for i in range(12)},
    "swin_tiny_patch4_window7_224": {
        f"layers.{k}.blocks.{i}.attn.qkv": 3 * 2**k for k, depth in enumerate((2, 2, 6, 2)) for i in range(depth)
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", HEADS)
def test_whole_heads_are_masked(name: str, fused: bool, tmp_path: Path) -> None:
    base, x = small(name), images(name, 2)
    for module in base.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    model = masksurgery.convert(base, example_inputs=(x,), heads=True)
    assert {layer: heads for layer, (_, heads) in heads_of(model).items()} == HEADS[name]
    assert not any(skip.layer.endswith("qkv") for skip in model.surgery.skipped)
    site = next(site for site in model.surgery.sites if site.heads)
    read = next(node for node in model.graph.nodes if node.target == f"{site.layer.removesuffix('qkv')}proj")
    assert site.channels == model.get_submodule(read.target).in_features and site.ones == site.channels // 3
    assert masksurgery.verify(model, base, x).relative <= 1e-12
    assert masksurgery.verify(model, base, x, mode="train").relative <= 1e-12
    assert flips_found(model, base, site.mask, (x,))
    assert_restored(model, base, x, tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_all_other_sites_are_the_default_ones(name: str) -> None:
    model, base, x = converted(name, heads=True)
    plain = masksurgery.convert(base, example_inputs=(x,)).surgery
    assert tuple(site for site in model.surgery.sites if not site.heads) == plain.sites
    assert all(np.array_equal(rows, model.surgery.masks[mask]) for mask, rows in plain.masks.items())
    assert {skip.layer for skip in plain.skipped} - {skip.layer for skip in model.surgery.skipped} == set(HEADS[name])


@pytest.mark.slow
def test_heads_with_the_other_options() -> None:
    model, base, x = converted("vit_tiny_patch16_224", heads=True, tie="stream", multiple_of=128)
    sites = model.surgery.sites
    assert {(site.channels, site.ones) for site in sites if site.heads} == {(192, 128)}  # two heads of three
    assert not any(site.stream for site in sites if site.heads)
    assert streams(model) == STREAMS["vit_tiny_patch16_224"]
    masksurgery.verify(model, base, x)
    assert len(heads_of(model)) == 12


NET_HEADS = {
    "fused_qkv": {"qkv": ("reshape_1", 2)},
    "fused_attention_dropout": {"qkv": ("reshape_1", 2)},
    "separate_qkv": {"v": ("reshape", 2)},
    "sequence_first_attention": {"v": ("reshape", 2)},  # the heads are folded into the batch
    "talking_heads": {"qkv": ("reshape_1", 4)},
    "attention_position_bias": {"qkv": ("reshape_1", 2)},
    "einops_attention": {"qkv": ("rearrange_1", 2)},
    "multihead_attention": {},  # one node
    "multihead_attention_sequence_first": {},
    "encoder_layer": {},
    "encoder_layer_sequence_first": {},
    "encoder_layer_as_output": {},
}


@pytest.mark.slow(parts=8)
@nets
def test_heads_of_hazard_nets(net: Net) -> None:
    base, inputs = make(net)
    if net.name not in NET_HEADS:
        with pytest.raises(SiteError, match=r"heads=True finds no attention in \w+: no softmax is multiplied"):
            convert(net, base, inputs, heads=True)
        return
    model = convert(net, base, inputs, heads=True)
    assert heads_of(model) == NET_HEADS[net.name]
    assert tuple(site.layer for site in model.surgery.sites if not site.heads) == tuple(layer for layer, _ in net.sites)
    for mode in ("eval", "train"):
        masksurgery.verify(model, base, *inputs, mode=mode)
    for site in model.surgery.sites:
        assert not site.heads or flips_found(model, base, site.mask, inputs)


class Attention(nn.Module):
    """Four heads of two channels; what differs is how many heads the values have, and who reads what they make."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.groups = kind, {"repeated": 2, "gqa": 2, "broadcast": 2, "one": 1}.get(kind, 4)
        self.stem, self.q, self.proj, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.k, self.v = nn.Linear(8, 2 * self.groups), nn.Linear(8, 2 * self.groups)
        self.norm, self.gate, self.dw = nn.LayerNorm(8), nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1, groups=8)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kind == "gqa":
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        if self.kind == "repeated":
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        if self.kind == "broadcast":
            weights = (q.unflatten(1, (2, 2)) @ k.unsqueeze(2).transpose(-2, -1)).softmax(-1)
            return (weights @ v.unsqueeze(2)).flatten(1, 2)
        if self.kind == "twice":
            return (q @ k.transpose(-2, -1)).softmax(-1) @ v - (k @ q.transpose(-2, -1)).softmax(-1) @ v
        return (q @ k.transpose(-2, -1)).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, t, _ = x.shape
        q = self.q(x).view(b, t, 4, 2).transpose(1, 2)
        k, v = (layer(x).view(b, t, self.groups, 2).transpose(1, 2) for layer in (self.k, self.v))
        y = self.attend(q, k, v)
        y = (y.permute(0, 2, 3, 1) if self.kind == "channels" else y.transpose(1, 2)).reshape(b, t, 8)
        if self.kind == "norm":
            y = self.norm(y)
        if self.kind == "gate":
            y = y * self.gate(x).sigmoid()
        if self.kind == "local":
            y = y + self.dw(x.transpose(1, 2)).transpose(1, 2)
        if self.kind == "depthwise":
            y = self.dw(y.transpose(1, 2)).transpose(1, 2)
        if self.kind == "output":
            return (x + y).mean(1)
        z = self.proj(y)
        return self.head((x + z + y if self.kind == "readers" else x + z).mean(1))


def attention(kind: str, **options) -> tuple[masksurgery.ConvertedModel, nn.Module, Tensor]:
    base, x = randomise(Attention(kind), 1).double().eval(), torch.randn(3, 6, 5, dtype=torch.float64)
    return masksurgery.convert(base, example_inputs=(x,), **{"heads": True, **options}), base, x


@pytest.mark.parametrize(
    ("kind", "node"),
    [("plain", "reshape"), ("norm", "norm"), ("gate", "mul"), ("local", "add"), ("twice", "reshape")],
)
def test_the_mask_stands_before_the_projection(kind: str, node: str) -> None:
    model, base, x = attention(kind)
    assert heads_of(model) == {"v": (node, 4)}
    masksurgery.verify(model, base, x)
    masksurgery.verify(model, base, x, mode="train")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("repeated", "heads: its values serve several heads"),
        ("gqa", "heads: its values serve several heads"),
        ("broadcast", "heads: its values serve several heads"),
        ("channels", "heads: their channels do not stand together, head by head, in 'reshape'"),
        ("readers", "heads: no single layer reads 'reshape'"),
        ("output", "heads: no single layer reads 'mean'"),
        ("depthwise", "heads: 'dw' reads them channel by channel"),
    ],
)
def test_heads_that_cannot_be_masked_are_skipped(kind: str, reason: str) -> None:
    model, base, x = attention(kind)
    assert heads_of(model) == {}
    reasons = {skip.layer: skip.reason for skip in model.surgery.skipped}
    assert reasons.get("v", "").startswith(reason), reasons
    masksurgery.verify(model, base, x)
    assert model.surgery.sites == attention(kind, heads=False)[0].surgery.sites


def test_the_only_head_of_values_is_masked_as_a_layer() -> None:
    model, base, x = attention("one")  # its channels are not split, so the default rule masks them
    assert heads_of(model) == {} and "v" in {site.layer for site in model.surgery.sites}
    masksurgery.verify(model, base, x)


def test_heads_follow_the_selection_of_layers() -> None:
    assert heads_of(attention("plain", exclude=["v"])[0]) == {}
    only, base, x = attention("plain", include=["v"])
    assert heads_of(only) == {"v": ("reshape", 4)} and len(only.surgery.sites) == 1
    masksurgery.verify(only, base, x)

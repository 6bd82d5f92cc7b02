"""MONAI: volumes, transposed convolutions, InstanceNorm, and inference by a sliding window."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from monai.networks import nets
from torch import nn

import masksurgery
from masksurgery.layers import Masksembles3D
from masksurgery.model import ConvertedModel
from nets import randomise
from proofs import prove, rows, skipped_as


def unet() -> nn.Module:
    return nets.UNet(3, 1, 3, channels=(8, 16, 32), strides=(2, 2), num_res_units=2, dropout=0.1)


def test_unet() -> None:
    model, _ = prove(unet(), rows(3, 1, 16, 16, 16))
    # Three encoder units of two convolutions and a shortcut; of the decoder a transposed convolution and a unit, and
    # a transposed convolution; the last unit makes the logits, by a sum with its input.
    assert len(model.surgery.sites) == 3 * 3 + 2 + 1
    assert skipped_as(model, "output") == {"model.2.1.conv.unit0.conv"}
    assert sum(isinstance(module, Masksembles3D) for module in model.modules()) == 12
    transposed = [s for s in model.surgery.sites if isinstance(model.get_submodule(s.layer), nn.ConvTranspose3d)]
    assert len(transposed) == 2
    p = model(rows(2, 1, 16, 16, 16).double())
    assert p.mean.shape == p.variance.shape == (2, 3, 16, 16, 16)
    assert p.variance.max() > 1e-3


def test_segresnet() -> None:
    base = nets.SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=3, blocks_down=(1, 1, 1),
                          blocks_up=(1, 1))  # fmt: skip
    model, _ = prove(base, rows(2, 1, 8, 16, 16))
    assert skipped_as(model, "output") == {"conv_final.2.conv"}


@pytest.mark.slow
def test_swin_unetr() -> None:
    """Its windows are masked by assignments to a tensor of sizes, and rearranged by einops."""
    base = nets.SwinUNETR(in_channels=1, out_channels=3, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4))
    model, _ = prove(base, rows(1, 1, 64, 32, 32), options={"n": 2})
    assert skipped_as(model, "output") == {"out.conv.conv"}
    assert skipped_as(model, "reshaped") == {f"swinViT.layers{i}.0.blocks.0.attn.qkv" for i in range(1, 5)}


@pytest.mark.parametrize("name", ["DynUNet", "AttentionUnet", "UNETR", "DenseNet121"])
@pytest.mark.slow
def test_others(name: str) -> None:
    given = {
        "DynUNet": (3, 1, 3, [3, 3, 3], [1, 2, 2], [2, 2]),
        "AttentionUnet": (3, 1, 3, (8, 16), (2,)),
        "UNETR": (1, 3, (16, 16, 16), 8, 24, 48, 2),
        "DenseNet121": (3, 1, 3, 8, 4, (2, 2)),
    }
    model, _ = prove(getattr(nets, name)(*given[name]), rows(2, 1, 16, 16, 16))
    assert skipped_as(model, "output")


@pytest.fixture(scope="module")
def converted() -> ConvertedModel:
    base = randomise(unet(), 1).eval()
    return masksurgery.convert(base, example_inputs=(rows(1, 1, 16, 16, 16),))


def test_sliding_window(converted: ConvertedModel) -> None:
    """Mean and variance of a volume are put together of its windows, as any output of a network."""
    volume = rows(1, 1, 24, 16, 16)

    def predict(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        p = converted(windows)
        return p.mean, p.variance

    with torch.no_grad():
        mean, variance = sliding_window_inference(volume, (16, 16, 16), sw_batch_size=2, predictor=predict, overlap=0.5)
        first, second = converted(volume[:, :, :16]), converted(volume[:, :, 8:])
    for found, field in ((mean, "mean"), (variance, "variance")):
        one, other = getattr(first, field), getattr(second, field)
        expected = torch.cat([one[:, :, :8], (one[:, :, 8:] + other[:, :, :8]) / 2, other[:, :, 8:]], 2)
        assert found.shape == (1, 3, 24, 16, 16)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean.sum(1), torch.ones(1, 24, 16, 16))
    assert variance.max() > 1e-3


def test_sliding_window_over_one_field(converted: ConvertedModel) -> None:
    converted.output = "mean"
    with torch.no_grad():
        mean = sliding_window_inference(rows(1, 1, 32, 16, 16), (16, 16, 16), 2, converted, overlap=0.0)
        expected = torch.cat([converted(part) for part in rows(1, 1, 32, 16, 16).split(16, 2)], 2)
    converted.output = "prediction"
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)


def test_a_unet_learns() -> None:
    torch.manual_seed(0)
    x = rows(4, 1, 16, 16, 16)
    y = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
    model = masksurgery.convert(unet(), example_inputs=(x,)).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert model.eval()(x).mean.shape == (4, 3, 16, 16, 16)

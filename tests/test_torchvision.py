"""torchvision: images, segmentation, video, optical flow, and the backbones of detection models."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torchvision.models as zoo
from torch import nn
from torchvision.models import detection, optical_flow, segmentation, video

import masksurgery
from masksurgery.layers import Masksembles3D
from proofs import prove, rows, skipped_as

NONE = {"weights": None, "weights_backbone": None}
# A model, and the number of its sites.
IMAGES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet18": (lambda: zoo.resnet18(num_classes=5), 20),
    "squeezenet1_1": (lambda: zoo.squeezenet1_1(num_classes=5), 1 + 8 * 3),  # the stem, of each fire its three
    "mobilenet_v3_small": (lambda: zoo.mobilenet_v3_small(num_classes=5), 24),
    "shufflenet_v2_x0_5": (lambda: zoo.shufflenet_v2_x0_5(num_classes=5), 2 + 16),  # both ends, one of each unit
    "vit": (lambda: zoo.VisionTransformer(64, 16, 2, 2, 32, 64, num_classes=5), 1 + 2 * 2),  # of each block its MLP
    "swin": (lambda: zoo.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5), 2 + 4 * 2),
    # The stem, of each block three of its convolutions and three of each of its attentions, and before the logits.
    "maxvit": (lambda: zoo.MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.2, num_classes=5), 2 + 2 * (3 + 2 * 3) + 1),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "vit")) for name in IMAGES])
def test_images(name: str) -> None:
    build, sites = IMAGES[name]
    model, _ = prove(build(), rows(3, 3, 64, 64))
    assert len(model.surgery.sites) == sites
    p = model(rows(2, 3, 64, 64).double())
    assert p.mean.shape == p.variance.shape == (2, 5)
    assert p.members.shape == (2, 4, 5)
    assert skipped_as(model, "output")


@pytest.mark.slow
def test_segmentation() -> None:
    model, _ = prove(segmentation.fcn_resnet50(**NONE, num_classes=5, aux_loss=True), rows(2, 3, 32, 32))
    # 53 convolutions of resnet50, and one of each head before its classifier
    assert len(model.surgery.sites) == 53 + 2
    assert skipped_as(model, "output") == {"classifier.4", "aux_classifier.4"}
    result = model(rows(2, 3, 32, 32).double())
    assert type(result) is OrderedDict and list(result) == ["out", "aux"]
    for p in result.values():
        assert p.mean.shape == p.variance.shape == (2, 5, 32, 32)
        assert p.entropy.shape == (2, 32, 32)
        torch.testing.assert_close(p.mean.sum(1), torch.ones(2, 32, 32, dtype=torch.float64))
        assert p.variance.max() > 1e-3
    result = model.train()(rows(3, 3, 32, 32).double())
    assert type(result) is OrderedDict and result["aux"].shape == (3, 5, 32, 32)


@pytest.mark.parametrize("name", ["deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
@pytest.mark.slow
def test_segmentation_with_a_mobile_backbone(name: str) -> None:
    model, _ = prove(getattr(segmentation, name)(**NONE, num_classes=5), rows(2, 3, 64, 64))
    # The logits of the two heads of LRASPP are added: neither is masked.
    heads = {"classifier.low_classifier", "classifier.high_classifier"} if "lraspp" in name else {"classifier.4"}
    assert skipped_as(model, "output") == heads
    assert list(model(rows(1, 3, 64, 64).double())) == ["out"]
    head = masksurgery.convert(zoo.get_model(name, **NONE), where="head", example_inputs=(rows(1, 3, 64, 64),))
    assert {layer for site in head.surgery.sites for layer in (site.layer, *site.chain)} == heads


@pytest.mark.slow
def test_video() -> None:
    model, _ = prove(video.r3d_18(num_classes=5), rows(2, 3, 4, 16, 16))
    # The stem, two convolutions in each of eight blocks, three shortcuts.
    assert len(model.surgery.sites) == 1 + 16 + 3
    seen = []
    for site in model.surgery.sites:
        mask = model.get_submodule(site.mask)
        assert type(mask) is Masksembles3D
        mask.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    model(rows(2, 3, 4, 16, 16).double())
    assert all(len(shape) == 5 for shape in seen)
    assert seen[0][1:3] == (64, 4)


def test_video_transformer() -> None:
    base = video.swin_transformer.SwinTransformer3d([2, 4, 4], 12, [2, 2], [2, 2], [2, 3, 3], num_classes=5)
    model, _ = prove(base, rows(2, 3, 4, 32, 32))
    # Patches; of each block the two Linear of its MLP (attention calls no layer); the merging of patches.
    assert len(model.surgery.sites) == 1 + 4 * 2 + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raft_small", "raft_large"])
def test_optical_flow(name: str) -> None:
    """In float32: its coordinates are. Twelve updates with random weights would make much of every rounding."""
    given = {"image1": rows(2, 3, 128, 128), "image2": rows(2, 3, 128, 128, seed=1), "num_flow_updates": 2}
    model, _ = prove(getattr(optical_flow, name)(), options={"task": "regression"}, double=False, **given)
    assert {site.outer for site in model.surgery.sites if site.layer.startswith("feature_encoder")} == {2}
    flows = model(**given)
    assert type(flows) is list and [p.mean.shape for p in flows] == [(2, 2, 128, 128)] * 2
    with pytest.raises(masksurgery.TraceError, match="converted with num_flow_updates=2"):
        model(**{**given, "num_flow_updates": 3})


DETECTION = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": 96,
    "ssdlite320_mobilenet_v3_large": 96,
    "retinanet_resnet50_fpn": 64,
    "fcos_resnet50_fpn": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTION)
def test_detection_is_converted_by_its_backbone(name: str) -> None:
    base = getattr(detection, name)(**NONE, num_classes=3)
    images = [rows(3, 64, 80).abs(), rows(3, 70, 64).abs()]
    with pytest.raises(masksurgery.ConfigError, match=r"lists.*masksurgery\.convert\(model\.backbone"):
        masksurgery.convert(base, example_inputs=(images,))
    x = rows(2, 3, DETECTION[name], DETECTION[name])
    backbone, _ = prove(base.backbone, x, options={"task": "regression"})
    maps = backbone(x.double())
    assert type(maps) is OrderedDict and list(maps) == list(base.backbone(x.double()))
    assert all(p.mean.shape == p.variance.shape and p.mean.shape[0] == 2 for p in maps.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"])
def test_a_detection_model_runs_and_learns_on_a_converted_backbone(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(detection, name)(**NONE, num_classes=3)
    x = (torch.zeros(1, 3, 320, 320),)
    model.backbone = masksurgery.convert(model.backbone, example_inputs=x, task="regression")
    model.backbone.output = "mean"
    images = [rows(3, 64, 80).abs(), rows(3, 70, 64).abs()]
    boxes = model.eval()(images)
    assert len(boxes) == 2 and all(found["boxes"].isfinite().all() for found in boxes)
    target = {"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([1])}
    losses = model.train()(images, [target, target])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert next(model.backbone.parameters()).grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, about quantised tensors
def test_quantised_models_are_refused() -> None:
    """Their layers are no nn.Conv2d, and hold no floating-point channels."""
    base = nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 8, 3), nn.Flatten())
    with pytest.raises(masksurgery.ConfigError, match="'0' is a Conv2d: int8 layers hold no floating-point channels"):
        masksurgery.convert(base, example_inputs=(torch.zeros(1, 3, 8, 8),))

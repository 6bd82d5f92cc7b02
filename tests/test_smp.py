"""segmentation-models-pytorch, with encoders of timm."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch

from proofs import prove, rows, skipped_as

SMALL = {"encoder_name": "tu-resnet10t", "encoder_weights": None, "classes": 4}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FPN", "DeepLabV3Plus", "Segformer", "UnetPlusPlus", "MAnet", "UPerNet"])
def test_architectures(name: str) -> None:
    model, _ = prove(getattr(smp, name)(**SMALL), rows(3, 3, 64, 64))
    assert skipped_as(model, "output") == {"segmentation_head.0"}
    p = model(rows(2, 3, 64, 64).double())
    assert p.mean.shape == p.variance.shape == (2, 4, 64, 64)
    torch.testing.assert_close(p.mean.sum(1), torch.ones(2, 64, 64, dtype=torch.float64))
    assert p.variance.max() > 1e-3


@pytest.mark.slow
def test_sites_of_a_unet() -> None:
    model, _ = prove(smp.Unet(**SMALL), rows(3, 3, 64, 64))
    # The encoder: a stem of three, two in each of its four blocks, three shortcuts. Five decoder blocks of two.
    assert len(model.surgery.sites) == (3 + 4 * 2 + 3) + 5 * 2
    assert len(model.surgery.skipped) == 1
    assert {site.layer.split(".")[0] for site in model.surgery.sites} == {"encoder", "decoder"}


@pytest.mark.slow
def test_labels_beside_the_mask() -> None:
    aux = {"classes": 3, "dropout": 0.2}
    model, _ = prove(smp.Unet(**SMALL, aux_params=aux), rows(3, 3, 64, 64))
    assert skipped_as(model, "output") == {"segmentation_head.0", "classification_head.3"}
    masks, labels = model(rows(2, 3, 64, 64).double())
    assert masks.mean.shape == (2, 4, 64, 64) and labels.mean.shape == (2, 3)


@pytest.mark.slow
def test_one_class_by_its_yes_or_no() -> None:
    model, _ = prove(smp.Unet(**{**SMALL, "classes": 1}), rows(3, 3, 64, 64), options={"task": "multilabel"})
    p = model(rows(2, 3, 64, 64).double())
    assert p.mean.shape == (2, 1, 64, 64)
    assert ((p.mean > 0) & (p.mean < 1)).all()


@pytest.mark.slow
def test_a_transformer_as_encoder() -> None:
    base = smp.DPT(encoder_name="tu-vit_tiny_patch16_224", encoder_weights=None, classes=4)
    model, _ = prove(base, rows(1, 3, 224, 224), options={"n": 2})
    assert skipped_as(model, "unused") == {"encoder.model.head"}

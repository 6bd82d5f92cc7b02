"""Networks of keras.applications at a small size, all weights random: each member is the base with its masks."""

from __future__ import annotations

from collections import Counter

import keras
import numpy as np
import pytest

import masksurgery.keras as mk
from keras_nets import check_members, randomise, to_numpy

SITES = {
    "ResNet50": (53, {"output layer": 1}),
    "MobileNetV3Small": (24, {"gate": 18, "output layer": 1}),
    "EfficientNetB0": (33, {"gate": 32, "output layer": 1}),
    "DenseNet121": (120, {"output layer": 1}),
}
"""Masks, and skipped layers by reason. Depthwise convolutions are in the chains of the layers before them."""


def check(name: str) -> None:
    size = {"weights": None, "input_shape": (32, 32, 3), "classes": 7}
    base = getattr(keras.applications, name)(**size, classifier_activation=None)
    randomise(base)
    model = mk.convert(base, 2, 1.5, task="regression")  # of logits: a softmax of random ones is 0 or 1
    sites, skipped = SITES[name]
    assert len(model.surgery.sites) == sites
    assert Counter(skip.reason.split(":")[0] for skip in model.surgery.skipped) == skipped
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    assert check_members(base, model, x) < 5e-5
    one, wanted = to_numpy(mk.convert(base, 2, 1.0, task="regression")(x)["mean"]), to_numpy(base(x))
    assert np.abs(one - wanted).max() < 5e-5 * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.parametrize("name", SITES)
def test_members_are_the_masked_base(name: str) -> None:
    check(name)

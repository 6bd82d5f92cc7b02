"""masksurgery.keras.convert: which layers are masked, and that each member is the base model with its masks."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L

import masksurgery.keras as mk
from keras_nets import NETS, check_members, inputs_of, lenet, randomise, to_numpy
from masksurgery.masks import generate_masks, site_seed
from masksurgery.types import ConfigError, LayoutError, MasksurgeryError, TraceError

TOLERANCE = 5e-5


@pytest.mark.parametrize("name", NETS)
def test_sites_are_those_worked_out_by_hand_and_members_are_the_masked_base(name: str) -> None:
    net = NETS[name]()
    randomise(net.model)
    x = inputs_of(net.model, rows=3)
    before, weights = to_numpy(net.model(x)), [to_numpy(w) for w in net.model.weights]
    model = mk.convert(net.model, 3, 2.0, **net.settings)
    assert {(site.layer, site.call): site.node for site in model.surgery.sites} == net.sites
    seen = {skip.layer: skip.reason for skip in model.surgery.skipped}
    assert seen.keys() == net.skipped.keys()
    assert all(seen[layer].startswith(reason) for layer, reason in net.skipped.items())
    assert check_members(net.model, model, x) < TOLERANCE
    one = mk.convert(net.model, 2, 1.0, **net.settings)
    np.testing.assert_allclose(to_numpy(one(x)["members"]), np.stack([before] * 2, 1), atol=1e-5, rtol=1e-4)
    assert np.array_equal(to_numpy(net.model(x)), before)
    assert all(np.array_equal(a, to_numpy(b)) for a, b in zip(weights, net.model.weights, strict=True))


def test_the_base_is_not_called() -> None:
    net = NETS["nested"]()
    every = [*net.model.layers, *net.model.get_layer("back").layers, *net.model.get_layer("top").layers]

    def calls() -> list[tuple[int, int, bool]]:
        return [(len(layer._inbound_nodes), len(layer._outbound_nodes), layer.trainable) for layer in every]

    before = calls()
    model = mk.convert(net.model, 3, 2.0)
    assert calls() == before
    assert not {id(layer) for layer in model._flatten_layers()} & {id(layer) for layer in every}


def test_depthwise_chain_is_recorded() -> None:
    model = mk.convert(NETS["depthwise"]().model, 4, 2.0)
    assert {site.layer: site.chain for site in model.surgery.sites}["expand"] == ("dw",)


def test_a_flipped_bit_of_any_mask_breaks_the_oracle() -> None:
    net = lenet()
    randomise(net.model)
    x = inputs_of(net.model, rows=3)
    model = mk.convert(net.model, 3, 2.0)
    for site in model.surgery.sites:
        layer = model.get_layer(site.mask)
        masks = to_numpy(layer.masks)
        flipped = masks.copy()
        flipped[1, 0] = not flipped[1, 0]
        wanted = to_numpy(model(x)["members"])
        layer.masks.assign(flipped)
        changed = to_numpy(model(x)["members"])
        assert np.abs(changed - wanted)[:, 1].max() > 1e-3
        assert np.array_equal(changed[:, [0, 2]], wanted[:, [0, 2]])  # no other member sees it
        layer.masks.assign(masks)
    assert check_members(net.model, model, x) < TOLERANCE


def test_one_seed_one_set_of_masks_and_streams_of_sites_differ() -> None:
    base = NETS["called_twice"]().model

    def masks(seed: int) -> list[Any]:
        model = mk.convert(base, 4, 2.0, task="regression", seed=seed)
        return [to_numpy(model.get_layer(site.mask).masks) for site in model.surgery.sites]

    one, same, other = masks(0), masks(0), masks(1)
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    assert not np.array_equal(one[0], one[1])


def automatic() -> keras.Model:
    """Layers with the names that Keras gives: `dense_7`, then `dense_10`."""
    inputs = keras.Input((5,))
    shared = L.Dense(5, activation="relu")
    x = L.Concatenate()([shared(shared(inputs)), L.Dense(16, activation="relu")(inputs)])
    return keras.Model(inputs, L.Dense(2)(x))


def test_masks_do_not_depend_on_names() -> None:
    one, other = (mk.convert(automatic(), 4, 2.0, seed=3, task="classification") for _ in range(2))
    assert [site.layer for site in one.surgery.sites] != [site.layer for site in other.surgery.sites]
    found = [[to_numpy(m.get_layer(site.mask).masks) for site in m.surgery.sites] for m in (one, other)]
    # Of each convolution or Dense layer: its place among them, in the order of the graph, and the call.
    seeds = [site_seed(3, "0", 0), site_seed(3, "0", 1), site_seed(3, "1", 0)]
    wanted = [generate_masks(size, 4, 2.0, seed=seed) for size, seed in zip((5, 5, 16), seeds, strict=True)]
    for masks in found:
        assert len(masks) == 3 and all(map(np.array_equal, masks, wanted))


@pytest.mark.parametrize("selection", [{"exclude": ["first"]}, {"include": ["second"]}])
def test_masks_do_not_depend_on_what_else_is_masked(selection: dict[str, Any]) -> None:
    inner = [L.Dense(16, name="first"), L.Dense(16, name="second")]
    base = keras.Sequential([keras.Input((5,)), *inner, L.Dense(2, name="out")])
    whole, part = (mk.convert(base, task="regression", **chosen) for chosen in ({}, selection))
    one, other = (to_numpy(model.get_layer("second_mask").masks) for model in (whole, part))
    assert np.array_equal(one, other) and not np.array_equal(one, to_numpy(whole.get_layer("first_mask").masks))
    assert [site.layer for site in part.surgery.sites] == ["second"]


def test_head_masks_only_what_the_output_layer_reads() -> None:
    net = NETS["resnet_logits"]()
    randomise(net.model)
    x = inputs_of(net.model, rows=4)
    model = mk.convert(net.model, 3, 2.0, where="head", task="classification")
    (site,) = model.surgery.sites
    assert (site.layer, site.channels, model.surgery.output_layers) == ("out", 12, ("out",))
    assert all("where=" in skip.reason for skip in model.surgery.skipped) and len(model.surgery.skipped) == 6
    assert check_members(net.model, model, x) < TOLERANCE
    repeats = [layer.name for layer in model.layers if layer.name.endswith("_repeat")]
    assert len(repeats) == 1  # everything before is computed once


def test_head_of_a_single_layer_masks_the_input() -> None:
    base = keras.Sequential([keras.Input((8,), name="features"), L.Dense(3, activation="softmax", name="out")])
    randomise(base)
    x = inputs_of(base, rows=4)
    model = mk.convert(base, 3, 2.0, where="head")
    (site,) = model.surgery.sites
    assert (site.layer, site.node, site.channels) == ("out", "features", 8)
    masks = to_numpy(model.get_layer(site.mask).masks) * np.float32(8 / site.ones)
    members = to_numpy(model(x)["members"])
    for i in range(3):
        np.testing.assert_allclose(members[:, i], to_numpy(base(x * masks[i])), rtol=1e-4, atol=1e-6)


def test_include_and_exclude() -> None:
    base = NETS["resnet_logits"]().model

    def layers(**selection: Any) -> list[str]:
        model = mk.convert(base, 4, 2.0, task="classification", **selection)
        return [site.layer for site in model.surgery.sites]

    assert layers(include=["?"]) == ["a", "b", "d", "e"]
    assert layers(include="?", exclude=["b"]) == ["a", "d", "e"]
    assert layers(include=["out"]) == ["out"]  # named in full
    model = mk.convert(base, 4, 2.0, task="classification", exclude=["a"])
    assert {skip.layer: skip.reason for skip in model.surgery.skipped}["a"] == "excluded"


class Centre(L.Layer):
    """Mixes the samples of a batch."""

    def call(self, inputs: Any) -> Any:
        return inputs - keras.ops.mean(inputs, axis=0)


class Scale(L.Layer):
    """Keeps them apart."""

    def build(self, input_shape: Any) -> None:
        self.scale = self.add_weight(shape=(input_shape[-1],), initializer="ones")

    def call(self, inputs: Any) -> Any:
        return inputs * self.scale


def with_layer(layer: Any) -> keras.Model:
    """A layer between two pairs of Dense layers."""
    inputs = keras.Input((6,))
    x = L.Dense(6, activation="relu", name="early")(inputs)
    x = layer(L.Dense(6, name="before")(x))
    x = L.Dense(8, activation="relu", name="after")(x)
    return keras.Model(inputs, L.Dense(2, name="out")(x))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Centre(name="own"),
        lambda: L.Lambda(lambda x: x - keras.ops.mean(x, 0), name="own"),
        lambda: lambda x: L.BatchNormalization(name="own")(x, training=True),
    ],
)
def test_no_mask_reaches_what_mixes_samples(layer: Any) -> None:
    base = with_layer(layer())
    randomise(base)
    x = inputs_of(base, rows=4)
    model = mk.convert(base, 3, 2.0, task="regression")
    assert [site.layer for site in model.surgery.sites] == ["after"]
    reasons = {skip.layer: skip.reason for skip in model.surgery.skipped}
    assert reasons["early"].startswith("unknown: 'own'") and reasons["before"].startswith("unknown: 'own'")
    assert check_members(base, model, x) < TOLERANCE


def test_a_layer_of_ones_own_that_keeps_samples_apart_is_passed_but_not_seen_through() -> None:
    base = with_layer(Scale(name="own"))
    randomise(base)
    model = mk.convert(base, 3, 2.0, task="regression")
    assert [site.layer for site in model.surgery.sites] == ["early", "after"]
    assert "no rule follows channels through 'own' (Scale)" in str(model.surgery.skipped)
    assert check_members(base, model, inputs_of(base, rows=4)) < TOLERANCE


def test_lambdas_are_made_again() -> None:
    base = with_layer(L.Lambda(lambda x: keras.ops.abs(x) + 1, name="own"))
    randomise(base)
    model = mk.convert(base, 3, 2.0, task="regression")
    assert check_members(base, model, inputs_of(base, rows=4)) < TOLERANCE


def test_statistics_of_a_normalization_come_along() -> None:
    norm = L.Normalization()
    norm.adapt(np.random.default_rng(0).normal(3, 2, (50, 4)))
    base = keras.Sequential([keras.Input((4,)), norm, L.Dense(6, activation="relu"), L.Dense(1)])
    randomise(keras.Sequential(base.layers[1:]))
    x = inputs_of(base, rows=4)
    one = mk.convert(base, 2, 1.0, task="regression")
    np.testing.assert_allclose(to_numpy(one(x)["mean"]), to_numpy(base(x)), rtol=1e-4, atol=1e-5)


def test_trainable_flags_come_along() -> None:
    model = mk.convert(NETS["nested"]().model, 4, 2.0)
    flags = {layer.name: layer.trainable for layer in model.layers}
    assert not flags["back_conv"] and not flags["back_conv_bn"] and flags["top_hidden"] and flags["out"]


def test_inputs_by_name_stay_with_their_names() -> None:
    z, b = keras.Input((6,), name="z"), keras.Input((6,), name="b")
    shapes = keras.Input((4,), name="a")
    x = L.Dense(5, activation="relu", name="of_z")(z) - 0.5 * L.Dense(5, activation="relu", name="of_b")(b)
    x = L.Concatenate()([x, L.Dense(3, name="of_a")(shapes)])
    base = keras.Model({"z": z, "b": b, "a": shapes}, L.Dense(2, name="out")(x))  # keys that are not in order
    randomise(base)
    x = inputs_of(base, rows=3)
    expected = to_numpy(base(x))
    assert np.abs(expected - to_numpy(base({**x, "z": x["b"], "b": x["z"]}))).max() > 0.1  # they do not commute
    model = mk.convert(base, 2, 1.0, task="regression")
    assert {key: value.name for key, value in model.input.items()} == {"z": "z", "b": "b", "a": "a"}
    np.testing.assert_allclose(to_numpy(model(x)["mean"]), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.predict(x, verbose=0)["mean"], expected, rtol=1e-4, atol=1e-5)
    assert check_members(base, mk.convert(base, 3, 2.0, task="regression"), x) < TOLERANCE


def test_a_nested_model_with_inputs_by_name_is_inlined() -> None:
    z, b = keras.Input((4,), name="z"), keras.Input((4,), name="b")
    difference = L.Dense(5, activation="relu", name="of_z")(z) - L.Dense(5, activation="relu", name="of_b")(b)
    inner = keras.Model({"z": z, "b": b}, difference, name="inner")
    inputs = [keras.Input((4,), name=name) for name in ("one", "two")]
    base = keras.Model(inputs, L.Dense(2, name="out")(inner({"b": inputs[1], "z": inputs[0]})))
    randomise(base)
    x = [np.random.default_rng(seed).normal(size=(3, 4)).astype("float32") for seed in (0, 1)]
    model = mk.convert(base, 2, 1.0, task="regression")
    np.testing.assert_allclose(to_numpy(model(x)["mean"]), to_numpy(base(x)), rtol=1e-4, atol=1e-5)
    assert [site.layer for site in mk.convert(base, task="regression").surgery.sites] == ["inner_of_z", "inner_of_b"]


def test_any_image_size_and_a_fixed_batch() -> None:
    inputs = keras.Input(batch_shape=(4, None, None, 3))
    x = L.Conv2D(6, 3, activation="relu")(inputs)
    base = keras.Model(inputs, L.Dense(2, activation="softmax")(L.GlobalAveragePooling2D()(x)))
    randomise(base)
    model = mk.convert(base, 3, 2.0)
    for rows, size in ((4, 5), (4, 9)):
        x = np.random.default_rng(0).normal(size=(rows, size, size, 3)).astype("float32")
        assert check_members(base, model, x) < TOLERANCE


# --- errors ----------------------------------------------------------------------------------------------------------


class Subclassed(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.dense = L.Dense(2)

    def call(self, inputs: Any) -> Any:
        return self.dense(inputs)


class OwnCall(keras.Model):
    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return super().call(inputs, training=training, mask=mask) * 2


def two_outputs() -> keras.Model:
    inputs = keras.Input((4,))
    return keras.Model(inputs, [L.Dense(2, name="one")(inputs), L.Dense(2, name="two")(inputs)])


def dense(*sizes: int, **last: Any) -> keras.Model:
    inner = [L.Dense(size, name=f"d{i}") for i, size in enumerate(sizes[:-1])]
    return keras.Sequential([keras.Input((4,)), *inner, L.Dense(sizes[-1], name="out", **last)], name="net")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (Subclassed, "is a Subclassed, neither functional nor Sequential"),
        (lambda: keras.Sequential([L.Dense(3)], name="late"), "'late' is not built.*Add keras.Input"),
        (two_outputs, "one output tensor"),
        (lambda: OwnCall(*(lambda i: (i, L.Dense(2)(i)))(keras.Input((3,)))), "OwnCall with a call.. of its own"),
        (lambda: 3, "is a int, neither"),
    ],
)
def test_models_that_cannot_be_read(base: Any, message: str) -> None:
    with pytest.raises((TraceError, LayoutError), match=message):
        mk.convert(base(), 4, 2.0, task="classification")


def test_channels_first_is_an_error() -> None:
    inputs = keras.Input((3, 8, 8))
    x = L.Conv2D(4, 3, data_format="channels_first", name="cf")(inputs)
    base = keras.Model(inputs, L.Dense(2, activation="softmax")(L.Flatten()(x)))
    with pytest.raises(MasksurgeryError, match=r"'cf' \(Conv2D\) has data_format='channels_first'"):
        mk.convert(base, 4, 2.0)


@pytest.mark.parametrize(
    ("base", "settings", "message"),
    [
        (lambda: dense(5, 3), {}, "without a softmax or sigmoid.*Pass task="),
        (lambda: dense(5, 3), {"task": "classes"}, "task='classes' is not one of"),
        (lambda: dense(5, 3, activation="softmax"), {"task": "multilabel"}, "probabilities of task='classification'"),
        (lambda: dense(5, 1), {"task": "classification"}, "one class"),
        (lambda: dense(3, activation="softmax"), {}, "No layer of 'net' can be masked. out: output layer"),
        (lambda: dense(5, 3, activation="softmax"), {"include": ["d1"]}, "include: 'd1' matches no layer.*d0"),
        (lambda: dense(5, 3, activation="softmax"), {"exclude": ["*"]}, "leaves nothing of the 2 layers"),
        (lambda: dense(5, 3, activation="softmax"), {"include": [3]}, "include holds 3"),
        (lambda: dense(5, 3, activation="softmax"), {"n": 0}, "n=0 is not a number of members"),
        (lambda: dense(1, 3, activation="softmax"), {"include": ["d0"]}, "cannot be masked: single"),
        (lambda: keras.Sequential([keras.Input((4,)), L.ReLU(name="r")], name="m"), {"task": "regression"},
         "'m' has no convolution and no Dense. Its layers are r"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(base: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MasksurgeryError, match=message):
        mk.convert(base(), **settings)


def test_what_comes_last_must_be_known() -> None:
    inputs = keras.Input((4,))
    x = L.Dense(6, activation="relu")(inputs)
    base = keras.Model(inputs, L.Lambda(keras.ops.softmax)(L.Dense(3, name="out")(x)))
    with pytest.raises(MasksurgeryError, match="from_logits=True or False"):
        mk.convert(base, task="classification")
    model = mk.convert(base, task="classification", from_logits=False)
    (skip,) = model.surgery.skipped  # a mask would have to be followed through the Lambda
    assert skip.layer == "out" and skip.reason.startswith("unknown: no rule follows channels through 'lambda")


def test_a_mean_of_two_heads_is_probabilities_if_one_says_so() -> None:
    inputs = keras.Input((4,))
    x = L.Dense(6, activation="relu", name="hidden")(inputs)
    heads = [L.Dense(3, activation="softmax", name=name)(x) for name in ("one", "two")]
    base = keras.Model(inputs, L.Average()(heads))
    randomise(base)
    with pytest.raises(MasksurgeryError, match=r"'average.*' \(Average\) does.*from_logits=True or False"):
        mk.convert(base, task="classification")
    model = mk.convert(base, 3, task="classification", from_logits=False)
    assert [site.layer for site in model.surgery.sites] == ["hidden"]
    assert model.surgery.output_layers == ("one", "two")
    assert check_members(base, model, inputs_of(base, rows=3)) < TOLERANCE


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        (lambda x: L.Softmax()(x), ("classification", False)),
        (lambda x: L.Activation("linear", dtype="float32")(keras.ops.softmax(x)), ("classification", False)),
        (lambda x: L.Reshape((3, 1))(L.Activation("sigmoid")(x)), ("multilabel", False)),
        (lambda x: keras.ops.sigmoid(x), ("multilabel", False)),
        (lambda x: keras.ops.relu6(x + 3.0) / 6.0, ("multilabel", False)),
        (lambda x: x / 2.0, None),
    ],
)
def test_the_task_is_read_from_the_last_activation(last: Any, expected: Any) -> None:
    inputs = keras.Input((4,))
    base = keras.Model(inputs, last(L.Dense(3, name="out")(L.Dense(6, activation="relu", name="hidden")(inputs))))
    if expected is None:
        with pytest.raises(MasksurgeryError, match=r"without a softmax or sigmoid.*Pass task="):
            mk.convert(base)
    else:
        model = mk.convert(base)
        assert (model.task, model.from_logits) == expected
        assert [site.layer for site in model.surgery.sites] == ["hidden"]


@pytest.mark.parametrize(
    ("last", "seen"),
    [
        (lambda x: L.Softmax(axis=1, name="end")(x), r"'end' \(Softmax\)"),
        (lambda x: L.UpSampling2D(2, name="end")(L.Softmax()(x)), r"'end' \(UpSampling2D\)"),
        (lambda x: L.GlobalAveragePooling2D(name="end")(L.Softmax()(x)), r"'end' \(GlobalAveragePooling2D\)"),
        (lambda x: L.Dropout(0.1)(L.Reshape((16, 3, 1), name="end")(L.Softmax()(x))), r"'end' \(Reshape\)"),
        (lambda x: L.Lambda(lambda y: y, name="end")(x), r"'end' \(Lambda\)"),
    ],
)
def test_what_hides_the_last_activation_is_named(last: Any, seen: str) -> None:
    inputs = keras.Input((4, 4, 2))
    x = L.Conv2D(6, 3, padding="same", activation="relu", name="hidden")(inputs)
    base = keras.Model(inputs, last(L.Conv2D(3, 1, name="out")(x)), name="net")
    for settings in ({}, {"task": "classification"}):
        with pytest.raises(ConfigError, match=f"^In 'net' it is not known what {seen} does to the classes.*Pass task="):
            mk.convert(base, **settings)
    model = mk.convert(base, task="multilabel", from_logits=False)
    assert [site.layer for site in model.surgery.sites] == ["hidden"]
    assert mk.convert(base, task="regression").task == "regression"


class Forgetful(L.Dense):
    def __init__(self, size: int) -> None:
        super().__init__(size, activation="relu")

    def get_config(self) -> dict[str, Any]:
        return {"other": 1}


def test_a_layer_that_cannot_be_made_again_is_named() -> None:
    inputs = keras.Input((4,))
    layer = Forgetful(5)
    layer.name = "own"
    base = keras.Model(inputs, L.Dense(3, activation="softmax")(layer(inputs)))
    with pytest.raises(MasksurgeryError, match=r"'own' \(Forgetful\) cannot be made again from its get_config"):
        mk.convert(base)

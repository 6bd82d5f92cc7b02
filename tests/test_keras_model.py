"""A converted Keras model: training through one member, the dict of predictions, losses and metrics, files."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers as L
from keras import ops

import masksurgery
import masksurgery.keras as mk
from keras_nets import NETS, check_members, inputs_of, randomise, to_numpy
from masksurgery.keras.head import aggregate
from masksurgery.keras.layers import Members


def classifier(*, last: str | None = "softmax", classes: int = 3, policy: str | None = None) -> keras.Model:
    hidden = [L.Dense(16, activation="relu", name="a", dtype=policy), L.Dense(12, "tanh", name="b", dtype=policy)]
    base = keras.Sequential([keras.Input((6,)), *hidden, L.Dense(classes, last, name="out", dtype=policy)])
    randomise(base)
    return base


# --- which member ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["called_twice", "late_sum", "tokens"])
def test_a_row_in_training_is_that_of_its_member(name: str) -> None:
    net = NETS[name]()
    randomise(net.model)
    model = mk.convert(net.model, 3, 2.0, **net.settings)
    x, members = inputs_of(net.model, rows=5), [2, 0, 1, 1, 2]
    everyone = to_numpy(model(x)["members"])
    model.get_layer("members").fixed = members
    np.testing.assert_allclose(to_numpy(model(x, training=True)), everyone[range(5), members], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_groups_are_near_equal_and_every_member_gets_its_share(n: int) -> None:
    layer = Members(n)
    for batch in range(1, 10):
        members, samples = (to_numpy(x) for x in layer(ops.zeros((batch, 2)), training=True))
        counts = Counter(members.tolist())
        assert len(members) == batch and all(counts[i] in (batch // n, -(-batch // n)) for i in range(n))
        assert samples.tolist() == list(range(batch))
    single = Counter(int(to_numpy(layer(ops.zeros((1, 2)), training=True)[0])[0]) for _ in range(120 * n))
    assert sorted(single) == list(range(n)) and all(80 < count < 160 for count in single.values())


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_all_members_stand_one_after_another(batch: int) -> None:
    members, samples = (to_numpy(x).tolist() for x in Members(3)(ops.zeros((batch, 2))))
    assert members == [i for i in range(3) for _ in range(batch)]
    assert samples == list(range(batch)) * 3


def test_a_nan_in_one_sample_reaches_no_other() -> None:
    net = NETS["resnet_logits"]()
    randomise(net.model)
    model = mk.convert(net.model, 3, 2.0, task="classification")
    x = inputs_of(net.model, rows=4)
    clean = to_numpy(model(x))
    x[2] = np.nan
    for key, value in to_numpy(model(x)).items():
        assert np.isnan(value[2]).all(), key
        np.testing.assert_allclose(value[[0, 1, 3]], clean[key][[0, 1, 3]], rtol=1e-4, atol=1e-5)


# --- predictions -----------------------------------------------------------------------------------------------------


def plogp(p: np.ndarray) -> np.ndarray:
    return -p * np.log(p)


@pytest.mark.parametrize("task", ["classification", "multilabel"])
@pytest.mark.parametrize("from_logits", [False, True])
def test_predictions_by_their_definitions(task: str, from_logits: bool) -> None:
    z = np.random.default_rng(0).normal(size=(4, 3, 5)).astype("float64")  # members, samples, classes
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True) if task == "classification" else 1 / (1 + np.exp(-z))
    rows = (z if from_logits else p).reshape(12, 5).astype("float32")
    found = to_numpy(aggregate(ops.convert_to_tensor(rows), 4, task, from_logits))
    mean = p.mean(0)
    if task == "classification":
        entropy, expected, logits = plogp(mean).sum(-1), plogp(p).sum(-1).mean(0), np.log(mean)
    else:
        entropy = plogp(mean) + plogp(1 - mean)
        expected, logits = (plogp(p) + plogp(1 - p)).mean(0), np.log(mean / (1 - mean))
    wanted = {
        "mean": mean, "variance": p.var(0), "logits": logits, "entropy": entropy,
        "mutual_information": entropy - expected, "members": (z if from_logits else p).swapaxes(0, 1),
    }  # fmt: skip
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


def test_certain_probabilities_give_finite_predictions() -> None:
    rows = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], "float32")
    for task in ("classification", "multilabel"):
        found = to_numpy(aggregate(ops.convert_to_tensor(rows), 2, task, False))
        assert all(np.isfinite(value).all() for value in found.values())
        assert found["mean"].tolist() == [[0.5, 0.5], [1.0, 0.0]]
        np.testing.assert_allclose(found["mutual_information"].reshape(2, -1)[0], np.log(2), rtol=1e-5)
        np.testing.assert_allclose(found["entropy"].reshape(2, -1)[1], 0, atol=1e-6)


def test_regression_gives_mean_and_variance() -> None:
    base = classifier(last=None, classes=2)
    model = mk.convert(base, 3, 2.0, task="regression")
    found = model.predict(inputs_of(base, rows=5), batch_size=2, verbose=0)
    assert found.keys() == {"mean", "variance", "members"} and found["members"].shape == (5, 3, 2)
    np.testing.assert_allclose(found["mean"], found["members"].mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["variance"], found["members"].var(1), rtol=1e-4, atol=1e-6)


def test_sizes_may_differ_from_batch_to_batch() -> None:
    inputs = keras.Input((None, None, 2))
    x = L.Conv2D(6, 3, padding="same", activation="relu")(inputs)
    model = mk.convert(keras.Model(inputs, L.Conv2D(3, 1, activation="softmax")(x)), 3, 2.0)
    for size in (4, 2, 3):  # the second one makes TensorFlow leave the size open
        found = model.predict(np.ones((5, size, size + 1, 2)), verbose=0)
        assert found["mean"].shape == (5, size, size + 1, 3) and found["members"].shape == (5, 3, size, size + 1, 3)
        np.testing.assert_allclose(found["mean"].sum(-1), 1, rtol=1e-5)


def test_augmentation_and_recurrent_layers_go_along() -> None:
    augment = keras.Sequential([L.RandomFlip("horizontal"), L.RandomZoom(0.1)], name="augment")
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(6, 3, activation="relu", name="conv")(L.Rescaling(0.5)(augment(inputs)))
    x = L.TimeDistributed(L.Dense(6, activation="relu"))(L.Reshape((6, 36))(x))
    base = keras.Model(inputs, L.Dense(3, activation="softmax", name="out")(L.Bidirectional(L.GRU(4))(x)))
    randomise(base)
    model = mk.convert(base, 3, 2.0)
    assert [site.layer for site in model.surgery.sites] == ["conv"]
    assert check_members(base, model, inputs_of(base, rows=3)) < 5e-5


def test_half_precision_is_raised_in_the_head() -> None:
    base = classifier(policy="mixed_bfloat16")
    found = mk.convert(base, 3, 2.0)(inputs_of(base, rows=5))
    assert {keras.backend.standardize_dtype(value.dtype) for value in found.values()} == {"float32"}
    mean = to_numpy(found["mean"])
    assert np.abs(mean.sum(1) - 1).max() < 2e-2


@pytest.fixture
def policy() -> Iterator[Callable[[str], None]]:
    """Sets the global policy, until the test ends."""
    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)


def loud(dtype: str) -> keras.Model:
    """Values that float16 cannot hold, in masks and in a repeat."""
    inputs = keras.Input((6,), name="x", dtype=dtype)
    x = L.Rescaling(1e5, name="large")(inputs)
    hidden = L.Dense(16, activation="relu", name="hidden")(x)
    x = L.Concatenate()([hidden, L.Dense(6, name="other")(hidden), x])
    return keras.Model(inputs, L.Dense(2, name="out")(L.Rescaling(1e-5, name="small")(x)))


@pytest.mark.parametrize(("own", "when_converted"), [("float32", "mixed_float16"), ("float64", "float32")])
def test_a_net_keeps_its_precision_under_another_policy(policy: Any, own: str, when_converted: str) -> None:
    if own == "float64" and keras.backend.backend() == "jax":
        pytest.skip("JAX has no float64 unless all of the process has it")
    policy(own)
    base = loud(own)
    randomise(base)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(own)
    expected = to_numpy(base(x))
    policy(when_converted)
    found = mk.convert(base, 2, 1.0, task="regression")(x)
    assert {keras.backend.standardize_dtype(value.dtype) for value in found.values()} == {own}
    epsilon = np.finfo(own).eps
    np.testing.assert_allclose(to_numpy(found["mean"]), expected, rtol=200 * epsilon, atol=200 * epsilon)
    model = mk.convert(base, 3, 2.0, task="regression")
    assert check_members(base, model, x) < 100 * epsilon
    assert keras.config.dtype_policy().name == when_converted


def test_a_float32_layer_in_a_net_of_half_precision_is_not_rounded(policy: Any) -> None:
    policy("mixed_float16")
    inputs = keras.Input((6,), name="x")
    x = L.Dense(16, activation="relu", name="hidden", dtype="float32")(L.Dense(8, name="half")(inputs))
    x = L.Concatenate(dtype="float32")([x, L.Rescaling(1 / 3, dtype="float32", name="third")(inputs)])
    base = keras.Model(inputs, L.Dense(2, name="out", dtype="float32")(x))
    randomise(base)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    one = mk.convert(base, 2, 1.0, task="regression", include=["hidden"])
    np.testing.assert_allclose(to_numpy(one(x)["mean"]), to_numpy(base(x)), rtol=1e-5, atol=1e-6)
    half = mk.convert(base, 2, 1.0, task="regression")
    dtypes = {name: half.get_layer(name).compute_dtype for name in ("half_mask", "hidden_mask")}
    assert dtypes == {"half_mask": "float16", "hidden_mask": "float32"}


def test_large_integers_reach_the_members(policy: Any) -> None:
    policy("mixed_float16")
    numbers, inputs = keras.Input((3,), dtype="int32", name="numbers"), keras.Input((6,), name="x")
    x = L.Dense(15, activation="relu", name="hidden")(inputs)
    x = L.Concatenate()([L.Reshape((3, 5))(x), L.Embedding(5000, 4, name="table")(numbers)])
    base = keras.Model({"numbers": numbers, "x": inputs}, L.Dense(2, name="out", dtype="float32")(L.Flatten()(x)))
    randomise(base)
    given = {"numbers": np.array([[4097, 2049, 4999], [1, 4095, 3]], "int32"), "x": np.ones((2, 6), "float32")}
    found = mk.convert(base, 2, 1.0, task="regression", include=["hidden"])(given)
    np.testing.assert_allclose(to_numpy(found["mean"]), to_numpy(base(given)), rtol=2e-3, atol=2e-3)


# --- fit, evaluate, predict ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("from_logits", [False, True])
def test_fit_and_evaluate_with_the_loss_of_the_base(from_logits: bool) -> None:
    base = classifier(last=None if from_logits else "softmax")
    x, y = inputs_of(base, rows=13), np.arange(13) % 3
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
    kept = [to_numpy(w) for w in base.weights]
    model = mk.convert(base, 4, 2.0, task="classification")
    assert model.from_logits == from_logits
    model.compile("adam", loss, metrics=["accuracy"])
    history = model.fit(x, y, batch_size=4, epochs=2, validation_data=(x, y), verbose=0).history
    assert {"loss", "accuracy", "val_loss", "val_accuracy"} <= history.keys()
    mean = model.predict(x, batch_size=5, verbose=0)["mean"]
    found = model.evaluate(x, y, batch_size=13, verbose=0, return_dict=True)
    assert found["loss"] == pytest.approx(-np.log(mean[range(13), y]).mean(), rel=1e-4)
    assert found["accuracy"] == pytest.approx((mean.argmax(1) == y).mean())
    assert all(np.array_equal(a, to_numpy(b)) for a, b in zip(kept, base.weights, strict=True))
    assert not np.array_equal(to_numpy(model.get_layer("a").kernel), kept[0])


@pytest.mark.parametrize("last", ["softmax", None])
def test_padding_counts_as_in_the_base(last: str | None) -> None:
    inputs = keras.Input((None,), dtype="int32")
    x = L.LSTM(6, return_sequences=True)(L.Embedding(7, 5, mask_zero=True)(inputs))
    x = L.Dense(8, activation="relu", name="hidden")(x)
    base = keras.Model(inputs, L.Dense(3, last, name="out")(x))
    randomise(base)
    rng = np.random.default_rng(0)
    x, y = rng.integers(1, 7, (5, 4)), rng.integers(0, 3, (5, 4))
    x[0, 1:] = x[2, 3:] = x[3, 2:] = 0  # padding
    model = mk.convert(base, 2, 1.0, task="classification")
    found = []
    for net in (base, model):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=last is None)
        net.compile(keras.optimizers.SGD(0.0), loss, metrics=["accuracy"])
        fit = net.fit(x, y, batch_size=3, shuffle=False, validation_data=(x, y), validation_batch_size=3, verbose=0)
        seen = {f"fit {key}": value for key, (value,) in fit.history.items()}
        found.append(seen | net.evaluate(x, y, batch_size=3, verbose=0, return_dict=True))
    assert {"fit loss", "fit val_loss", "fit val_accuracy", "loss", "accuracy"} <= found[0].keys()
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_batches_smaller_than_n_train_every_member() -> None:
    base = classifier(last="sigmoid", classes=1)
    model = mk.convert(base, 4, 3.0)
    assert (model.task, model.from_logits) == ("multilabel", False)
    model.compile(keras.optimizers.Adam(0.05), "binary_crossentropy")
    x = inputs_of(base, rows=16)
    y = (x[:, 0] > 0).astype("float32")[:, None]
    before = model.evaluate(x, y, verbose=0)
    model.fit(x, y, batch_size=1, epochs=6, verbose=0)
    assert model.evaluate(x, y, verbose=0) < before


def test_frozen_batch_norm_stays_and_dropout_acts_in_training_only() -> None:
    keras.utils.set_random_seed(0)  # two draws of a dropout may be the same
    net = NETS["nested"]()
    randomise(net.model)
    model = mk.convert(net.model, 3, 2.0)
    x = inputs_of(net.model, rows=6)
    model.get_layer("members").fixed = [0, 1, 2, 0, 1, 2]
    one, two = (to_numpy(model(x, training=True)) for _ in range(2))
    assert np.abs(one - two).max() > 1e-4  # dropout
    assert np.array_equal(to_numpy(model(x)["mean"]), to_numpy(model(x)["mean"]))
    model.get_layer("members").fixed = None
    frozen = [to_numpy(w) for w in model.get_layer("back_conv_bn").weights]
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.fit(x, np.arange(6) % 4, batch_size=3, verbose=0)
    assert all(
        np.array_equal(a, to_numpy(b)) for a, b in zip(frozen, model.get_layer("back_conv_bn").weights, strict=True)
    )


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_new_process_predicts_the_same(tmp_path: Path) -> None:
    net = NETS["nested"]()
    randomise(net.model)
    model = mk.convert(net.model, 3, 2.0, seed=5)
    site = model.surgery.sites[1]
    masks = to_numpy(model.get_layer(site.mask).masks)
    model.get_layer(site.mask).masks.assign(masks[[1, 2, 0]])  # not those that the seed gives: the file's
    x = inputs_of(net.model, rows=4)
    np.save(tmp_path / "x.npy", x)
    wanted = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    code = (
        "import keras, numpy as np, masksurgery.keras\n"
        "model = keras.models.load_model('model.keras')\n"
        "np.savez('found.npz', **model.predict(np.load('x.npy'), verbose=0))\n"
        "print(model.describe())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    assert sorted(found) == sorted(wanted)
    assert all(np.allclose(found[key], value, atol=1e-6) for key, value in wanted.items())
    assert model.describe() in done.stdout
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.surgery == model.surgery and isinstance(loaded, mk.ConvertedModel)
    assert (loaded.task, loaded.from_logits) == (model.task, model.from_logits)


def test_weights_alone_bring_their_masks(tmp_path: Path) -> None:
    base = classifier()
    one, other = (mk.convert(base, 3, 2.0, seed=seed) for seed in (0, 1))
    x = inputs_of(base, rows=4)
    assert np.abs(to_numpy(one(x)["mean"]) - to_numpy(other(x)["mean"])).max() > 1e-4
    one.save_weights(tmp_path / "one.weights.h5")
    other.load_weights(tmp_path / "one.weights.h5")
    np.testing.assert_allclose(to_numpy(other(x)["mean"]), to_numpy(one(x)["mean"]), atol=1e-6)


def test_describe() -> None:
    model = mk.convert(classifier(), 4, 2.0, seed=2)
    assert model.describe().splitlines() == [
        "4 members, scale 2, seed 2: 2 masks",
        "  a: 8 of 16 channels, after a",
        "  b: 6 of 12 channels, after b",
        "not masked: 1",
        "  out: output layer: its channels reach the model's output with no convolution or Dense in between",
    ]
    assert masksurgery.Surgery(**vars(model.surgery)) == model.surgery


def test_it_is_no_part_of_another_functional_model() -> None:
    model = mk.convert(classifier(), 4, 2.0)
    with pytest.raises(ValueError, match="cannot be part of another functional model"):
        model(keras.Input((6,)))


def test_a_class_of_ones_own_is_noted() -> None:
    class Own(keras.Model):
        def train_step(self, data: Any) -> Any:
            return super().train_step(data)

    inputs = keras.Input((4,))
    base = Own(inputs, L.Dense(2, activation="softmax")(L.Dense(4)(inputs)))
    model = mk.convert(base)
    assert "Own is a class of its own: its train_step and other methods are not taken over." in model.describe()

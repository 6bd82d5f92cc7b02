"""The Keras layers: the masks of the torch layers, the members' rows, files, and what they refuse."""

from __future__ import annotations

import doctest
import random
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers as L
from keras import ops

import masksurgery
import masksurgery.keras as mk
from keras_nets import to_numpy
from masksurgery.types import ConfigError, MaskError

KINDS = {2: mk.Masksembles1D, 3: mk.Masksembles1D, 4: mk.Masksembles2D, 5: mk.Masksembles3D}
TORCH = {2: masksurgery.Masksembles1D, 3: masksurgery.Masksembles1D, 4: masksurgery.Masksembles2D}
TORCH[5] = masksurgery.Masksembles3D
C = 10


def shape_of(rank: int, rows: int) -> tuple[int, ...]:
    return (rows, *(2, 3, 2)[: rank - 2], C)


@pytest.mark.parametrize("rank", KINDS)
@pytest.mark.parametrize(("n", "scale", "seed"), [(4, 2.0, 0), (3, 1.5, [1, 2]), (1, 2.0, 5)])
@pytest.mark.parametrize("rescale", [False, True])
def test_masks_and_outputs_are_those_of_the_torch_layers(
    rank: int, n: int, scale: float, seed: Any, rescale: bool
) -> None:
    layer = KINDS[rank](n, scale, rescale=rescale, seed=seed)
    other = TORCH[rank](C, n, scale, channel_dim=-1, rescale=rescale, seed=seed)
    for rows in (1, n, 2 * n, 7, 9):
        x = np.random.default_rng(rows).normal(size=shape_of(rank, rows)).astype("float32")
        np.testing.assert_allclose(to_numpy(layer(x)), other(torch.from_numpy(x)).numpy(), rtol=1e-6, atol=0)
    assert np.array_equal(to_numpy(layer.masks), masksurgery.generate_masks(C, n, scale, seed=seed))
    assert np.array_equal(to_numpy(layer.masks), other.masks.numpy())


def test_readme_example_of_the_reference() -> None:
    y = to_numpy(mk.Masksembles1D(4, 2.0)(ops.ones((4, 10))))
    assert y.shape == (4, 10) and y.dtype == np.float32
    assert y.sum(1).tolist() == [5.0] * 4 and y.any(0).all()


def test_rows_can_be_given_members() -> None:
    layer = mk.Masksembles2D(4, 2.0, seed=0)
    y = to_numpy(layer(ops.ones(shape_of(4, 5)), members=ops.convert_to_tensor([3, 0, 0, 1, 3])))
    assert np.array_equal(y[:, 0, 0], to_numpy(layer.masks)[[3, 0, 0, 1, 3]].astype("float32"))


def test_no_rows() -> None:
    assert mk.Masksembles1D(4, 2.0)(ops.ones((0, 10))).shape == (0, 10)


def test_fresh_entropy_by_default_and_no_global_state() -> None:
    numpy_state, python_state = np.random.get_state()[1].copy(), random.getstate()

    def masks(**seed: int) -> np.ndarray:
        layer = mk.Masksembles1D(4, 2.0, **seed)
        layer.build((None, 1000))
        return to_numpy(layer.masks)

    assert not np.array_equal(masks(), masks())
    assert np.array_equal(masks(seed=3), masks(seed=3)) and not np.array_equal(masks(seed=3), masks(seed=4))
    assert np.array_equal(np.random.get_state()[1], numpy_state) and random.getstate() == python_state


@pytest.mark.parametrize("seed", [None, 7, [1, 2]])
def test_config_round_trip(seed: Any) -> None:
    layer = mk.Masksembles2D(4, 2.5, rescale=True, seed=seed, name="m", dtype="float16")
    config = keras.saving.serialize_keras_object(layer)
    again = keras.saving.deserialize_keras_object(config)
    assert type(again) is mk.Masksembles2D and config["registered_name"] == "masksurgery>Masksembles2D"
    assert again.get_config() == layer.get_config()
    assert (again.n, again.scale, again.rescale, again.name) == (4, 2.5, True, "m")
    assert again.get_config()["seed"] == seed and again.compute_dtype == "float16"


def reference_model() -> keras.Sequential:
    """The example of the reference package's README, on digits."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)), L.Conv2D(8, 3, activation="elu"), mk.Masksembles2D(4, 2.0), L.MaxPooling2D(),
            L.Conv2D(8, 2, activation="elu"), mk.Masksembles2D(4, 2.0), L.Flatten(), mk.Masksembles1D(4, 2.0),
            L.Dense(10, activation="softmax"),
        ]
    )  # fmt: skip


def test_sequential_of_the_reference_trains_and_its_files_hold_the_masks(tmp_path: Path) -> None:
    model = reference_model()
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    x = np.random.default_rng(0).normal(size=(22, 8, 8, 1)).astype("float32")
    masks = [to_numpy(w) for w in model.non_trainable_weights]
    assert [m.dtype for m in masks] == [np.bool_] * 3 and len(model.trainable_weights) == 6
    before = to_numpy(model.trainable_weights[0])
    model.fit(x, np.arange(22) % 10, batch_size=8, epochs=1, verbose=0)
    assert not np.array_equal(before, to_numpy(model.trainable_weights[0]))
    assert all(np.array_equal(a, to_numpy(b)) for a, b in zip(masks, model.non_trainable_weights, strict=True))
    wanted = model.predict(x, batch_size=8, verbose=0)
    assert wanted.shape == (22, 10)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(x, batch_size=8, verbose=0), wanted, atol=1e-6)
    model.save_weights(tmp_path / "model.weights.h5")
    other = reference_model()
    assert np.abs(other.predict(x, batch_size=8, verbose=0) - wanted).max() > 1e-3
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(other.predict(x, batch_size=8, verbose=0), wanted, atol=1e-6)


def test_the_examples_in_the_docstrings_show_what_is_so() -> None:
    finder, told, run = doctest.DocTestFinder(exclude_empty=True), [], set()
    for name in ("layers", "convert"):
        module = import_module(f"masksurgery.keras.{name}")
        for example in finder.find(module, globs={"keras": keras, "mk": mk, "np": np}):
            doctest.DocTestRunner().run(example, out=told.append)
            run |= {example.name.rpartition(".")[2]} if example.examples else set()
    assert run == {"Masksembles1D", "Masksembles2D", "Masksembles3D", "convert"}
    assert not told, "".join(told)


@pytest.mark.parametrize("policy", ["float16", "mixed_bfloat16", "float64"])
def test_dtype_policies(policy: str) -> None:
    layer = mk.Masksembles1D(4, 2.0, rescale=True, seed=0, dtype=policy)
    y = layer(np.ones((4, C), "float32"))
    expected = {"mixed_bfloat16": "bfloat16", "float64": "float32" if keras.backend.backend() == "jax" else "float64"}
    assert keras.backend.standardize_dtype(y.dtype) == expected.get(policy, policy)
    assert np.array_equal(to_numpy(ops.cast(y, "float32")), 2.0 * to_numpy(layer.masks))


def test_time_steps_that_are_padding_stay_masked() -> None:
    inputs = keras.Input((4,), dtype="int32")
    x = mk.Masksembles1D(2, 2.0)(L.Embedding(5, 6, mask_zero=True)(inputs))
    lengths = L.LSTM(3, return_sequences=False)(x)
    model = keras.Model(inputs, lengths)
    padded, same = np.array([[1, 2, 0, 0]] * 2), np.array([[1, 2, 0, 0]] * 2)
    same[:, 2:] = 0
    one = model.predict(padded, verbose=0)
    model.get_layer(index=1).embeddings.assign(
        np.concatenate([np.full((1, 6), 9.0), to_numpy(model.get_layer(index=1).embeddings)[1:]])
    )
    assert np.array_equal(one, model.predict(same, verbose=0))  # what the padding is embedded as does not matter


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: mk.Masksembles1D(0, 2.0), MaskError, "n=0 is not a number of members"),
        (lambda: mk.Masksembles1D(4, 0.5), MaskError, "scale=0.5 is not a finite number of at least 1"),
        (lambda: mk.Masksembles2D(4, 2.0, data_format="channels_first"), ConfigError, "only 'channels_last'"),
        (lambda: mk.Masksembles2D(4, 2.0).build((None, 10)), MaskError, "has 2 dimensions, not 4"),
        (lambda: mk.Masksembles3D(4, 2.0).build((None, 3, 3, 10)), MaskError, "has 4 dimensions, not 5"),
        (lambda: mk.Masksembles1D(4, 2.0).build((10,)), MaskError, "has 1 dimensions, not 2 or more"),
        (lambda: mk.Masksembles1D(4, 2.0).build((None, None)), MaskError, "does not say how many channels"),
        (lambda: mk.Masksembles1D(4, 2.0, seed=np.random.default_rng()), MaskError, "cannot be saved with the layer"),
        (lambda: mk.Masksembles1D(4, 2.0, seed=-1).build((None, 10)), MaskError, "seed=-1 is not what"),
    ],
)
def test_errors(make: Any, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


def test_channels_first_as_the_setting_of_keras_is_an_error() -> None:
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(ConfigError, match="data_format='channels_first'"):
            mk.Masksembles2D(4, 2.0)
        mk.Masksembles2D(4, 2.0, data_format="channels_last")
        mk.Masksembles1D(4, 2.0)
    finally:
        keras.config.set_image_data_format("channels_last")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "message"),
    [("keras", 'pip install "masksurgery[keras]"'), ("tensorflow", "set the environment variable KERAS_BACKEND")],
)
def test_what_is_not_installed_is_named(missing: str, message: str) -> None:
    code = f"import os, sys; os.environ['KERAS_BACKEND'] = 'tensorflow'; sys.modules[{missing!r}] = None"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; import masksurgery.keras"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1] and "ConfigError" in done.stderr

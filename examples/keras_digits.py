"""Keras 3, scikit-learn's 8x8 digits: mask layers put in by hand, and a trained model that one line makes an ensemble.

`pip install "masksurgery[keras]"` brings what it needs. Another backend: KERAS_BACKEND=jax python keras_digits.py
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")  # which masksurgery brings

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

import masksurgery.keras as mk

N = 4
x, y = load_digits().images[..., None].astype("float32") / 16, load_digits().target
unseen = x[1200:, ::-1]  # digits upside down


def build(mask_2d=lambda: layers.Identity(), mask_1d=lambda: layers.Identity()) -> keras.Sequential:
    blocks = [layers.Conv2D(32, 3, activation="elu"), mask_2d(), layers.Conv2D(64, 3, activation="elu"), mask_2d()]
    head = [layers.MaxPooling2D(), layers.Flatten(), mask_1d(), layers.Dense(10, activation="softmax")]
    return keras.Sequential([keras.Input((8, 8, 1)), *blocks, *head])


def fit(model: keras.Model, epochs: int) -> None:
    model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy")
    model.fit(x[:1200], y[:1200], batch_size=64, epochs=epochs, verbose=0)


def members_by_hand(model: keras.Model, images: np.ndarray) -> np.ndarray:
    """Every image n times, in one batch: its first part is member 0's."""
    p = model.predict(np.concatenate([images] * N), batch_size=N * len(images), verbose=0)
    return p.reshape(N, len(images), 10).swapaxes(0, 1)


def measure(members, others) -> list[float]:
    """Accuracy, NLL, and how far the members [b, n, 10] disagree on digits and on what none of them has seen."""
    mean = members.mean(1)
    nll = -np.log(mean[np.arange(len(mean)), y[1200:]] + 1e-12).mean()
    return [(mean.argmax(1) == y[1200:]).mean(), nll, *(p.std(1).mean() for p in (members, others))]


def main() -> dict[str, list[float]]:
    keras.utils.set_random_seed(0)
    base = build()
    fit(base, epochs=20)
    by_hand = build(lambda: mk.Masksembles2D(N, 2.0, seed=0), lambda: mk.Masksembles1D(N, 2.0, seed=0))
    fit(by_hand, epochs=20)
    model = mk.convert(base, n=N, scale=2.0)  # the one line
    fit(model, epochs=10)
    return {
        "base": measure(*(base.predict(images, verbose=0)[:, None] for images in (x[1200:], unseen))),
        "layers by hand": measure(*(members_by_hand(by_hand, images) for images in (x[1200:], unseen))),
        "converted": measure(*(model.predict(images, verbose=0)["members"] for images in (x[1200:], unseen))),
    }


def show(result: dict[str, list[float]]) -> None:
    print(f"{'':16} accuracy    NLL   disagreement: digits  upside down")
    for name, (accuracy, nll, seen, upside_down) in result.items():
        print(f"{name:16} {accuracy:8.3f} {nll:6.3f} {seen:22.4f} {upside_down:12.4f}")


if __name__ == "__main__":
    show(main())

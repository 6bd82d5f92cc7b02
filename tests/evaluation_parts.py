"""Pictures, curves and galleries of evaluations that are made by hand."""

import io
import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_digits

from masksurgery.evaluation import Curve, Histogram, Reliability, Sample, Vote

# --- pictures --------------------------------------------------------------------------------------------------------


def encode(pixels: np.ndarray, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


@cache
def digit(k: int) -> bytes:
    """An 8 by 8 digit, enlarged to 96 by 96."""
    return encode(np.kron((load_digits().images[k] * 15).astype(np.uint8), np.ones((12, 12), np.uint8)))


@cache
def photo(k: int) -> bytes:
    """A part of a photo, 128 by 96."""
    whole = (data.astronaut, data.chelsea, data.coffee, data.rocket)[k % 4]()
    height, width = whole.shape[:2]
    part = Image.fromarray(whole[height // 8 :, width * (k // 4) // 8 :]).resize((128, 96))
    return encode(np.asarray(part), "JPEG")


@cache
def noise(k: int) -> bytes:
    return encode(np.random.default_rng(k).integers(0, 256, (96, 128, 3), dtype=np.uint8), "JPEG")


# --- curves ----------------------------------------------------------------------------------------------------------


def reliability(rng: np.random.Generator, surer: float, bins: int = 15) -> Reliability:
    """The confidence exceeds the accuracy by `surer` at most; the lowest bins are empty."""
    confidence = (np.arange(bins) + 0.5) / bins
    accuracy = np.clip(confidence - surer * np.sin(np.pi * confidence) + rng.normal(0, 0.02, bins), 0, 1)
    shares = np.where(np.arange(bins) < 3, 0, np.exp(5 * confidence))
    empty = [k < 3 for k in range(bins)]
    return Reliability(
        tuple(None if e else float(c) for c, e in zip(confidence, empty, strict=True)),
        tuple(None if e else float(a) for a, e in zip(accuracy, empty, strict=True)),
        tuple((shares / shares.sum()).tolist()),
    )


def risk_coverage(risk: float) -> Curve:
    x = np.linspace(0.005, 1, 200)
    return Curve(tuple(x.tolist()), tuple((risk * x**3 * (1 + 0.02 * np.sin(60 * x))).tolist()))


def histogram(mean: float, end: float) -> Histogram:
    edges = np.linspace(0, end, 41)
    shares = np.exp(-(((edges[:-1] + end / 80) / end - mean) ** 2) / 0.04)
    return Histogram(tuple(edges.tolist()), tuple((shares / shares.sum()).tolist()))


def roc(auroc: float) -> Curve:
    x = np.linspace(0, 1, 200)
    return Curve(tuple(x.tolist()), tuple((x ** (1 / auroc - 1)).tolist()))


# --- galleries -------------------------------------------------------------------------------------------------------


def gallery(
    rng: np.random.Generator,
    picture: Callable[[int], bytes],
    labels: Sequence[str],
    n: int,
    *,
    count: int = 8,
    unknown: bool = False,
    sure: bool = True,
    right: bool = True,
    names: Sequence[str] | None = None,
) -> tuple[Sample, ...]:
    samples = []
    for k in range(count):
        probability = float(rng.uniform(0.9, 0.9999) if sure else rng.uniform(0.2, 0.5))
        truth = labels[k % len(labels)]
        predicted = truth if right else labels[(k + 1) % len(labels)]
        votes = [Vote(predicted if sure or i % 2 else labels[(k + i) % len(labels)], probability) for i in range(n)]
        scores = {"max_probability": 1 - probability, "entropy": -math.log(probability)}
        samples.append(
            Sample(
                names[k % len(names)] if names else f"val/{truth}/{k:04}.png",
                picture(k),
                None if unknown else truth,
                predicted,
                None if unknown else right,
                scores,
                tuple(votes),
                unsure=not sure,
            )
        )
    return tuple(samples)


def galleries(
    rng: np.random.Generator, picture: Callable[[int], bytes], labels: Sequence[str], n: int, **more: object
) -> dict[str, tuple[Sample, ...]]:
    return {
        "surest": gallery(rng, picture, labels, n, **more),
        "uncertain": gallery(rng, picture, labels, n, sure=False, right=False, **more),
        "wrong": gallery(rng, picture, labels, n, right=False, **more),
        "unknown": gallery(rng, noise, labels, n, unknown=True, **more),
    }

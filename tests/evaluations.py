"""Evaluations made by hand, as realistic as figures that nobody measured can be: what reports are tested with."""

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from evaluation_parts import digit, encode, galleries, gallery, histogram, photo, reliability, risk_coverage, roc
from masksurgery.evaluation import Curve, Evaluation, Histogram, ModelEvaluation, Reliability, Sample, Vote
from masksurgery.scores import SCORES, Threshold

HOSTILE = (
    "<script>alert(1)</script>",
    "\"quotes\" & 'quotes' {{ 7 * 7 }} $x_1$",
    "a-model-with-a-very-long-name." * 8,
    "模型・モデル・모델",
    "نموذج لا يعرف",
    "\u202egnp.txt",
    "not\udcffutf-8",
    "</style></svg><img src=x onerror=alert(2)>",
)
"""Names that would break a page that trusts them."""

VERSIONS = {"masksurgery": "0.1.0", "torch": "2.6.0", "timm": "1.0.15"}


# --- models ----------------------------------------------------------------------------------------------------------


def classifier(
    name: str,
    quality: float,
    *,
    n: int = 1,
    seed: int = 0,
    ood: Sequence[str] = (),
    labels: Sequence[str] = tuple(map(str, range(8))),
    picture: Callable[[int], bytes] = digit,
    **more: object,
) -> ModelEvaluation:
    """A classifier with everything that one can have; `quality` from 0 to 1 moves all figures."""
    rng = np.random.default_rng(seed)
    accuracy = 0.9 + 0.08 * quality
    figures = {
        "accuracy": accuracy,
        "top5": 0.99 + 0.009 * quality,
        "nll": 0.4 - 0.2 * quality,
        "brier": 0.14 - 0.04 * quality,
        "ece": 0.06 - 0.045 * quality,
        "adaptive_ece": 0.055 - 0.04 * quality,
        "aurc": 0.02 - 0.008 * quality,
    }
    members: tuple[float, ...] = ()
    pairs: tuple[tuple[float, ...], ...] = ()
    if n > 1:
        members = tuple((accuracy - rng.uniform(0.005, 0.03, n)).tolist())
        matrix = rng.uniform(0.03, 0.14, (n, n))
        pairs = tuple(map(tuple, np.where(np.eye(n, dtype=bool), 0, (matrix + matrix.T) / 2).tolist()))
        figures |= {"agreement": 0.88, "disagreement": 0.079, "diversity": 0.079 / (1 - accuracy)}
    scores = SCORES if n > 1 else SCORES[:2]
    detected = {score: 0.7 + 0.2 * quality + 0.02 * k for k, score in enumerate(scores)}
    ends = {"max_probability": 0.9, "entropy": 2.0, "mutual_information": 0.6, "variance": 0.2}
    model = ModelEvaluation(
        name=name,
        kind="converted" if n > 1 else "base",
        n=n,
        figures=figures,
        temperature=1.31 if n > 1 else 1.87,
        members=members,
        disagreement=pairs,
        reliability=reliability(rng, 0.25 * (1 - quality)),
        risk_coverage={score: risk_coverage(1 - accuracy) for score in scores},
        histograms={
            score: {"": histogram(0.05, ends[score]), **{s: histogram(0.3 + 0.4 * quality, ends[score]) for s in ood}}
            for score in scores
        },
        detection={s: {k: {"auroc": x, "aupr": x - 0.1, "fpr95": 1.1 - x} for k, x in detected.items()} for s in ood},
        roc={s: {k: roc(x) for k, x in detected.items()} for s in ood},
        corruption={
            kind: tuple(
                {"accuracy": accuracy - slope * k, "nll": 0.3 + slope * 4 * k, "ece": 0.02 + slope * k * (1 - quality)}
                for k in range(1, 6)
            )
            for kind, slope in (("noise", 0.08), ("blur", 0.11), ("contrast", 0.04), ("rotation", 0.14))
        },
        galleries=galleries(rng, picture, labels, n),
    )
    return ModelEvaluation(**(vars(model) | more))


def refusing(model: ModelEvaluation, threshold: Threshold) -> ModelEvaluation:
    figures = {**model.figures, "answered": 0.9, "answered_risk": (1 - model.figures["accuracy"]) * 0.9**3}
    return ModelEvaluation(**(vars(model) | {"threshold": threshold, "figures": figures}))


# --- evaluations -----------------------------------------------------------------------------------------------------


def classification(labels: Sequence[str] = tuple(map(str, range(8)))) -> Evaluation:
    """A base model and what became of it, with all that can be evaluated."""
    ood = ("digits 8 and 9", "noise")
    base = classifier("resnet10t", 0.3, ood=ood, labels=labels)
    tuned = classifier("runs/resnet10t-masked", 0.8, n=4, seed=1, ood=ood, labels=labels)
    return Evaluation(
        "scikit-learn's digits, 0 to 7",
        719,
        "classification",
        (base, refusing(tuned, Threshold("entropy", 0.62))),
        fitted_on=180,
        ood={"digits 8 and 9": 354, "noise": 500},
        classes=tuple(labels),
        versions=VERSIONS,
    )


def hostile() -> Evaluation:
    """Every name in it is one of HOSTILE."""
    models = [
        classifier(name, k / len(HOSTILE), n=1 + k % 4, seed=k, ood=HOSTILE[:2], labels=HOSTILE, picture=photo)
        for k, name in enumerate(HOSTILE[:4])
    ]
    rng = np.random.default_rng(0)
    shown = {"wrong": gallery(rng, photo, HOSTILE, 4, right=False, names=HOSTILE)}
    models[3] = ModelEvaluation(**(vars(models[3]) | {"galleries": shown}))
    return Evaluation(
        HOSTILE[0],
        1000,
        "classification",
        tuple(models),
        ood=dict.fromkeys(HOSTILE[:2], 50),
        classes=HOSTILE,
        versions={HOSTILE[0]: HOSTILE[1]},
    )


def regression() -> Evaluation:
    def model(name: str, n: int, rmse: float) -> ModelEvaluation:
        levels = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
        samples = tuple(
            Sample(
                f"faces/{k}.jpg",
                photo(k),
                f"{30 + k}",
                f"{31.5 + k:.3g}",
                None,
                {"variance": 2.5 + k},
                tuple(Vote(f"{30 + k + i:.3g}") for i in range(n)),
            )
            for k in range(8)
        )
        figures = {"rmse": rmse, "crps": rmse * 0.55}
        if n > 1:
            figures |= {"nll": 2.1, "coverage90": 0.834, "aurc": rmse**2 * 0.7, "spread": rmse * 0.8}
        return ModelEvaluation(
            name,
            "converted" if n > 1 else "base",
            n,
            figures,
            members=tuple(rmse * (1 + 0.03 * i) for i in range(n)) if n > 1 else (),
            reliability=Reliability(levels, tuple(x * 0.93 for x in levels), (1 / 11,) * 11) if n > 1 else None,
            risk_coverage={"variance": risk_coverage(rmse**2)} if n > 1 else {},
            corruption={
                "blur": tuple(
                    {"rmse": rmse * (1 + k / 4), **({"nll": 2.1 + k / 3} if n > 1 else {})} for k in range(1, 6)
                )
            },
            galleries={"surest": samples, "uncertain": samples[::-1]} if n > 1 else {},
        )

    return Evaluation("ages", 2000, "regression", (model("vit_tiny", 1, 6.21), model("vit_tiny-masked", 4, 5.87)))


def segmentation() -> Evaluation:
    def maps(k: int) -> tuple[tuple[str, bytes], ...]:
        grey = np.asarray(Image.open(io.BytesIO(photo(k))).convert("L"))
        palette = np.array([[0, 0, 0], [31, 119, 180], [255, 127, 14], [44, 160, 44]], np.uint8)
        edges = np.abs(np.diff(grey.astype(int), axis=1, prepend=0)).clip(0, 255).astype(np.uint8)
        return (
            ("prediction", encode(palette[grey // 64])),
            ("truth", encode(palette[grey // 70])),
            ("variance", encode(edges)),
        )

    def model(name: str, n: int, quality: float) -> ModelEvaluation:
        whole = classifier(name, quality, n=n)
        samples = tuple(
            Sample(
                f"street/{k}.png",
                photo(k),
                "road 52%, car 31%, sky 17%",
                "road 48%, car 30%, sky 22%",
                None,
                {"max_probability": 0.2, "entropy": 0.4 + k / 10},
                maps=maps(k),
            )
            for k in range(8)
        )
        figures = {k: x for k, x in whole.figures.items() if k != "top5"} | {"miou": 0.5 + quality / 5}
        corruption = {"noise": tuple({"accuracy": 0.9 - k / 20, "miou": 0.6 - k / 15} for k in range(1, 6))}
        more = {
            "figures": figures,
            "corruption": corruption,
            "galleries": {"surest": samples, "uncertain": samples[:3]},
        }
        return ModelEvaluation(**(vars(whole) | more))

    models = (model("fcn_resnet50", 1, 0.2), model("fcn_resnet50-masked", 4, 0.6))
    return Evaluation(
        "streets", 500, "classification", models, segmentation=True, classes=("road", "car", "tree", "sky")
    )


def single() -> Evaluation:
    """A base model, of which nothing but its figures is known."""
    return Evaluation(
        "photos", 1, "classification", (ModelEvaluation("resnet50", "base", 1, {"accuracy": 1.0, "nll": 0.03}),)
    )


def multilabel() -> Evaluation:
    """Each vote is a list of labels, without a probability."""
    votes = (Vote("sunny, beach"), Vote("sunny"), Vote("sunny, beach"), Vote("none"))
    samples = tuple(
        Sample(f"{k}.jpg", photo(k), "sunny", "sunny, beach", False, {"max_probability": 0.1, "entropy": 0.3}, votes)
        for k in range(3)
    )
    model = classifier("tagger", 0.4, n=4, corruption={}, galleries={"uncertain": samples})
    return Evaluation("holidays", 300, "multilabel", (model,), classes=("sunny", "beach"))


def many() -> Evaluation:
    """Twelve models, 1,000 classes."""
    labels = tuple(f"class number {k}" for k in range(1000))
    models = tuple(
        classifier(
            f"vit_small_patch16_224.augreg_in21k_ft_in1k-scale{k}",
            k / 12,
            n=k % 5 + 1,
            seed=k,
            ood=("textures",),
            labels=labels,
            galleries={},
        )
        for k in range(12)
    )
    return Evaluation(
        "ImageNet", 50_000, "classification", models, ood={"textures": 5640}, classes=labels, versions=VERSIONS
    )


def four() -> Evaluation:
    """Four models with all galleries: the largest report that is usual."""
    ood = ("digits 8 and 9", "noise")
    models = [
        classifier(f"resnet{18 + 8 * k}", k / 4, n=4 if k else 1, seed=k, ood=ood, picture=photo) for k in range(4)
    ]
    return Evaluation("photos", 2000, "classification", tuple(models), ood=dict.fromkeys(ood, 500), versions=VERSIONS)


def broken() -> Evaluation:
    """Figures and curves without numbers."""
    whole = classifier("diverged", 0.5, n=8, ood=("noise",))
    nan, inf = math.nan, math.inf
    bad = {
        "figures": {"accuracy": 0.1, "nll": inf, "brier": nan, "ece": nan, "disagreement": nan},
        "members": (nan,) * 8,
        "disagreement": ((nan,) * 8,) * 8,
        "reliability": Reliability((None,) * 15, (None,) * 15, (0.0,) * 15),
        "risk_coverage": {"max_probability": Curve((0.0, 0.5, 1.0), (nan, nan, inf))},
        "histograms": {"entropy": {"": Histogram((0.0, 1.0), (nan,)), "noise": Histogram((0.0, 1.0), (1.0,))}},
        "detection": {"noise": {"entropy": {"auroc": nan, "aupr": nan, "fpr95": nan}}},
        "roc": {"noise": {"entropy": Curve((), ())}},
        "corruption": {"blur": ({"accuracy": nan, "nll": inf},) * 5},
    }
    models = (ModelEvaluation(**(vars(whole) | bad)), classifier("sound", 0.5))
    return Evaluation("digits", 100, "classification", models, ood={"noise": 10})


ALL = {
    f.__name__: f for f in (classification, hostile, regression, segmentation, multilabel, single, many, four, broken)
}

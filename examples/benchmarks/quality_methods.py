"""The ways to an uncertainty that `quality.py` compares: each from the same base model, with the same budget."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from inference_models import with_dropout
from quality_group import Candidate, Group, Predict, Predicted, Run, Trained
from quality_recipes import Recipe, Shrinking, alone, importance, put_core, single
from quality_tasks import BATCH, Part
from torch import nn

import masksurgery
from masksurgery.calibration import TemperatureFit
from masksurgery.macs import count_macs
from masksurgery.model import ConvertedModel
from masksurgery.prediction import Prediction, RegressionPrediction, classification
from masksurgery.types import Task

MEMBERS = 4
PASSES = (4, 30)


@torch.inference_mode()
def predict_part(predict: Predict, part: Part) -> Predicted:
    """Predictions, with the truth."""
    return [(predict(x), y) for x, y in part.batches()]


def fit_temperature(kind: Task, predicted: Predicted) -> float:
    """What makes the NLL of these smallest."""
    fit = TemperatureFit(kind)
    for p, y in predicted:
        fit.update(p, y)
    return fit.compute_temperature()


def at_temperature(
    p: Prediction | RegressionPrediction, kind: Task, temperature: float
) -> Prediction | RegressionPrediction:
    """The same prediction, made at temperature 1, at another one; see `Head.temperature`."""
    if isinstance(p, RegressionPrediction):
        return p._replace(variance=p.variance * temperature**2)
    return classification(p.members, 2, kind, temperature)


# --- methods ---------------------------------------------------------------------------------------------------------


def train_base(group: Group, run: Run) -> Iterator[Candidate]:
    """The base model trained on; and the same with a temperature fitted to the validation part."""
    trained, macs = group.tuned(run), {"base": group.base_macs}
    yield Candidate("base", 1, group.mixture([trained.network]), trained.seconds, trained.epochs, macs, "temperature")


def train_dropout(group: Group, run: Run) -> Iterator[Candidate]:
    """Dropout where the masks would stand (of whole channels in images), in training and in each pass."""
    with group.seeded(*run.key):
        model = with_dropout(group.convert(1, 2.0), run.options["p"])
        model.output = "prediction"
        seconds = group.fit(model, run.epochs, run.lr)
    for passes in PASSES:
        macs = {"passes": group.base_macs + (passes - 1) * group.repeated_macs}
        predict = group.mixture([lambda x: single(model(x))] * passes)
        yield Candidate(f"dropout{passes}", passes, predict, seconds, run.epochs, macs)


def train_ensemble(group: Group, run: Run) -> Iterator[Candidate]:
    """Four models trained independently: from random weights (or with another output layer), as the base model was."""
    trained = [group.tuned(run, start=k) for k in range(MEMBERS)]
    more = [group.base(k) for k in range(1, MEMBERS)]  # the first one's base model is there already
    yield _ensemble(group, "ensemble", trained, more)


def train_tuned_ensemble(group: Group, run: Run) -> Iterator[Candidate]:
    """Four models trained on from the one base model, with other batches."""
    yield _ensemble(group, "tuned ensemble", [group.tuned(run, order=k) for k in range(MEMBERS)], [])


def _ensemble(group: Group, name: str, trained: Sequence[Trained], more: Sequence[Trained]) -> Candidate:
    cost = [(t.seconds, t.epochs) for t in (*trained, *more)]
    seconds, epochs = (sum(column) for column in zip(*cost, strict=True))
    macs = {"members": len(trained) * group.base_macs}
    return Candidate(name, len(trained), group.mixture([t.network for t in trained]), seconds, epochs, macs)


def train_masksembles(group: Group, run: Run) -> Iterator[Candidate]:
    """The base model converted, and trained on; it predicts packed."""
    trained = train_converted(group, run)
    model, x = trained.network, group.data.test.x[:1]
    assert isinstance(model, ConvertedModel)
    n, packed = model.surgery.n, masksurgery.pack(model, "unrolled", dense=False)
    macs = {"converted": count_macs(model, (x,)), "packed": count_macs(packed, (x,))}
    cost = (trained.seconds, trained.epochs, macs)
    yield Candidate("masksembles", n, packed, *cost, "masksembles temperature")
    if not run.options and any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        yield Candidate("own statistics", n, _with_own_statistics(group, model), *cost)


def train_converted(group: Group, run: Run) -> Trained:
    """The base model converted with the run's options, and trained on."""
    recipe, options = Recipe.split({"n": MEMBERS, "scale": 2.0, **run.options})
    model, n = group.convert(**options), options["n"]
    if recipe.core:
        whole = group.convert(**{**options, "n": 1})
        some = islice(group.data.train.batches(), 4)
        put_core(model, importance(whole, some, group.loss), recipe.core, group.seed)
    shrinking = None
    if recipe.shrink:
        shrinking = Shrinking(model, round(recipe.shrink * run.epochs), np.random.default_rng(group.seed))

    def begin(epoch: int) -> None:
        if shrinking is not None:
            shrinking.begin(epoch)
        if epoch == 0:
            masksurgery.recalibrate(model, group.data.train.x.split(group.task.batch), max_batches=20)
        if epoch >= run.epochs - recipe.last:
            model.members_module.train_mode = "repeat"

    with group.seeded(*run.key):
        seconds = group.fit(model, run.epochs, run.lr, begin, recipe.teacher)
    repeated = run.epochs if options.get("train_mode") == "repeat" else recipe.last
    return Trained(model, seconds, run.epochs + repeated * (n - 1))


def _with_own_statistics(group: Group, model: ConvertedModel) -> Predict:
    """Its members, each with BatchNorm statistics of its own: packed they cost the same."""
    networks = []
    for i in range(model.surgery.n):
        member = alone(model, i, group.convert(1, model.surgery.scale)).eval()
        masksurgery.recalibrate(member, group.data.train.x.split(BATCH))
        networks.append(member)
    return group.mixture([lambda x, member=member: single(member(x)) for member in networks])


METHODS: dict[str, Callable[[Group, Run], Iterator[Candidate]]] = {
    "base": train_base,
    "dropout": train_dropout,
    "ensemble": train_ensemble,
    "tuned ensemble": train_tuned_ensemble,
    "masksembles": train_masksembles,
}

"""The ways to an uncertainty that `quality.py` compares: each from the same base model, with the same budget."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from inference_models import with_dropout
from quality_tasks import TASKS, Data, Part, Task
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import masksurgery
from masksurgery.calibration import TemperatureFit
from masksurgery.macs import count_macs
from masksurgery.model import ConvertedModel
from masksurgery.optimisation import create_optimizer
from masksurgery.prediction import Head, Prediction, RegressionPrediction
from masksurgery.training_config import FinetuneConfig

MEMBERS = 4
PASSES = (4, 30)
Predict = Callable[[Tensor], Prediction | RegressionPrediction]


@dataclass(frozen=True)
class Run:
    """One training, and what is made of it.

    Attributes:
        task, seed: What is learned; the seed is that of weights, batches and masks.
        method: One of `METHODS`.
        epochs, lr: Of the training that starts from the base model.
        options: Of the method.
    """

    task: str
    seed: int
    method: str
    epochs: int
    lr: float
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.task, self.seed, self.method, self.epochs, self.lr, tuple(sorted(self.options.items())))


@dataclass(frozen=True)
class Trained:
    """A network, and what it has cost beyond the base model: seconds, and epochs of one network."""

    network: nn.Module
    seconds: float = 0.0
    epochs: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """Something that predicts.

    Attributes:
        name: The method's, as in the tables.
        n: Members, or passes.
        predict: In eval, and without gradients.
        head: What aggregates the members in it, with a temperature.
        seconds, epochs: Of training, beyond the base model's; an epoch in which each image meets n members counts n.
        macs: Multiply-adds of one prediction, by how it is computed.
        facts: More to note.
    """

    name: str
    n: int
    predict: Predict
    head: Head
    seconds: float
    epochs: float
    macs: Mapping[str, int]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Group:
    """The runs of one task and one seed, which share base models; what several of them need is trained once."""

    def __init__(self, task: str, seed: int) -> None:
        self.name, self.seed = task, seed
        self.task: Task = TASKS[task]
        self._kept: dict[tuple[Any, ...], Trained] = {}

    @cached_property
    def data(self) -> Data:
        return self.task.data(self.seed)

    @cached_property
    def corrupted(self) -> dict[tuple[str, int], Part]:
        return self.data.corrupted()

    @cached_property
    def base_macs(self) -> int:
        return count_macs(self.base().network, (self.data.test.x[:1],))

    def base(self, member: int = 0) -> Trained:
        """A base model; those of other numbers have been trained independently, from other random weights."""

        def train() -> Trained:
            with seeded(self.name, self.seed, "base", member):
                model = self.task.model()
                seconds = self.fit(model, self.task.base_epochs, self.task.base_lr)
            return Trained(model, seconds, self.task.base_epochs)

        return self._keep(("base", member), train)

    def tuned(self, run: Run, start: int = 0, order: int = 0) -> Trained:
        """A base model after the run's epochs; `order` chooses the batches."""

        def train() -> Trained:
            model = copy.deepcopy(self.base(start).network)
            with seeded(self.name, self.seed, "tuned", start, order):
                return Trained(model, self.fit(model, run.epochs, run.lr), run.epochs)

        return self._keep(("tuned", start, order, run.epochs, run.lr), train)

    def fit(self, model: nn.Module, epochs: int, lr: float, repeat: int = 1) -> float:
        """Train as `masksurgery.finetune` does by default, without augmentation; the seconds that it took."""
        start = time.perf_counter()
        part, batch = self.data.train, self.task.batch
        config = FinetuneConfig(epochs=epochs, batch_size=batch, lr=lr)
        steps = len(part) // batch
        optimizer, schedule = create_optimizer(model, config, steps)
        model.train()
        for epoch in range(epochs):
            order = torch.randperm(len(part))
            for k in range(steps):
                some = part.take(order[k * batch : (k + 1) * batch])
                y = masksurgery.repeat_targets(some.y, repeat) if repeat > 1 else some.y
                loss = self.loss(model(some.x), y)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
                optimizer.step()
                schedule.step_update(epoch * steps + k + 1)
        model.eval()
        return time.perf_counter() - start

    def loss(self, outputs: Any, y: Tensor) -> Tensor:
        if self.task.kind == "regression":
            return F.gaussian_nll_loss(outputs[0], y, outputs[1].exp())
        return F.cross_entropy(outputs, y)

    def mixture(self, networks: Sequence[Callable[[Tensor], Any]]) -> tuple[Predict, Head]:
        """What a converted model makes of its members' outputs, of the outputs of these."""
        if self.task.kind == "regression":
            head = Head(len(networks), [0, 0], ["regression", "regression"], heteroscedastic=True)
        else:
            head = Head(len(networks), [0], ["classification"])

        def predict(x: Tensor) -> Any:
            return head.aggregate(tree_map(lambda *outputs: torch.cat(outputs), *[network(x) for network in networks]))

        return predict, head

    def convert(self, n: int, scale: float, sites: str = "all", **options: Any) -> ConvertedModel:
        regression = {"task": "regression", "heteroscedastic": True} if self.task.kind == "regression" else {}
        example = (self.data.train.x[:1],)
        given = {**self.task.sites[sites], **regression, **options}
        return masksurgery.convert(
            self.base().network, n=n, scale=scale, seed=self.seed, example_inputs=example, **given
        )

    def _keep(self, key: tuple[Any, ...], train: Callable[[], Trained]) -> Trained:
        if key not in self._kept:
            self._kept[key] = train()
        return self._kept[key]


@contextmanager
def seeded(*what: Any) -> Iterator[None]:
    """Draw what is drawn inside from a seed made of these; outside nothing changes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.Random(repr(what)).getrandbits(62))
        yield


@torch.inference_mode()
def fit_temperature(group: Group, predict: Predict) -> float:
    """What makes the NLL of the validation part smallest."""
    fit = TemperatureFit(group.task.kind)
    for x, y in group.data.val.batches():
        fit.update(predict(x), y)
    return fit.compute_temperature()


# --- methods ---------------------------------------------------------------------------------------------------------


def train_base(group: Group, run: Run) -> Iterator[Candidate]:
    """The base model trained on; and the same with a temperature fitted to the validation part."""
    trained = group.tuned(run)
    for name in ("base", "temperature"):
        predict, head = group.mixture([trained.network])
        if name == "temperature":
            head.temperature = fit_temperature(group, predict)
        facts = {"temperature": head.temperature}
        yield Candidate(name, 1, predict, head, trained.seconds, trained.epochs, {"base": group.base_macs}, facts)


def train_dropout(group: Group, run: Run) -> Iterator[Candidate]:
    """Dropout where the masks would stand (of whole channels in images), in training and in each pass."""
    with seeded(*run.key):
        model = with_dropout(group.convert(1, 2.0), run.options["p"])
        model.output = "prediction"
        seconds = group.fit(model, run.epochs, run.lr)

    def once(x: Tensor) -> Any:
        p = model(x)
        return p.logits if isinstance(p, Prediction) else (p.mean, p.variance.log())

    for passes in PASSES:
        macs = {"passes": passes * group.base_macs}
        yield Candidate(f"dropout{passes}", passes, *group.mixture([once] * passes), seconds, run.epochs, macs)


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
    return Candidate(name, len(trained), *group.mixture([t.network for t in trained]), seconds, epochs, macs)


def train_masksembles(group: Group, run: Run) -> Iterator[Candidate]:
    """The base model converted, and trained on."""
    options = {"n": MEMBERS, "scale": 2.0, **run.options}
    model = group.convert(**options)
    repeat = options["n"] if options.get("train_mode") == "repeat" else 1
    with seeded(*run.key):
        masksurgery.recalibrate(model, group.data.train.x.split(group.task.batch), max_batches=20)
        seconds = group.fit(model, run.epochs, run.lr, repeat)
    x = group.data.test.x[:1]
    packed = masksurgery.pack(model, "unrolled", dense=False)
    macs = {"converted": count_macs(model, (x,)), "packed": count_macs(packed, (x,))}
    facts = {"sites": len(model.surgery.sites)}
    yield Candidate("masksembles", options["n"], model, model.head_module, seconds, repeat * run.epochs, macs, facts)


METHODS: dict[str, Callable[[Group, Run], Iterator[Candidate]]] = {
    "base": train_base,
    "dropout": train_dropout,
    "ensemble": train_ensemble,
    "tuned ensemble": train_tuned_ensemble,
    "masksembles": train_masksembles,
}

"""What the methods of `quality.py` share: a base model, its data, and one way to train."""

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
from quality_tasks import TASKS, Data, Part, Task
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import masksurgery
from masksurgery.losses import Objective, choose_loss
from masksurgery.macs import count_macs
from masksurgery.model import ConvertedModel
from masksurgery.optimisation import create_optimizer
from masksurgery.prediction import Head, Prediction, RegressionPrediction
from masksurgery.randomness import forked_random_state, seed_global
from masksurgery.training_config import FinetuneConfig

Predict = Callable[[Tensor], Prediction | RegressionPrediction]
Predicted = Sequence[tuple[Prediction | RegressionPrediction, Tensor]]
"""Predictions of batches, and the truth."""


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
        seconds, epochs: Of training, beyond the base model's; an epoch in which each image meets n members counts n.
        macs: Multiply-adds of one prediction, by how it is computed.
        tempered: Name of the same with a temperature fitted to the validation part; empty if that is no method of its
            own.
    """

    name: str
    n: int
    predict: Predict
    seconds: float
    epochs: float
    macs: Mapping[str, int]
    tempered: str = ""


class Group:
    """The runs of one task and one seed, which share base models; what several of them need is trained once.

    Args:
        task: Its name.
        seed: Of weights, batches and masks.
        device: Where everything is done.
    """

    def __init__(self, task: str, seed: int, device: str = "cpu") -> None:
        self.name, self.seed, self.device = task, seed, torch.device(device)
        self.task: Task = TASKS[task]
        self._kept: dict[tuple[Any, ...], Trained] = {}

    @cached_property
    def data(self) -> Data:
        return self.task.data(self.seed).to(self.device, self.task.layout)

    @cached_property
    def corrupted(self) -> dict[tuple[str, int], Part]:
        return self.data.corrupted()

    @cached_property
    def base_macs(self) -> int:
        return count_macs(self.base().network, (self.data.test.x[:1],))

    @cached_property
    def repeated_macs(self) -> int:
        """Of these what is behind the first place of a mask: what another member, or another pass, costs."""
        return count_macs(self.convert(2, 2.0), (self.data.test.x[:1],)) - self.base_macs

    @cached_property
    def objective(self) -> Objective:
        return Objective(self.task.kind, choose_loss(self.task.kind, self.task.kind == "regression"))

    def base(self, member: int = 0) -> Trained:
        """A base model; those of other numbers have been trained independently, from other random weights."""

        def train() -> Trained:
            with self.seeded(self.name, self.seed, "base", member):
                model = self.task.model().to(self.device, memory_format=self.task.layout)
                seconds = self.fit(model, self.task.base_epochs, self.task.base_lr)
            return Trained(model, seconds, self.task.base_epochs)

        return self._keep(("base", member), train)

    def tuned(self, run: Run, start: int = 0, order: int = 0) -> Trained:
        """A base model after the run's epochs; `order` chooses the batches."""

        def train() -> Trained:
            model = copy.deepcopy(self.base(start).network)
            with self.seeded(self.name, self.seed, "tuned", start, order):
                return Trained(model, self.fit(model, run.epochs, run.lr), run.epochs)

        return self._keep(("tuned", start, order, run.epochs, run.lr), train)

    def fit(
        self,
        model: nn.Module,
        epochs: int,
        lr: float,
        begin: Callable[[int], None] = lambda epoch: None,
        teacher: float = 0.0,
    ) -> float:
        """Train with what `masksurgery.finetune` uses by default: timm's AdamW and cosine schedule, clipped gradients.

        There is no augmentation, and the last weights are taken, for it is budgets that are compared.

        Args:
            begin: Called before each epoch with its number, from 0.
            teacher: Share of the loss whose targets are the base model's probabilities (Hinton et al. 2015,
                arXiv:1503.02531, at temperature 1).
        Returns:
            The seconds that it took.
        """
        start = time.perf_counter()
        part, batch = self.data.train, self.task.batch
        config = FinetuneConfig(epochs=epochs, batch_size=batch, lr=lr)
        steps = len(part) // batch
        optimizer, schedule = create_optimizer(model, config, steps)
        model.train()
        for epoch in range(epochs):
            begin(epoch)
            order = torch.randperm(len(part)).to(self.device)
            for k in range(steps):
                some = part.take(order[k * batch : (k + 1) * batch])
                outputs = model(some.x)
                loss = self.loss(outputs, some.y)
                if teacher:
                    loss = (1 - teacher) * loss + teacher * self.loss(outputs, self.answer(some.x))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
                optimizer.step()
                schedule.step_update(epoch * steps + k + 1)
        optimizer.zero_grad()  # many networks are kept, and are to be small
        model.eval()
        return time.perf_counter() - start

    def loss(self, outputs: Any, y: Tensor) -> Tensor:
        """Of outputs for the samples of y, or for all members [n*b, ...]; y may hold shares of the classes."""
        first = outputs if isinstance(outputs, Tensor) else outputs[0]
        return self.objective(outputs, masksurgery.repeat_targets(y, len(first) // len(y)))

    @torch.no_grad()
    def answer(self, x: Tensor) -> Tensor:
        """The base model's probabilities."""
        return self.base().network(x).softmax(1)

    def mixture(self, networks: Sequence[Callable[[Tensor], Any]]) -> Predict:
        """What a converted model makes of its members' outputs, of the outputs of these."""
        if self.task.kind == "regression":
            head = Head(len(networks), [0, 0], ["regression", "regression"], heteroscedastic=True)
        else:
            head = Head(len(networks), [0], ["classification"])

        def predict(x: Tensor) -> Any:
            return head.aggregate(tree_map(lambda *outputs: torch.cat(outputs), *[network(x) for network in networks]))

        return predict

    def convert(self, n: int, scale: float, sites: str = "all", **options: Any) -> ConvertedModel:
        regression = {"task": "regression", "heteroscedastic": True} if self.task.kind == "regression" else {}
        example = (self.data.train.x[:1],)
        given = {**self.task.sites[sites], **regression, **options}
        return masksurgery.convert(
            self.base().network, n=n, scale=scale, seed=self.seed, example_inputs=example, **given
        )

    @contextmanager
    def seeded(self, *what: Any) -> Iterator[None]:
        """Draw what is drawn inside from a seed made of these; outside nothing changes."""
        with forked_random_state(self.device):
            seed_global("quality", random.Random(repr(what)).getrandbits(62), device=self.device)
            yield

    def _keep(self, key: tuple[Any, ...], train: Callable[[], Trained]) -> Trained:
        if key not in self._kept:
            self._kept[key] = train()
        return self._kept[key]

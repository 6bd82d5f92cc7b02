"""Evaluate models side by side: is each one surer when it is right?"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from masksurgery.checkpoint import save_calibration
from masksurgery.data import DataConfig, explained_death
from masksurgery.evaluation import Evaluation
from masksurgery.evaluation_config import EvaluateConfig
from masksurgery.evaluation_data import open_sets
from masksurgery.images import readable
from masksurgery.processes import accelerated, require
from masksurgery.rebuild import version_of
from masksurgery.subjects import Subject, converted_settings, open_subject
from masksurgery.types import CheckpointError, ConfigError, Task

if TYPE_CHECKING:
    from masksurgery.evaluator import Observer

logger = logging.getLogger(__name__)


def evaluate(
    models: Sequence[str | Path | nn.Module] | str | Path | nn.Module,
    data: DataConfig,
    *,
    config: EvaluateConfig | None = None,
    everything: bool = False,
    task: Task = "classification",
    class_dim: int = 1,
    heteroscedastic: bool = False,
    trust: bool = False,
    observer: Observer | None = None,
) -> Evaluation:
    """Evaluate models on the same images. Memory does not grow with the number of images.

    Every process of `accelerate launch` calls this, and gets the same figures.

    Args:
        models: Folders of `save` or of timm, names of timm, or models; converted ones and base models beside each
            other. Models are not changed.
        data: What to evaluate on: the part that `finetune` validates on.
        config: What else.
        everything: All images, where the data has no validation part.
        task: Of the base models, unless a converted one is among the models.
        class_dim: Likewise.
        heteroscedastic: Likewise.
        trust: Run the user's own factory that a model's folder names.
        observer: Is told what is going on.
    Returns:
        Figures, curves and galleries. What was fitted stands in the config.json of the folders of converted models.
    Raises:
        ConfigError: The settings, the models and the data do not go together.
        DataError: An image cannot be read.
        EvaluationError: A prediction is no number, or nothing can be fitted.
        CheckpointError: A folder cannot be read or written.
    """
    config = config or EvaluateConfig()
    for package in ("accelerate", "torchmetrics"):
        require(package, "evaluate", "Evaluation")
    from masksurgery.evaluator import Evaluator

    given = [models] if isinstance(models, (str, Path, nn.Module)) else list(models)
    subjects = _open_subjects(given, task=task, class_dim=class_dim, heteroscedastic=heteroscedastic, trust=trust)
    _check_together(subjects)
    if config.score is not None and subjects[0].task == "regression" and config.score != "variance":
        raise ConfigError(f"score={config.score!r} is none of a regression, which has 'variance' alone.")
    if config.fits:
        _check_stores(subjects)
    with accelerated() as accelerator, explained_death():
        sets = open_sets(subjects[0], data, config, everything, accelerator)
        evaluators = [
            Evaluator(subject, sets, config, accelerator, data.seed, observer, tell=subject is subjects[0])
            for subject in subjects
        ]
        found = [evaluator.run() for evaluator in evaluators]
        if config.fits and accelerator.is_main_process:
            for subject, one in zip(subjects, found, strict=True):
                if subject.folder is not None:
                    save_calibration(subject.folder, temperature=subject.temperature, threshold=one.threshold)
        accelerator.wait_for_everyone()
    first = subjects[0]
    return Evaluation(
        data=data.data,
        images=evaluators[0].images,
        task=first.task,
        models=tuple(found),
        fitted_on=len(sets.held) if sets.held is not None else 0,
        segmentation=first.segmentation,
        ood=evaluators[0].ood_images,
        classes=sets.known.classes,
        versions={name: version_of(name) for name in ("masksurgery", "torch", "timm", "torchmetrics")},
    )


def _open_subjects(places: Sequence[Any], trust: bool, **settings: Any) -> list[Subject]:
    """All models; base models take over what the first converted one says of its outputs."""
    if not places:
        raise ConfigError("There is no model to evaluate. Pass a folder.")
    own = next(filter(None, map(converted_settings, places)), settings)
    names = _short_names(places)
    found: list[Subject] = []
    for place, name in zip(places, names, strict=True):
        subject = open_subject(place, trust=trust, name=name, **own)
        alike = [other for other in found if other.name.partition(" (")[0] == subject.name]
        if alike:  # such as a base model and an ensemble that are both in memory
            subject.name = f"{subject.name} ({len(alike) + 1})"
        found.append(subject)
    return found


def _short_names(places: Sequence[Any]) -> list[str | None]:
    """Folders side by side are called by what tells them apart; None for the name that a model has anyway."""
    if len(places) < 2 or any(isinstance(place, nn.Module) or not Path(place).is_dir() for place in places):
        return [None] * len(places)
    folders = [Path(place).resolve() for place in places]
    for place, folder in zip(places, folders, strict=True):
        if folders.count(folder) > 1:
            raise ConfigError(f"'{readable(Path(place))}' stands there twice. Pass each model once.")
    shared = Path(os.path.commonpath(folders))
    shared = shared.parent if shared in folders else shared
    return [readable(folder.relative_to(shared)) for folder in folders]


def _check_stores(subjects: Sequence[Subject]) -> None:
    """What is fitted can be stored; that of a model without a folder, such as one of the hub, is only used."""
    for subject in subjects:
        if subject.folder is not None and not os.access(subject.folder, os.W_OK):
            raise CheckpointError(
                f"{subject.folder}: cannot be written to, so that what is fitted could not be stored. Copy the folder, "
                f"or evaluate without fitting."
            )
        if subject.folder is None and subject.kind == "converted":
            logger.warning("%s: what is fitted is not stored, for the model has no folder here.", subject.name)


def _check_together(subjects: Sequence[Subject]) -> None:
    """Raise a ConfigError unless these can stand side by side."""
    first = subjects[0]
    for other in subjects[1:]:
        for name in ("task", "outputs", "segmentation"):
            ours, theirs = getattr(first, name), getattr(other, name)
            if ours != theirs:
                raise ConfigError(
                    f"'{first.name}' has {name}={ours!r}, '{other.name}' {name}={theirs!r}: they cannot be evaluated "
                    f"side by side. Evaluate them one by one."
                )

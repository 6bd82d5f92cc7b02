"""The sets of an evaluation: opened and checked once for all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from masksurgery.data import DataConfig, EvaluationData, Source, hold_out, open_evaluation, open_unlabelled
from masksurgery.evaluation_config import EvaluateConfig
from masksurgery.subjects import Subject
from masksurgery.training_data import tell_broken
from masksurgery.types import ConfigError, DataError

if TYPE_CHECKING:
    from accelerate import Accelerator

IMAGENET = 1000
"""Classes that folders name by WordNet, weights by words, and data sets by others of the same words."""


@dataclass(frozen=True)
class Sets:
    """What a model is evaluated on.

    Attributes:
        known: Images with targets.
        held: Those of them that temperature and threshold are fitted on, which are not among `known`; None for none.
        ood: Out-of-distribution data by name.
    """

    known: EvaluationData
    held: Source | None
    ood: Mapping[str, EvaluationData]


def open_sets(
    first: Subject, data: DataConfig, config: EvaluateConfig, everything: bool, accelerator: Accelerator
) -> Sets:
    """Open and check all data, on the main process for all of them."""
    channels, workers = first.preprocessing.channels, config.workers
    known = _open_once(
        partial(
            open_evaluation, data, task=first.task, channels=channels, num_classes=first.outputs,
            everything=everything, workers=workers,
        ),
        accelerator,
    )  # fmt: skip
    held = None
    if config.fits:
        if not isinstance(known.source, Source):
            raise ConfigError(
                f"{data.data} is a stream, of which no part can be held out. Fit temperature and threshold on data "
                f"that is no stream."
            )
        rest, held = hold_out(known.source, config.fit_fraction, data.seed)
        known = replace(known, source=rest)
    unlabelled = partial(open_unlabelled, config=data, channels=channels, masks=known.masks, workers=workers)
    ood = {}
    for name in {Path(name).resolve() if Path(name).exists() else name: name for name in reversed(config.ood)}.values():
        try:
            ood[name] = _open_once(partial(unlabelled, name), accelerator)
        except DataError as error:
            raise DataError(f"ood={name!r}: {error}") from error
    return Sets(known, held, dict(reversed(ood.items())))


def _open_once(read: Callable[..., EvaluationData], accelerator: Accelerator) -> EvaluationData:
    """What `read` opens; only the main process looks for broken images."""
    from accelerate.utils import broadcast_object_list

    opened = read() if accelerator.is_main_process else None
    found = [opened.bad if opened else ()]
    broadcast_object_list(found)
    if accelerator.is_main_process:
        tell_broken(found[0])
    return opened or read(bad=found[0])


def match_classes(subject: Subject, classes: Sequence[str] | None) -> Tensor | None:
    """The model's index of each class of the data, by name: data may have some of the classes only, in any order.

    Names that are indices ("0", "1", ...) say no more than that, and ImageNet's classes everybody names differently.

    Args:
        subject: The model.
        classes: Of the data, in the order of their indices; None where they are not known.
    Returns:
        int64 [k]; None where the data has the model's own indices.
    Raises:
        ConfigError: Nothing but the number of classes can be compared, and it is another one.
        DataError: The model does not know a class.
    """
    if classes is None or subject.task == "regression":
        return None
    classes, own = tuple(classes), subject.label_names
    if own == classes:
        return None
    if own is not None and set(classes) <= set(own) and subject.task != "multilabel":
        return torch.tensor([own.index(name) for name in classes])
    if len(classes) > subject.outputs or (len(classes) < subject.outputs and not _are_indices(classes)):
        names = "1 class" if len(classes) == 1 else f"{len(classes)} classes"
        raise ConfigError(
            f"{subject.name} has {subject.outputs} outputs, the data {names}. Evaluate it on data with the classes "
            f"that it was trained on."
        )
    if own is None or _are_indices(classes) or _are_indices(own) or subject.outputs == IMAGENET:
        return None
    k = next(k for k, pair in enumerate(zip(own, classes, strict=False)) if pair[0] != pair[1])
    raise DataError(
        f"The data has other classes than {subject.name}: class {k} is '{classes[k]}' in the data and '{own[k]}' in "
        f"the model. Name the classes of the data as the model does."
    )


def _are_indices(names: Sequence[str]) -> bool:
    return tuple(names) == tuple(map(str, range(len(names))))

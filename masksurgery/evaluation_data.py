"""The sets of an evaluation: opened and checked once for all processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from masksurgery.data import DataConfig, EvaluationData, Source, hold_out, open_evaluation, open_unlabelled
from masksurgery.evaluation_config import EvaluateConfig
from masksurgery.subjects import Subject
from masksurgery.training_data import tell_broken
from masksurgery.types import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    ood = {name: _open_once(partial(unlabelled, name), accelerator) for name in dict.fromkeys(config.ood)}
    return Sets(known, held, ood)


def _open_once(read: Callable[..., EvaluationData], accelerator: Accelerator) -> EvaluationData:
    """What `read` opens; only the main process looks for broken images."""
    from accelerate.utils import broadcast_object_list

    opened = read() if accelerator.is_main_process else None
    found = [opened.bad if opened else ()]
    broadcast_object_list(found)
    if accelerator.is_main_process:
        tell_broken(found[0])
    return opened or read(bad=found[0])

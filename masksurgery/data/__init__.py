"""Images and targets to train and to evaluate on: opened, checked, and in batches that can be made again."""

from __future__ import annotations

from masksurgery.data.check import LISTED, BrokenImage, default_workers
from masksurgery.data.config import DataConfig
from masksurgery.data.evaluation import EvaluationData, name_of, open_evaluation, open_unlabelled
from masksurgery.data.loading import (
    Batches,
    eval_batches,
    explained_death,
    steps_per_epoch,
    stream_workers,
    train_batches,
)
from masksurgery.data.opening import Data, open_data
from masksurgery.data.pairs import IGNORED
from masksurgery.data.source import Source, hold_out
from masksurgery.data.streams import Stream
from masksurgery.types import DataError

__all__ = [
    "IGNORED",
    "LISTED",
    "Batches",
    "BrokenImage",
    "Data",
    "DataConfig",
    "DataError",
    "EvaluationData",
    "Source",
    "Stream",
    "default_workers",
    "eval_batches",
    "explained_death",
    "hold_out",
    "name_of",
    "open_data",
    "open_evaluation",
    "open_unlabelled",
    "steps_per_epoch",
    "stream_workers",
    "train_batches",
]

"""What makes a training run the one that it is."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from masksurgery.data import Data, DataConfig, Source, stream_workers
from masksurgery.training_config import FREE, FREE_OF_DATA, FinetuneConfig
from masksurgery.transforms import Augmentation

if TYPE_CHECKING:
    from accelerate import Accelerator


def describe_run(
    module: nn.Module,
    data: DataConfig,
    parts: Data,
    config: FinetuneConfig,
    augmentation: Augmentation,
    base_only: bool,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """The settings of a run, and what they have found: a run that is resumed has to have the same."""
    found: dict[str, Any] = {"train": len(parts.train), "val": len(parts.val), "classes": parts.classes}
    found["mixed_precision"] = accelerator.mixed_precision
    if not isinstance(parts.train, Source):  # the order of a stream depends on who reads it
        processes = accelerator.num_processes
        found |= {"processes": processes, "workers": stream_workers(parts.train, config.workers, processes)}
    places = {name: _absolute(getattr(data, name)) for name in ("data", "data_dir", "masks")}
    return {
        "model": _fingerprint(module),
        "base_only": base_only,
        "data": {**_without(asdict(data), FREE_OF_DATA), **places},
        "found": found,
        "augmentation": asdict(augmentation),
        "config": _without(asdict(config), FREE),
    }


def _without(settings: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _absolute(place: str | None) -> str | None:
    """A place on this machine by its whole path, wherever the command is called; another name as it is."""
    return str(Path(place).resolve()) if place is not None and Path(place).exists() else place


def _fingerprint(module: nn.Module) -> str:
    """Of all weights and masks: a run goes on from the model that it was begun with."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

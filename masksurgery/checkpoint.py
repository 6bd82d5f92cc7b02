"""Save a converted model to a folder, and load it again: its tensors as safetensors, everything else as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from masksurgery.convert import build
from masksurgery.folders import SavedModel, check_masks, check_replaceable
from masksurgery.model import ConvertedModel
from masksurgery.prediction import check_temperature
from masksurgery.rebuild import describe, plain_cfg
from masksurgery.record import read_record
from masksurgery.restore import restore_base, restore_draft
from masksurgery.scores import Threshold
from masksurgery.types import CheckpointError, ConfigError, MasksurgeryError
from masksurgery.weights import CONFIG, WEIGHTS, collect_tensors, replace_file, write_folder


def save(model: ConvertedModel, directory: str | Path, *, force: bool = False) -> Path:
    """Save a converted model: its weights, its masks, and what makes it again. Nothing is pickled.

    A model that timm or torchvision can make again is loaded without further ado; for another, `load` needs `base`.

    Args:
        model: What `convert` returned, on any device, trained or not.
        directory: Made if there is none. The two files of a model that was saved before are replaced, both or neither.
        force: Replace a config.json or a model.safetensors that is not of this package, too.
    Returns:
        The folder.
    Raises:
        CheckpointError: The folder holds other files of these names, cannot be written, or the model holds what JSON
            and safetensors cannot.
    """
    if not isinstance(model, ConvertedModel):
        raise ConfigError(
            f"save takes a converted model, not {type(model).__name__}. Pass what masksurgery.convert returned."
        )
    folder = Path(directory)
    if not force:
        check_replaceable(folder)
    tensors, aliases = collect_tensors(model, folder / WEIGHTS)
    text, identity = describe(model, aliases, folder / CONFIG)
    check_masks(model.surgery.sites, model.surgery.n, tensors, folder / WEIGHTS)  # as `load` will
    write_folder(folder, tensors, text, identity)
    return folder


def load(
    directory: str | Path, *, base: nn.Module | None = None, device: torch.device | str = "cpu", trust: bool = False
) -> ConvertedModel:
    """Load a converted model. The recorded sites and masks are used; the rule that chose them is not asked again.

    Args:
        directory: A folder that `save` wrote, or "hf-hub:user/repo" (also "user/repo", where no such folder exists).
        base: The base model, with any weights, where the folder does not say how to make it. It is not changed.
        device: Where the model is to be.
        trust: Import and run the user's own factory that the folder names. Only for folders that you wrote yourself.
    Returns:
        The model in eval mode.
    Raises:
        CheckpointError: Names the file and the key that is missing or wrong.
    """
    saved = SavedModel.read(directory)
    record, own = saved.record, restore_base(saved, base, trust)
    try:
        draft = restore_draft(saved, own)
        model = build(draft, record.sites, saved.masks, record.skipped)
        model.output = record.output
        model.temperature, model.threshold = record.temperature or 1.0, record.threshold
    except CheckpointError:
        raise
    except MasksurgeryError as error:
        raise CheckpointError(f"{saved.config}: cannot be applied to {type(own).__name__}: {error}") from error
    model.surgery = replace(model.surgery, notes=record.notes)
    model.recipe = asdict(record.base) if record.base else None
    return model.eval().to(device)


def save_calibration(directory: str | Path, *, temperature: float | None, threshold: Threshold | None) -> None:
    """Write what was fitted to a saved model into its folder; all else in it stays as it is.

    Args:
        directory: A folder that `save` wrote.
        temperature: See `ConvertedModel.temperature`; None for none.
        threshold: See `ConvertedModel.threshold`; None for none.
    Raises:
        ConfigError: The folder is on the hub, a value cannot be, or the model's task does not have the score.
        CheckpointError: The folder cannot be read or written; what was there before is as it was.
    """
    if str(directory).startswith("hf-hub:"):
        raise ConfigError(
            f"{directory} is on the hub, which nothing is written to. Save a copy first: "
            f"masksurgery.save(masksurgery.load({str(directory)!r}), 'copy')."
        )
    path = Path(directory) / CONFIG
    record = read_record(path)
    factor = 1.0 if temperature is None else check_temperature(temperature)
    if threshold is not None:
        threshold.check_task(record.task)
    text = replace(record, temperature=None if factor == 1 else factor, threshold=threshold).to_json()
    replace_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def load_base(
    directory: str | Path, *, base: nn.Module | None = None, device: torch.device | str = "cpu", trust: bool = False
) -> nn.Module:
    """Load the base model of a converted model: its architecture with the saved weights, without masks.

    Args:
        directory: As `load` takes it.
        base: The base model, with any weights, where the folder does not say how to make it. It is not changed.
        device: Where the model is to be.
        trust: Import and run the user's own factory that the folder names. Only for folders that you wrote yourself.
    Returns:
        The base model in eval mode, with the pretrained_cfg that the converted model had.
    Raises:
        CheckpointError: Names the file and the key that is missing or wrong.
    """
    return restore_base(SavedModel.read(directory), base, trust).eval().to(device)


def save_base(model: nn.Module, directory: str | Path, recipe: Mapping[str, Any] | None) -> Path:
    """Save a base model as timm writes models for the hub: `timm.create_model("local-dir:...")` reads it.

    Args:
        model: A base model.
        directory: Made if there is none. The two files are replaced, both or neither.
        recipe: What makes the model again, `ConvertedModel.recipe`; None if nobody knows.
    Returns:
        The folder.
    Raises:
        CheckpointError: The folder cannot be written.
    """
    folder, recipe = Path(directory), recipe or {}
    tensors, aliases = collect_tensors(model, folder / WEIGHTS)
    tensors |= {name: tensors[first].clone() for name, first in aliases.items()}  # timm reads every name
    cfg = plain_cfg(getattr(model, "pretrained_cfg", None)) or {}
    arguments = {k: x for k, x in recipe.get("kwargs", {}).items() if k not in ("pretrained_cfg", "num_classes")}
    config = {
        "architecture": cfg.get("architecture") or recipe.get("name"),
        "num_classes": cfg.get("num_classes"),
        "model_args": arguments,
        "pretrained_cfg": cfg,
    }
    text = json.dumps(config, indent=2)
    write_folder(folder, tensors, text, hashlib.sha256(text.encode("utf-8")).hexdigest()[:16])
    return folder

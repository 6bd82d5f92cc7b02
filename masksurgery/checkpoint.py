"""Save an ensemble to a folder, and load it again: its tensors as safetensors, everything else as JSON."""

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
from masksurgery.factory import Recipe, from_recipe
from masksurgery.folders import SavedModel, check_masks, check_replaceable, find_folder, mask_key
from masksurgery.model import ConvertedModel
from masksurgery.pack import PackedModel
from masksurgery.prediction import check_temperature
from masksurgery.rebuild import describe, plain_cfg
from masksurgery.record import Inputs, Packing, read_object, read_record
from masksurgery.restore import as_tuples, restore_base, restore_draft, restore_packed
from masksurgery.scores import Threshold
from masksurgery.types import CheckpointError, ConfigError, MasksurgeryError
from masksurgery.weights import CONFIG, WEIGHTS, collect_tensors, load_weights, replace_file, write_folder


def save(model: ConvertedModel | PackedModel, directory: str | Path, *, force: bool = False) -> Path:
    """Save a converted or packed model: its weights, its masks, and what makes it again. Nothing is pickled.

    A model that timm or torchvision can make again is loaded without further ado; for another, `load` needs `base`.

    Args:
        model: What `convert` or `pack` returned, on any device, trained or not.
        directory: Made if there is none. The two files of a model that was saved before are replaced, both or neither.
        force: Replace a config.json or a model.safetensors that is not of this package, too.
    Returns:
        The folder.
    Raises:
        CheckpointError: The folder holds other files of these names, cannot be written, or the model holds what JSON
            and safetensors cannot.
    Example:
        >>> base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> model = masksurgery.convert(base, example_inputs=(torch.ones(1, 8),)).eval()
        >>> folder = masksurgery.save(model, "ensemble")
        >>> again = masksurgery.load(folder, base=base)  # of a timm model: load(folder)
        >>> x = torch.randn(5, 8)
        >>> torch.equal(again(x).mean, model(x).mean)
        True
    """
    if not isinstance(model, (ConvertedModel, PackedModel)):
        raise ConfigError(
            f"save takes a converted or packed model, not {type(model).__name__}. Pass what convert or pack returned."
        )
    folder = Path(directory)
    if not force:
        check_replaceable(folder)
    tensors, aliases = collect_tensors(model, folder / WEIGHTS)
    packed = Packing(model.layout, model.dense, model.digest) if isinstance(model, PackedModel) else None
    if packed:
        tensors |= {mask_key(name, True): torch.from_numpy(rows) for name, rows in model.surgery.masks.items()}
    text, identity = describe(model, aliases, folder / CONFIG, packed)
    check_masks(model.surgery.sites, model.surgery.n, tensors, folder / WEIGHTS, packed is not None)  # as `load` will
    write_folder(folder, tensors, text, identity)
    return folder


def load(
    directory: str | Path, *, base: nn.Module | None = None, device: torch.device | str = "cpu", trust: bool = False
) -> ConvertedModel | PackedModel:
    """Load what `save` wrote. The recorded sites and masks are used; the rule that chose them is not asked again.

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
        converted = build(draft, record.sites, saved.masks, record.skipped)
        converted.surgery = replace(converted.surgery, notes=record.notes)
        converted.recipe = asdict(record.base) if record.base else None
        model = converted if record.packed is None else restore_packed(saved, converted)
        model.output = record.output
        model.temperature, model.threshold = record.temperature or 1.0, record.threshold
    except CheckpointError:
        raise
    except MasksurgeryError as error:
        raise CheckpointError(f"{saved.config}: cannot be applied to {type(own).__name__}: {error}") from error
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
        The base model in eval mode, with the pretrained_cfg that the converted model had, which names the size of the
        images that it was converted for.
    Raises:
        CheckpointError: Names the file and the key that is missing or wrong.
    """
    saved = SavedModel.read(directory)
    if saved.record.packed is not None:
        raise CheckpointError(
            f"{saved.config}: is of a packed model, which does not hold all weights of its base model. Read the folder "
            f"of the converted model that it was packed from."
        )
    model = restore_base(saved, base, trust)
    _set_size(model, saved.record.inputs)
    return model.eval().to(device)


def _set_size(model: nn.Module, inputs: Inputs) -> None:
    """Let the pretrained_cfg say which images a model takes; what it recommends for others goes."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    shapes = [x["shape"] for x in (*inputs.args, *inputs.kwargs.values()) if isinstance(x, Mapping) and "shape" in x]
    if cfg is None or [len(shape) for shape in shapes] != [4]:  # it takes something else
        return
    size = tuple(shapes[0][1:])
    if tuple(cfg.get("input_size") or ()) != size:
        kept = {key: value for key, value in cfg.items() if key not in ("test_input_size", "test_crop_pct")}
        model.pretrained_cfg = {**kept, "input_size": size}  # type: ignore[assignment]


def save_base(model: nn.Module, directory: str | Path, recipe: Mapping[str, Any] | None) -> Path:
    """Save a base model as timm writes models for the hub: `read_base` reads it, and timm as "local-dir:...".

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
        "num_classes": recipe.get("kwargs", {}).get("num_classes", cfg.get("num_classes")),
        "model_args": arguments,
        "pretrained_cfg": cfg,
        "recipe": recipe or None,  # timm does not look at it
    }
    text = json.dumps(config, indent=2)
    write_folder(folder, tensors, text, hashlib.sha256(text.encode("utf-8")).hexdigest()[:16])
    return folder


def read_base(directory: str | Path, *, trust: bool = False) -> nn.Module:
    """Read a base model that `save_base` wrote, or timm for the hub: its safetensors, strictly, and never a pickle.

    Args:
        directory: As `load` takes it.
        trust: Import and run the user's own factory that the folder names. Only for folders that you wrote yourself.
    Returns:
        The model in eval mode, with its pretrained_cfg.
    Raises:
        CheckpointError: Names the file, and what is missing or wrong.
    """
    folder = find_folder(directory)
    path = folder / CONFIG
    content = read_object(path)
    recipe, cfg = _read_recipe(content, path)
    if recipe.source == "factory" and not trust:
        raise CheckpointError(
            f"{path}: 'recipe' names a function of the user's, '{recipe.name}', which is not run unasked. Pass "
            f"trust=True if you wrote this folder."
        )
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder / WEIGHTS}: there is no such file, and weights of other kinds are not read. Write the folder "
            f"with safe_serialization=True (timm's save_for_hf)."
        )
    try:
        model = from_recipe(recipe)
    except ConfigError as error:
        raise CheckpointError(f"{path}: the model cannot be made: {error}") from error
    load_weights(model, folder / WEIGHTS)
    model.pretrained_cfg = cfg  # type: ignore[assignment]
    return model


def _read_recipe(content: dict[str, Any], path: Path) -> tuple[Recipe, dict[str, Any]]:
    """How the model of such a folder is made, and its pretrained_cfg."""
    cfg = content.get("pretrained_cfg")
    cfg = {key: as_tuples(value) for key, value in (cfg if isinstance(cfg, dict) else content).items()}
    names = ("architecture", "num_classes", "label_names", "label_descriptions")  # timm writes these one level up
    cfg |= {key: as_tuples(content[key]) for key in names if content.get(key) is not None}
    try:
        if content.get("recipe") is not None:
            return Recipe.from_dict(content["recipe"]), cfg
        if not isinstance(cfg.get("architecture"), str):
            raise ConfigError("'architecture' is missing, so nothing here says how to make the model. Pass it itself.")
        arguments = content.get("model_args") or {}
        if not isinstance(arguments, dict):
            raise ConfigError(f"'model_args' is {arguments!r}, not an object. Take another copy of the folder.")
        arguments = {"pretrained_cfg": cfg, **arguments}
        return Recipe.from_dict({"source": "timm", "name": cfg["architecture"], "kwargs": arguments}), cfg
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error

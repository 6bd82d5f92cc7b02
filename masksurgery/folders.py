"""The folder of a saved model: finding it, on the hub too, and reading what is in it, checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from masksurgery.record import AGAIN, Record, read_record
from masksurgery.sources import one_line
from masksurgery.types import CheckpointError, Site
from masksurgery.weights import CONFIG, WEIGHTS, read_tensors


@dataclass(frozen=True)
class SavedModel:
    """What a folder holds.

    Attributes:
        config, weights: The paths of its files, for messages.
        record: config.json.
        state: The tensors of the base model, or of the packed model, by all of their names.
        masks: Boolean [n, c] by the name of the mask module.
    """

    config: Path
    weights: Path
    record: Record
    state: dict[str, Tensor]
    masks: dict[str, np.ndarray]

    @classmethod
    def read(cls, place: str | Path) -> SavedModel:
        """Read a folder, or a repository of the hub.

        Raises:
            CheckpointError: Names the file and the key that is missing or wrong.
        """
        folder = find_folder(place)
        record = read_record(folder / CONFIG)
        tensors = _read_weights(folder / WEIGHTS, record)
        is_packed = record.packed is not None
        masks = check_masks(record.sites, record.n, tensors, folder / WEIGHTS, is_packed)
        of_masks = {mask_key(name, is_packed) for name in masks}
        state = {name: x for name, x in tensors.items() if name not in of_masks}
        return cls(folder / CONFIG, folder / WEIGHTS, record, state, masks)


def find_folder(place: str | Path) -> Path:
    """The folder, or what the hub has of this name; a CheckpointError if there is neither."""
    name = str(place)
    if isinstance(place, str) and name.startswith("hf-hub:"):
        return _download(name.removeprefix("hf-hub:"))
    folder = Path(place)
    if folder.is_dir():
        return folder
    if isinstance(place, str) and not folder.exists() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?", name):
        return _download(name)
    what = "is a file" if folder.exists() else "does not exist"
    raise CheckpointError(f"{folder}: {what}; a folder that masksurgery.save wrote, or hf-hub:user/repo, is needed.")


def _download(name: str) -> Path:
    """The folder of a hub repository: its two files, and no others."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # a network fails in many ways
        raise CheckpointError(
            f"{name}: there is no such folder, and the hub gives no repository of this name ({one_line(error)})."
        ) from error


def check_replaceable(folder: Path) -> None:
    """Raise a CheckpointError unless what `save` would replace is a model that it wrote."""
    config = folder / CONFIG
    try:
        ours = "format_version" in json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        ours = False
    for path in (config, folder / WEIGHTS):
        if path.exists() and not ours:
            raise CheckpointError(
                f"{path}: exists, and masksurgery.save did not write it. Pass another folder, or force=True."
            )


def _read_weights(path: Path, record: Record) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = read_tensors(path)
    with safe_open(path, "pt") as file:
        identity = (file.metadata() or {}).get("masksurgery", record.id)
    if identity != record.id:
        raise CheckpointError(
            f"{path}: 'masksurgery' is {identity}, but 'id' in {CONFIG} {record.id}: of two saves. {AGAIN}."
        )
    for name, first in record.aliases.items():
        if first not in tensors or name in tensors:
            fault = f"'{first}' is missing" if first not in tensors else f"'{name}' stands there twice"
            raise CheckpointError(f"{path}: {fault}, which 'aliases' in {CONFIG} names. {AGAIN}.")
        tensors[name] = tensors[first]
    return tensors


def mask_key(name: str, is_packed: bool) -> str:
    """The key that masks are saved under: in a packed model there is no module of that name."""
    return f"masks.{name}" if is_packed else f"{name}.masks"


def check_masks(
    sites: tuple[Site, ...], n: int, tensors: Mapping[str, Tensor], path: Path, is_packed: bool = False
) -> dict[str, np.ndarray]:
    """The masks by the name of their module, each checked against the record."""
    masks: dict[str, np.ndarray] = {}
    for i, site in enumerate(sites):
        key = mask_key(site.mask, is_packed)
        if site.mask in masks:
            raise CheckpointError(
                f"{path.with_name(CONFIG)}: 'sites[{i}].mask' is '{site.mask}', which another site has."
            )
        if key not in tensors:
            raise CheckpointError(f"{path}: '{key}' is missing, the masks after '{site.layer}'. {AGAIN}.")
        mask = tensors[key]
        seen = f"{str(mask.dtype).removeprefix('torch.')} of the shape {tuple(mask.shape)}"
        if mask.dtype != torch.bool or tuple(mask.shape) != (n, site.channels):
            raise CheckpointError(f"{path}: '{key}' is {seen}, not bool of the shape ({n}, {site.channels}). {AGAIN}.")
        ones = mask.sum(1).tolist()
        if ones != [site.ones] * n:
            raise CheckpointError(f"{path}: '{key}' keeps {ones} channels, not {site.ones} in each mask. {AGAIN}.")
        masks[site.mask] = mask.numpy().copy()
    return masks

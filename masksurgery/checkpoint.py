"""Save a converted model to a folder, and load it again: its tensors as safetensors, everything else as JSON."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from masksurgery.convert import Draft, build
from masksurgery.copying import copy_module
from masksurgery.factory import Recipe, from_recipe
from masksurgery.inputs import make_inputs
from masksurgery.layout import layout_of
from masksurgery.model import ConvertedModel
from masksurgery.rebuild import class_name, describe
from masksurgery.record import AGAIN, Record, read_record
from masksurgery.sources import one_line
from masksurgery.types import CheckpointError, ConfigError, ConvertConfig, MasksurgeryError, Site
from masksurgery.weights import (
    CONFIG,
    WEIGHTS,
    check_keys,
    collect_tensors,
    parameter_groups,
    read_tensors,
    write_folder,
)


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
        _check_folder(folder)
    tensors, aliases = collect_tensors(model, folder / WEIGHTS)
    text, identity = describe(model, aliases, folder / CONFIG)
    _masks(model.surgery.sites, model.surgery.n, tensors, folder / WEIGHTS)  # as `load` will
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
    folder = _find_folder(directory)
    record = read_record(folder / CONFIG)
    tensors = _read_weights(folder / WEIGHTS, record)
    masks = _masks(record.sites, record.n, tensors, folder / WEIGHTS)
    own = copy_module(base) if base is not None else _make_base(record, folder / CONFIG, trust)
    of_masks = {f"{name}.masks" for name in masks}
    _fill(own, record, {name: x for name, x in tensors.items() if name not in of_masks}, folder)
    try:
        after = None if record.after is None else [_find_class(name, own, folder / CONFIG) for name in record.after]
        draft = _trace(record, own, record.config(after), folder / CONFIG)
        _check_sites(draft, record.sites, folder / CONFIG)
        model = build(draft, record.sites, masks, record.skipped)
        model.output = record.output
    except CheckpointError:
        raise
    except MasksurgeryError as error:
        raise CheckpointError(f"{folder / CONFIG}: cannot be applied to {type(own).__name__}: {error}") from error
    model.surgery = replace(model.surgery, notes=record.notes)
    model.recipe = asdict(record.base) if record.base else None
    return model.eval().to(device)


# --- saving ----------------------------------------------------------------------------------------------------------


def _check_folder(folder: Path) -> None:
    """Raise unless what `save` would replace is a model that it wrote."""
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


# --- loading ---------------------------------------------------------------------------------------------------------


def _find_folder(place: str | Path) -> Path:
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


def _masks(sites: tuple[Site, ...], n: int, tensors: Mapping[str, Tensor], path: Path) -> dict[str, np.ndarray]:
    """The masks by the name of their module, each checked against the record."""
    masks: dict[str, np.ndarray] = {}
    for i, site in enumerate(sites):
        key = f"{site.mask}.masks"
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


def _make_base(record: Record, path: Path, trust: bool) -> nn.Module:
    if record.base is None:
        raise CheckpointError(
            f"{path}: 'base' is null: only you can make the base model, of type {record.base_type}. "
            f"Pass base=, with any weights."
        )
    if record.base.source == "factory" and not trust:
        raise CheckpointError(
            f"{path}: 'base' names a function of the user's, '{record.base.name}', which is not run unasked. Pass "
            f"base=, what it returns; or trust=True if you wrote this folder."
        )
    try:
        base = from_recipe(Recipe(record.base.source, record.base.name, record.base.kwargs))
    except ConfigError as error:
        raise CheckpointError(f"{path}: 'base' cannot be made: {error}") from error
    return base


def _fill(base: nn.Module, record: Record, state: Mapping[str, Tensor], folder: Path) -> None:
    """Give the base model the dtype, the values and the pretrained_cfg of the record."""
    path = folder / WEIGHTS
    check_keys(state, base.state_dict(), path, model=f"the base model {type(base).__name__}")
    saved = {name: {name} for name in record.aliases.values()}
    for name, first in record.aliases.items():
        saved[first].add(name)
    differ = parameter_groups(base) ^ set(map(frozenset, saved.values()))
    if differ:
        names = ", ".join(sorted(next(iter(differ))))
        where = "the base model" if next(iter(differ)) in parameter_groups(base) else "'aliases'"
        raise CheckpointError(
            f"{folder / CONFIG}: {names} are one tied parameter in {where} only. Pass the base model that was saved."
        )
    if record.dtype is not None:
        base.to(getattr(torch, record.dtype))
    for name, tensor in base.state_dict(keep_vars=True).items():
        if tensor.dtype != state[name].dtype:
            if tensor.is_floating_point() != state[name].is_floating_point():
                raise CheckpointError(
                    f"{path}: '{name}' is {state[name].dtype}, not {tensor.dtype} as in the base model. {AGAIN}."
                )
            tensor.data = tensor.data.to(state[name].dtype)
    base.load_state_dict(dict(state), strict=True)
    if record.pretrained_cfg is not None:
        base.pretrained_cfg = {key: _tuples(value) for key, value in record.pretrained_cfg.items()}  # type: ignore[assignment]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _find_class(name: str, base: nn.Module, path: Path) -> type:
    """A class of the base model's modules, or of torch.nn; nothing is imported."""
    kinds = {kind for module in base.modules() for kind in type(module).__mro__}
    kinds |= {kind for kind in vars(nn).values() if isinstance(kind, type)}
    for kind in kinds:
        if class_name(kind) == name and issubclass(kind, nn.Module):
            return kind
    raise CheckpointError(f"{path}: 'after' names {name}, which is no class of torch.nn nor of {type(base).__name__}.")


def _trace(record: Record, base: nn.Module, config: ConvertConfig, path: Path) -> Draft:
    inputs: Any
    try:
        inputs, kwargs = make_inputs({"args": list(record.inputs.args), "kwargs": record.inputs.kwargs})
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f"{path}: 'inputs' cannot be made ({one_line(error)}). {AGAIN}.") from error
    if kwargs:
        inputs = {**dict(zip(inspect.signature(base.forward).parameters, inputs, strict=False)), **kwargs}
    parts = {part.name: part.example(_submodule(base, part.name, path)) for part in record.parts} or None
    try:
        return Draft.of(base, config, inputs, parts)
    except MasksurgeryError:
        cast = tree_map(lambda leaf: _cast(leaf, record.dtype), inputs)
        if all(new is old for new, old in zip(tree_leaves(cast), tree_leaves(inputs), strict=True)):
            raise
        return Draft.of(base, config, cast, parts)  # the model was cast after it had been converted


def _submodule(base: nn.Module, name: str, path: Path) -> nn.Module:
    try:
        return base.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(f"{path}: 'parts' names '{name}', which {type(base).__name__} does not have.") from error


def _cast(leaf: Any, dtype: str | None) -> Any:
    floating = dtype is not None and isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.to(getattr(torch, dtype)) if floating else leaf  # type: ignore[arg-type]


def _check_sites(draft: Draft, sites: tuple[Site, ...], path: Path) -> None:
    """Raise unless every recorded site is a node of the trace, of the recorded shape."""
    regions = {region.name: region for region in draft.region.walk()}
    root = draft.region.traces.module
    layers = {name for name, _ in root.named_modules(remove_duplicate=False)}
    for i, site in enumerate(sites):
        nodes = {node.name: node for node in regions[site.part].traces.eval.nodes} if site.part in regions else {}
        for key, name, known in [
            ("layer", site.layer, layers),
            ("part", site.part, regions),
            ("node", site.node, nodes),
            *(("readers", name, nodes) for name in site.readers),
        ]:
            if name not in known:
                raise CheckpointError(
                    f"{path}: 'sites[{i}].{key}' names '{name}', which {type(draft.base).__name__} does not have. "
                    f"Pass the base model that was converted, or use the torch and timm that 'versions' names."
                )
        mask = site.mask.removeprefix(regions[site.part].qualified(""))
        if not re.fullmatch(r"\w+", mask) or hasattr(regions[site.part].traces.module, mask):
            raise CheckpointError(
                f"{path}: 'sites[{i}].mask' is '{site.mask}', which is no name for a new module. {AGAIN}."
            )
        facts = regions[site.part].facts[nodes[site.node]]
        shape = tuple(facts.value.shape) if isinstance(facts.value, Tensor) else ()
        layout = layout_of(facts.dims[0], site.node) if shape else None
        if layout is None or not 0 <= site.channel_dim < len(shape) or shape[site.channel_dim] != site.channels:
            raise CheckpointError(
                f"{path}: 'sites[{i}].channel_dim' is {site.channel_dim} with {site.channels} channels, but "
                f"'{site.node}' is {shape}. {AGAIN}."
            )
        found, recorded = (layout.batch_dim, layout.fold, layout.outer), (site.batch_dim, site.fold, site.outer)
        if found != recorded:
            raise CheckpointError(
                f"{path}: 'sites[{i}].batch_dim', 'fold' and 'outer' are {recorded}, but '{site.node}' has {found}. "
                f"{AGAIN}."
            )

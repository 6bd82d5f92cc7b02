"""A saved model's base model and the trace of it, made again as the record says."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from masksurgery.convert import Draft
from masksurgery.copying import copy_module
from masksurgery.factory import Recipe, from_recipe
from masksurgery.folders import SavedModel
from masksurgery.inputs import make_inputs
from masksurgery.layout import layout_of
from masksurgery.model import ConvertedModel
from masksurgery.pack import PackedModel, pack
from masksurgery.rebuild import class_name
from masksurgery.record import AGAIN, Record
from masksurgery.sources import one_line
from masksurgery.types import CheckpointError, ConfigError, ConvertConfig, MasksurgeryError, Site
from masksurgery.weights import check_keys, parameter_groups


def restore_base(saved: SavedModel, base: nn.Module | None, trust: bool) -> nn.Module:
    """The base model with the saved weights, and the dtype and the pretrained_cfg of the record.

    The folder of a packed model does not hold these weights: they are all ones then.

    Args:
        base: It, with any weights, where the record does not say how to make it. It is not changed.
        trust: Run the user's own factory that the record names.
    Raises:
        CheckpointError: It cannot be made, or is of another architecture.
    """
    record = saved.record
    own = copy_module(base) if base is not None else _make_base(record, saved.config, trust)
    if record.dtype is not None:
        own.to(getattr(torch, record.dtype))
    if record.packed is None:
        _check_state(own, saved, f"the base model {type(own).__name__}")
        _fill(own, saved)
    else:
        for parameter in own.parameters():
            parameter.data.fill_(1)  # what nobody has set yet may be NaN, and NaN is not like itself
    cfg = record.pretrained_cfg
    if cfg is not None:
        own.pretrained_cfg = {key: as_tuples(value) for key, value in cfg.items()}  # type: ignore[assignment]
    return own


def restore_draft(saved: SavedModel, base: nn.Module) -> Draft:
    """The trace of the base model that the sites of the record stand in.

    Raises:
        CheckpointError: A site is not in it.
        MasksurgeryError: The base model cannot be traced.
    """
    record, path = saved.record, saved.config
    after = None if record.after is None else [_find_class(name, base, path) for name in record.after]
    draft = _trace(record, base, record.config(after), path)
    _check_sites(draft, record.sites, path)
    return draft


def restore_packed(saved: SavedModel, converted: ConvertedModel) -> PackedModel:
    """The packed model with the saved weights.

    Args:
        converted: Of the recorded sites and masks, with any weights: what can be cut out depends on the masks alone.
    Raises:
        CheckpointError: The file has other keys, shapes or channels than what `pack` makes of it.
    """
    packing = saved.record.packed
    assert packing is not None
    model = pack(converted, packing.layout, dense=packing.dense)
    try:
        _check_state(model, saved, f"the packed model {type(model).__name__}")
        if model.digest != packing.digest:
            raise CheckpointError(f"{saved.weights}: its weights belong to other channels than are left now.")
    except CheckpointError as error:
        version = saved.record.versions.get("masksurgery")
        raise CheckpointError(
            f"{error} It was packed by masksurgery {version}: pack the converted model again, or use that version."
        ) from error
    _fill(model, saved)
    return model


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


def _check_state(model: nn.Module, saved: SavedModel, called: str) -> None:
    """Raise unless a model has the saved keys and shapes, and the same tied parameters."""
    check_keys(saved.state, model.state_dict(), saved.weights, model=called)
    tied = {name: {name} for name in saved.record.aliases.values()}
    for name, first in saved.record.aliases.items():
        tied[first].add(name)
    differ = parameter_groups(model) ^ set(map(frozenset, tied.values()))
    if differ:
        names = ", ".join(sorted(next(iter(differ))))
        where = called if next(iter(differ)) in parameter_groups(model) else "'aliases'"
        raise CheckpointError(
            f"{saved.config}: {names} are one tied parameter in {where} only. Pass the base model that was saved."
        )


def _fill(model: nn.Module, saved: SavedModel) -> None:
    """Give a model the saved dtypes and values."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        value = saved.state[name]
        if tensor.dtype != value.dtype:
            if tensor.is_floating_point() != value.is_floating_point():
                raise CheckpointError(
                    f"{saved.weights}: '{name}' is {value.dtype}, not {tensor.dtype} as in the model. {AGAIN}."
                )
            tensor.data = tensor.data.to(value.dtype)
    model.load_state_dict(saved.state, strict=True)


def as_tuples(value: Any) -> Any:
    """A value of JSON with tuples for its lists."""
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


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

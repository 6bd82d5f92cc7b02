"""What `save` records of a model, and the recipe of its base model, which is checked by making it."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from masksurgery.ensemble import Ensemble
from masksurgery.factory import SHAPING, Recipe, from_recipe, is_timm_name
from masksurgery.layers import Members, Repeat, _Masksembles
from masksurgery.model import ConvertedModel
from masksurgery.opaque import Follow, Opaque
from masksurgery.part import Part
from masksurgery.prediction import Head
from masksurgery.record import FORMAT_VERSION, BaseRecipe, Inputs, Packing, PartInputs, Record
from masksurgery.types import CheckpointError, ConfigError
from masksurgery.weights import parameter_groups

CALLER_SUPPLIES = "the caller supplies the base model: masksurgery.load(folder, base=...)"

INSERTED = (_Masksembles, Members, Repeat, Head, Opaque, Follow)


def describe(model: Ensemble, aliases: Mapping[str, str], path: Path, packed: Packing | None = None) -> tuple[str, str]:
    """The text of config.json, and its id.

    Args:
        aliases: The further names of tied parameters, by the name that they are saved under.
        path: For the message.
        packed: What packs a packed model again.
    Raises:
        CheckpointError: The example inputs are not what JSON holds.
    """
    surgery, config = model.surgery, model.settings
    recipe = find_recipe(model)
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    record = Record(
        format_version=FORMAT_VERSION,
        versions={name: version_of(name) for name in ("masksurgery", "torch", "timm")},
        id="",
        base=BaseRecipe(recipe.source, recipe.name, recipe.kwargs) if recipe else None,
        base_type=class_name(model._base_type),
        base_note=None if recipe and recipe.source != "factory" else CALLER_SUPPLIES,
        n=int(surgery.n),
        scale=float(surgery.scale),
        seed=int(surgery.seed),
        task=config.task,
        class_dim=int(config.class_dim),
        train_mode=model.members_module.train_mode if isinstance(model, ConvertedModel) else config.train_mode,
        rescale=bool(config.rescale),
        heteroscedastic=bool(config.heteroscedastic),
        unbatched=config.unbatched,
        after=None if config.after is None else tuple(map(class_name, config.after)),
        where=config.where,
        tie=config.tie,
        multiple_of=int(config.multiple_of),
        heads=bool(config.heads),
        output=cast(Any, model.head_module.output),
        dtype=str(dtypes[0]).removeprefix("torch.") if dtypes else None,
        inputs=Inputs(tuple(model.inputs["args"]), dict(model.inputs["kwargs"])),
        parts=tuple(PartInputs.of(name, example) for name, example in model.parts.items()),
        sites=surgery.sites,
        skipped=surgery.skipped,
        notes=surgery.notes,
        aliases=dict(aliases),
        pretrained_cfg=plain_cfg(getattr(model, "pretrained_cfg", None)),
        temperature=None if model.head_module.temperature == 1 else model.head_module.temperature,
        threshold=model._threshold,
        packed=packed,
    )
    try:
        identity = hashlib.sha256(record.to_json().encode("utf-8")).hexdigest()[:16]
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: inputs={model.inputs!r} cannot be written as JSON ({error}). Convert with "
            f"example_inputs of tensors, numbers, strings and None."
        ) from error
    return replace(record, id=identity).to_json(), identity


def version_of(package: str) -> str:
    """The version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # used from its source tree
        return "unknown"


def class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def plain_cfg(cfg: Any) -> dict[str, Any] | None:
    """The part of timm's pretrained_cfg that JSON holds, without places on this machine."""
    cfg = cfg.to_dict() if hasattr(cfg, "to_dict") else cfg
    if not isinstance(cfg, Mapping):
        return None
    plain = {}
    for key, value in cfg.items():
        with contextlib.suppress(TypeError, ValueError):
            if key not in ("file", "state_dict"):
                plain[str(key)] = json.loads(json.dumps(value, allow_nan=False))
    return plain


def find_recipe(model: Ensemble) -> Recipe | None:
    """A recipe that makes the base model again: the same modules, with the same settings, keys and shapes.

    Returns:
        None if only the caller can make it. A recipe of the user's own factory is not tried, for that would run it;
        nor is that of a packed model, whose modules are others: it was tried when the model was packed.
    """
    given = Recipe.from_dict(model.recipe) if model.recipe else None
    if not isinstance(model, ConvertedModel):
        return given
    for recipe in [given] if given else _guesses(model):
        try:
            written = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict(), allow_nan=False)))
        except (TypeError, ValueError):  # an argument that JSON cannot hold
            continue
        if written.source == "factory" or reproduces(model, written):
            return written
    return None


def reproduces(model: ConvertedModel, recipe: Recipe) -> bool:
    """The recipe makes a model of the same modules, settings, keys and shapes; values are not compared."""
    try:
        twin = from_recipe(recipe, "meta")
    except ConfigError:
        return False
    ours, theirs = ({name: x.shape for name, x in m.state_dict().items()} for m in (model, twin))
    masks = {f"{site.mask}.masks" for site in model.surgery.sites}
    if theirs != {name: shape for name, shape in ours.items() if name not in masks}:
        return False
    if parameter_groups(model) != parameter_groups(twin) or model._base_type is not type(twin):
        return False
    modules = {name: m for name, m in model.named_modules() if name and not isinstance(m, INSERTED)}
    twins = {name: m for name, m in twin.named_modules() if name}
    if set(modules) != set(twins) or not all(_same_settings(modules[name], twins[name]) for name in twins):
        return False
    own = _plain(model)
    return all(own.get(name, value) == value for name, value in _plain(twin).items())


def _same_settings(one: nn.Module, other: nn.Module) -> bool:
    kind = one._base_type if isinstance(one, Part) else type(one)
    return kind is type(other) and one.extra_repr() == other.extra_repr() and _plain(one) == _plain(other)


def _plain(module: nn.Module) -> dict[str, Any]:
    """The attributes that are numbers, strings, truth values or tuples of them, such as a rate that no repr shows."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, (tuple, list)):
            return all(map(is_plain, value))
        return value is None or isinstance(value, (bool, int, float, str))

    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and is_plain(value)
    }


def _guesses(model: ConvertedModel) -> Iterator[Recipe]:
    """Recipes for a model that timm made, by what it says of itself."""
    cfg = getattr(model, "pretrained_cfg", None)
    if (
        not isinstance(cfg, Mapping)
        or not isinstance(cfg.get("architecture"), str)
        or not is_timm_name(cfg["architecture"])
    ):
        return
    kwargs: dict[str, Any] = {}
    size = list(cfg.get("input_size") or (3, 224, 224))
    if getattr(model, "drop_rate", None):
        kwargs["drop_rate"] = model.drop_rate
    paths = [module for module in model.modules() if type(module).__name__ == "DropPath"]
    drop_path = max((float(getattr(module, "drop_prob", 0) or 0) for module in paths), default=0)
    if drop_path:
        kwargs["drop_path_rate"] = drop_path  # of the last block; timm raises it from zero block by block
    shape = _shape(model, cfg)
    said = {"num_classes": cfg.get("num_classes"), "in_chans": size[0], "img_size": size[1:]}
    differ = {key: value for key, value in shape.items() if value != said[key]}
    if cfg.get("tag") and is_timm_name(f"{cfg['architecture']}.{cfg['tag']}"):
        for chosen in (differ, shape):  # the second where the pretrained_cfg was changed after the model was made
            yield Recipe("timm", f"{cfg['architecture']}.{cfg['tag']}", {**chosen, **kwargs})
    shaping = {key: cfg[key] for key in SHAPING if key in cfg}
    yield Recipe("timm", cfg["architecture"], {**differ, **kwargs, "pretrained_cfg": shaping})


def _shape(model: ConvertedModel, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of timm's models that say what shape their inputs and outputs have, as far as the model tells."""
    image = getattr(getattr(model, "patch_embed", None), "img_size", None)
    found = {
        "num_classes": getattr(model, "num_classes", None),
        "in_chans": _input_channels(model, cfg.get("first_conv")),
        "img_size": list(image) if isinstance(image, (tuple, list)) else None,
    }
    return {key: value for key, value in found.items() if isinstance(value, (int, list))}


def _input_channels(model: nn.Module, first: Any) -> int | None:
    name = first[0] if isinstance(first, (tuple, list)) and first else first
    stem = dict(model.named_modules()).get(name) if isinstance(name, str) else None
    channels = getattr(stem, "in_channels", None)
    return channels if isinstance(channels, int) else None

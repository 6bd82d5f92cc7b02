"""The variants of a saved model that are measured side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from masksurgery.checkpoint import load, load_base
from masksurgery.ensemble import Ensemble
from masksurgery.factory import Recipe, from_recipe
from masksurgery.input_repeat import repeat_inputs
from masksurgery.inputs import describe, describe_inputs, placeholder_values
from masksurgery.macs import sample_inputs
from masksurgery.pack import PackedModel, pack
from masksurgery.types import ConfigError, check_choice
from masksurgery.variants import Variant

BASE, REPEAT, LATE, PACKED = "base", "repeat", "late", "packed"
AGAINST = (BASE, REPEAT, LATE)


def open_variants(directory: str | Path, against: Sequence[str] | None = None, *, trust: bool = False) -> list[Variant]:
    """The packed model of a folder, and what it is to be compared with.

    Args:
        directory: Of a converted or a packed model, as `load` takes it.
        against: "base", "repeat" (all inputs are repeated n times) and "late" (the converted model); None for all that
            the folder allows: a packed model's holds no weights of the base model, which is made with others.
        trust: As `load` takes it.
    Returns:
        In the order of `AGAINST`, the packed model last.
    Raises:
        ConfigError: There is no such variant, or the folder does not hold it.
        CheckpointError: The folder cannot be read.
    """
    check_against(against or ())
    model = load(directory, trust=trust)
    is_packed = isinstance(model, PackedModel)
    wanted = against if against is not None else (BASE,) if is_packed else AGAINST
    if is_packed and (missing := [name for name in wanted if name != BASE]):
        raise ConfigError(
            f"{directory} holds a packed model, which {' and '.join(missing)} cannot be made of. Give the folder of "
            f"the converted model that it was packed from, or --against base."
        )
    base = _make(BASE, model, directory, trust)
    packed = _make(PACKED, model, directory, trust)
    assert isinstance(packed, PackedModel)
    chosen = {"layout": packed.layout, "dense": packed.dense}  # which the other process is not to choose again
    made = {BASE: base, PACKED: packed}
    details = {PACKED: {**chosen, "barriers": len(packed.barriers)}}
    return [
        Variant(
            name,
            made[name] if name in made else _make(name, model, directory, trust),
            partial(_describe, base, model, name == BASE),
            partial(make_variant, name, directory, trust, **chosen),
            details.get(name, {}),
        )
        for name in (*(name for name in AGAINST if name in wanted), PACKED)
    ]


def check_against(names: Sequence[str]) -> None:
    """Raise a ConfigError for a name that is no variant to compare with."""
    for name in names:
        check_choice("against", name, AGAINST)


def make_variant(
    name: str, directory: str | Path, trust: bool = False, layout: str = "auto", dense: bool | None = None
) -> nn.Module:
    """One variant of the model in a folder."""
    return _make(name, load(directory, trust=trust), directory, trust, layout, dense)


def _make(
    name: str, model: Ensemble, directory: str | Path, trust: bool, layout: str = "auto", dense: bool | None = None
) -> nn.Module:
    if name == BASE and isinstance(model, PackedModel):
        return _fill(from_recipe(Recipe.from_dict(model.recipe or {})))
    if name == BASE:
        return load_base(directory, trust=trust)
    if name == REPEAT:
        return repeat_inputs(model)
    return pack(model, layout, dense=dense) if name == PACKED and not isinstance(model, PackedModel) else model


@torch.no_grad()
def _fill(model: nn.Module) -> nn.Module:
    """Weights that keep activations near 1: what is denormal or no number is computed at another speed."""
    generator = torch.Generator().manual_seed(0)
    for name, x in model.named_parameters():
        if x.dim() > 1:
            x.normal_(0, (x.numel() / len(x)) ** -0.5, generator=generator)
        else:
            x.fill_(float(name.endswith("weight")))
    return model


def _describe(base: nn.Module, model: Ensemble, of_base: bool, samples: int) -> Mapping[str, Any]:
    """The inputs of a forward: the graphs of ensembles take by name what was an input, and no constants."""
    bound = sample_inputs(base, model, samples)
    return describe_inputs(bound) if of_base else {"args": [], "kwargs": describe(placeholder_values(bound))}

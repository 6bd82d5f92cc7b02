"""The variants of a saved model that are measured side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from masksurgery.checkpoint import load, load_base
from masksurgery.ensemble import Ensemble
from masksurgery.factory import Recipe, from_recipe
from masksurgery.input_repeat import repeat_inputs
from masksurgery.inputs import describe, describe_inputs, placeholder_values
from masksurgery.macs import sample_inputs
from masksurgery.model import ConvertedModel
from masksurgery.pack import PackedModel, pack
from masksurgery.pack.building import Layout
from masksurgery.types import ConfigError, check_choice
from masksurgery.variants import Conditions, Variant, fill_weights

BASE, REPEAT, LATE, PACKED = "base", "repeat", "late", "packed"
AGAINST = (BASE, REPEAT, LATE)


def open_variants(
    directory: str | Path, against: Sequence[str] | None, conditions: Conditions, *, trust: bool = False
) -> list[Variant]:
    """The packed model of a folder, and what it is to be compared with.

    Args:
        directory: Of a converted or a packed model, as `load` takes it.
        against: "base", "repeat" (all inputs are repeated n times) and "late" (the converted model); None for all that
            the folder allows: a packed model's holds no weights of the base model, which is made with others.
        conditions: Of the measurement, under which the model is packed too: "auto" is what is faster there.
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
            f"{directory} holds a packed model, and '{missing[0]}' needs the converted one. Give the folder that it "
            f"was packed from, or --against base."
        )
    base = _make(BASE, model, directory, trust)
    with conditions.hold():
        packed = _make(PACKED, conditions.prepare(model), directory, trust)
    assert isinstance(packed, PackedModel)
    made, details = {BASE: base, PACKED: packed}, {PACKED: describe_packed(packed)}
    return [
        Variant(
            name,
            made[name] if name in made else _make(name, model, directory, trust),
            partial(describe_call, base, model, name == BASE),
            # What "auto" has chosen here is not to be chosen again elsewhere.
            partial(make_variant, name, directory, trust, packed.layout, packed.dense),
            details.get(name, {}),
        )
        for name in (*(name for name in AGAINST if name in wanted), PACKED)
    ]


def check_against(names: Sequence[str]) -> None:
    """Raise a ConfigError for a name that is no variant to compare with."""
    for name in names:
        check_choice("against", name, AGAINST)


def describe_packed(model: PackedModel) -> dict[str, Any]:
    """What there is to know of a packed model beside its figures."""
    return {"layout": model.layout, "dense": model.dense, "barriers": len(model.barriers)}


def make_variant(
    name: str, directory: str | Path, trust: bool = False, layout: Layout = "auto", dense: bool | None = None
) -> nn.Module:
    """One variant of the model in a folder."""
    return _make(name, load(directory, trust=trust), directory, trust, layout, dense)


def _make(
    name: str, model: nn.Module, directory: str | Path, trust: bool, layout: Layout = "auto", dense: bool | None = None
) -> nn.Module:
    if isinstance(model, ConvertedModel):
        made: dict[str, Callable[[], nn.Module]] = {
            BASE: lambda: load_base(directory, trust=trust),
            REPEAT: lambda: repeat_inputs(model),
            LATE: lambda: model,
            PACKED: lambda: pack(model, layout, dense=dense),
        }
        return made[name]()
    assert isinstance(model, PackedModel)
    return fill_weights(from_recipe(Recipe.from_dict(model.recipe or {}))) if name == BASE else model


def describe_call(base: nn.Module, model: Ensemble, of_base: bool, samples: int) -> Mapping[str, Any]:
    """The inputs of a forward of so many samples; an ensemble takes by name what was an input, and no constants."""
    bound = sample_inputs(base, model, samples)
    return describe_inputs(bound) if of_base else {"args": [], "kwargs": describe(placeholder_values(bound))}

"""The numbers of the smallest architecture of every family of timm: its members against the base model under masks.

With random parameters, at the smallest images, in float64, drop rates above zero; about ten minutes on one core, of
which CI takes another eighth with each commit (`selection.py`). Families of large architectures are left out.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import masksurgery
import smallest
from families import FAMILIES, LIMIT, RECORD, TOO_LARGE, cases, prepare
from masksurgery.model import ConvertedModel
from oracles import flips_found

FAILURES: dict[str, str] = {}
MEMBERS, SCALE = 3, 1.5


def members_of(model: ConvertedModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        members: Tensor = model.eval()(x).members
    return members


@pytest.mark.zoo
@pytest.mark.timeout(900)  # halonet takes images of 256 pixels at least: two minutes
@pytest.mark.parametrize("entry", cases(FAILURES))
def test_numbers(entry: dict[str, Any]) -> None:
    base, many = prepare(entry)
    x = many[:3]
    model = masksurgery.convert(base, n=MEMBERS, scale=SCALE, example_inputs=(x,))
    check_members(model, base, x)
    check_isolation(model, base, x)
    masksurgery.verify(model, base, many, mode="train")
    site = random.Random(entry["name"]).choice(model.surgery.sites)
    assert flips_found(model, base, site.mask, (x,)), site


def check_members(model: ConvertedModel, base: nn.Module, x: Tensor) -> None:
    """Every member is the base model under its masks, and neither they nor the samples are all alike."""
    proof = masksurgery.verify(model, base, x)
    assert proof.difference > 1e-3 * proof.largest
    members = members_of(model, x)
    assert (members - members[:1]).abs().max() > 1e-3 * members.abs().max()


def check_isolation(model: ConvertedModel, base: nn.Module, x: Tensor) -> None:
    """What becomes of one sample or of the masks of one member changes no other.

    Nan reaches no other sample either, if it does not in the base model (csatv2 compares samples, all of them alike).
    """
    before = members_of(model, x)
    size = before.abs().max()
    other, broken = x.clone(), x.clone()
    other[1], broken[1] = x[1].flip(-1), float("nan")
    after = members_of(model, other)
    assert (after[[0, 2]] - before[[0, 2]]).abs().max() <= 1e-12 * size
    assert (after[1] - before[1]).abs().max() > 1e-6 * size
    after = members_of(model, broken)
    assert after[1].isnan().all()
    with torch.no_grad():
        if base(broken)[[0, 2]].isfinite().all():
            assert torch.equal(after[[0, 2]], before[[0, 2]])
    rolled = [model.get_submodule(site.mask) for site in model.surgery.sites]
    for module in rolled:
        module.masks[1] = module.masks[1].roll(1)
    after = members_of(model, x)
    for module in rolled:
        module.masks[1] = module.masks[1].roll(-1)
    assert (after[:, [0, 2]] - before[:, [0, 2]]).abs().max() <= 1e-12 * size
    assert not torch.equal(after[:, 1], before[:, 1])


def test_every_family_is_in_the_record() -> None:
    """smallest.json is that of timm's families; of another version, it says which of them are new."""
    if RECORD["timm"] != timm.__version__:
        missing = smallest.families().keys() - FAMILIES.keys()
        pytest.skip(
            f"smallest.json is of timm {RECORD['timm']}, not {timm.__version__}; new families: {sorted(missing)}"
        )
    assert smallest.families().keys() == FAMILIES.keys()
    assert {family for family, entry in FAMILIES.items() if entry["parameters"] > LIMIT} == TOO_LARGE.keys()
    assert len(FAILURES) <= 3

"""The numbers of the smallest architecture of every family of timm: its members against the base model under masks.

With random parameters, at the smallest images, in float64, drop rates above zero; about ten minutes on one core, of
which CI takes another quarter with each commit (`selection.py`). Families whose smallest architecture has more than 60
million parameters are left out: TOO_LARGE names them.
"""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import masksurgery
import smallest
from masksurgery.model import ConvertedModel
from nets import randomise
from oracles import flips_found
from selection import chosen, commit

LIMIT = 60_000_000
RECORD: dict[str, Any] = json.loads(smallest.PATH.read_text(encoding="utf-8"))
FAMILIES: dict[str, dict[str, Any]] = RECORD["families"]
TOO_LARGE = {
    "beit": "86.5 M parameters", "deepseek_vit": "412 M", "gemma4_vit": "167 M", "mobilenetv5": "82.6 M",
    "naflexvit": "86.5 M", "nasnet": "88.8 M", "pnasnet": "86.1 M", "qwen3_vit": "87.4 M", "vgg": "133 M",
    "vision_transformer_sam": "86.5 M",
}  # fmt: skip
FAILURES: dict[str, str] = {}
MEMBERS, SCALE = 3, 1.5


def _cases() -> list[Any]:
    cases = []
    for family in FAMILIES.keys() - TOO_LARGE.keys():
        name = FAMILIES[family]["name"]
        marks = []
        if not timm.is_model(name):
            marks.append(pytest.mark.skip(reason="the installed timm does not have it"))
        elif not chosen(family):
            marks.append(pytest.mark.skip(reason=f"not in the quarter that commit {commit()[:12]} chooses"))
        if name in FAILURES:
            marks.append(pytest.mark.xfail(reason=FAILURES[name], strict=True))
        cases.append(pytest.param(FAMILIES[family], id=f"{family}-{name}", marks=marks))
    return sorted(cases, key=lambda case: str(case.id))


def prepare(entry: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """The architecture with random parameters, and images for a training step.

    Of small images there are more, because at the end of most networks they are a pixel each: over a few values the
    statistics of BatchNorm amplify rounding until it is no longer rounding. The running statistics have seen the images
    once; with random ones repvit is 1e10 and has members of 1e18. A fifth of them stays random: no variance is zero.
    """
    base = randomise(timm.create_model(entry["name"], num_classes=10, **entry["kwargs"])).double()
    batch, size = (16 if entry["size"] <= 64 else 5), entry["size"]
    shape = batch, base.default_cfg["input_size"][0], size, size
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for module in base.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.8
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        base.train()(x)
    return base.eval(), x


def members_of(model: ConvertedModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        members: Tensor = model.eval()(x).members
    return members


@pytest.mark.zoo
@pytest.mark.timeout(900)  # halonet takes images of 256 pixels at least: two minutes
@pytest.mark.parametrize("entry", _cases())
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

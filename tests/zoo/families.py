"""The smallest architecture of every family of timm, as the tests of the zoo take them.

Families whose smallest architecture has more than 60 million parameters are left out where it needs weights: TOO_LARGE
names them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import smallest
from nets_base import randomise, settle
from selection import chosen, commit

LIMIT = 60_000_000
RECORD: dict[str, Any] = json.loads(smallest.PATH.read_text(encoding="utf-8"))
FAMILIES: dict[str, dict[str, Any]] = RECORD["families"]
TOO_LARGE = {
    "beit": "86.5 M parameters", "deepseek_vit": "412 M", "gemma4_vit": "167 M", "mobilenetv5": "82.6 M",
    "naflexvit": "86.5 M", "nasnet": "88.8 M", "pnasnet": "86.1 M", "qwen3_vit": "87.4 M", "vgg": "133 M",
    "vision_transformer_sam": "86.5 M",
}  # fmt: skip


def cases(failures: Mapping[str, str], subject: str = "", parts: int = 8) -> list[Any]:
    """What a test is parametrised with: a family's entry in smallest.json.

    Args:
        failures: Architecture to why it fails.
        subject: Of the test; each has a part of the zoo of its own.
        parts: Of how many parts CI takes one.
    """
    found = []
    for family in FAMILIES.keys() - TOO_LARGE.keys():
        name = FAMILIES[family]["name"]
        marks = []
        if not timm.is_model(name):
            marks.append(pytest.mark.skip(reason="the installed timm does not have it"))
        elif not chosen(subject + family, parts):
            marks.append(pytest.mark.skip(reason=f"not in the part that commit {commit()[:12]} chooses"))
        if name in failures:
            marks.append(pytest.mark.xfail(reason=failures[name], strict=True))
        found.append(pytest.param(FAMILIES[family], id=f"{family}-{name}", marks=marks))
    return sorted(found, key=lambda case: str(case.id))


def prepare(entry: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    """The architecture with random parameters, and images for a training step.

    Of small images there are more, because at the end of most networks they are a pixel each: over a few values the
    statistics of BatchNorm amplify rounding until it is no longer rounding. With random running statistics repvit is
    1e10 and has members of 1e18.
    """
    base = randomise(timm.create_model(entry["name"], num_classes=10, **entry["kwargs"])).double()
    batch, size = (16 if entry["size"] <= 64 else 5), entry["size"]
    shape = batch, base.default_cfg["input_size"][0], size, size
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return settle(base, x).eval(), x

"""Conversions that are cheaper to pack: aligned kept counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import masksurgery
from oracles import FOUR, images, small


def converted(name: str, **options) -> tuple[masksurgery.ConvertedModel, nn.Module, torch.Tensor]:
    base, x = small(name), images(name, 2)
    return masksurgery.convert(base, example_inputs=(x,), **options), base, x


def assert_restored(model: masksurgery.ConvertedModel, base: nn.Module, x: torch.Tensor, folder: Path) -> None:
    """A saved model comes back with its record, its settings, its masks and its predictions."""
    masksurgery.save(model, folder)
    again = masksurgery.load(folder, base=base)
    assert again.surgery == model.surgery and again.surgery.sites == model.surgery.sites
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    for name in ("multiple_of",):
        assert getattr(again.settings, name) == getattr(model.settings, name)
    with torch.no_grad():
        assert torch.equal(again(x).members, model.eval()(x).members)


# --- multiple_of -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUR)
def test_kept_counts_are_multiples(name: str, tmp_path: Path) -> None:
    model, base, x = converted(name, multiple_of=8)
    sites = model.surgery.sites
    assert all(site.ones % 8 == 0 or site.channels <= 8 for site in sites)
    plain = masksurgery.convert(base, example_inputs=(x,)).surgery.sites
    assert [site.layer for site in sites] == [site.layer for site in plain]
    assert [site.ones for site in sites] == [
        masksurgery.generate_masks(site.channels, 4, 2.0, multiple_of=8)[0].sum() for site in plain
    ]
    assert masksurgery.verify(model, base, x).relative <= 1e-12
    assert_restored(model, base, x, tmp_path / "model")

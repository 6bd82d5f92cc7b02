"""The masks of a conversion: which random numbers each site draws its own from, and which sites share them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from masksurgery.masks import generate_masks, site_seed
from masksurgery.types import ConvertConfig, Site


def draw_masks(sites: Sequence[Site], config: ConvertConfig) -> dict[str, np.ndarray]:
    """Draw the masks of every site, and of every residual stream, from random numbers of its own.

    Args:
        sites: In the order of the graph; they need no `ones` yet.
        config: The members, the scale, the seed and the rounding.
    Returns:
        Boolean [n, c] by the name of the mask.
    Raises:
        MaskError: There are no such masks.
    """
    masks: dict[str, np.ndarray] = {}
    for site in sites:
        first = masks.get(site.stream)
        masks[site.mask] = _draw(site, config) if first is None else first.copy()
    return masks


def _draw(site: Site, config: ConvertConfig) -> np.ndarray:
    name = f"stream of {site.layer}" if site.stream else site.layer
    seed = site_seed(config.seed, name, site.call)
    drawn, width = (site.heads, site.channels // site.heads) if site.heads else (site.channels, 1)
    multiple_of = config.multiple_of // math.gcd(config.multiple_of, width)  # of heads, to be one of channels
    return generate_masks(drawn, config.n, config.scale, seed=seed, multiple_of=multiple_of).repeat(width, axis=1)

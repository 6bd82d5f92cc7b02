"""The masks of a conversion: which stream of random numbers each site draws its own from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from masksurgery.masks import generate_masks, site_seed
from masksurgery.types import ConvertConfig, Site


def draw_masks(sites: Sequence[Site], config: ConvertConfig) -> dict[str, np.ndarray]:
    """Draw the masks of every site, from a stream of random numbers of its own.

    Args:
        sites: They need no `ones` yet.
        config: The members, the scale, the seed and the rounding.
    Returns:
        Boolean [n, c] by the name of the mask.
    Raises:
        MaskError: There are no such masks.
    """
    return {
        site.mask: generate_masks(
            site.channels,
            config.n,
            config.scale,
            seed=site_seed(config.seed, site.layer, site.call),
            multiple_of=config.multiple_of,
        )
        for site in sites
    }

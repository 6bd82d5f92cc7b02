"""Masks drawn from the law of Masksembles itself, in milliseconds and for every width.

The law: uniform over all ordered coverings of c channels by n subsets of m channels each.

It is what the method of the paper draws from: n subsets of M positions, again and again until their union has size c,
which is then renumbered 0..c-1. Each covering of each c positions out of the M is equally likely there, so the
result does not depend on M, and M is free to be chosen where the union is likely to have size c.

The subsets need not be drawn to know the size of their union. With union size u, the next subset brings f fresh
positions with the hypergeometric probability C(M-u, f) C(u, m-f) / C(M, m). The product of C(M-u, f) along a chain of
union sizes that ends at c is M! / ((M-c)! prod f!), in which M is a constant factor: the chain, too, has one law,

    P(f_1, ..., f_n)  proportional to  prod_k  C(u_k, m - f_k) / f_k!,   u_k = f_1 + ... + f_{k-1},   sum f_k = c.

Given the chain, each fresh part is uniform among the channels not used so far, each other part among the used ones.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from masksurgery.types import MaskError, check_masks_arguments, check_multiple

Seed = int | Sequence[int] | np.random.SeedSequence | np.random.Generator | None

TRIES = 128  # chains in one vectorised draw: a few such draws even where one chain in 170 ends at c
UNIVERSE_LIMIT = 10**9  # numpy's hypergeometric takes no larger populations


def generate_masks(channels: int, n: int, scale: float, *, seed: Seed = None, multiple_of: int = 1) -> np.ndarray:
    """Draw n masks that together use every channel.

    Args:
        channels: Length c of a mask.
        n: Number of masks.
        scale: At least 1, where all masks are full; the larger, the less two masks overlap.
        seed: What `numpy.random.default_rng` takes; None draws fresh entropy. The global state is never touched.
        multiple_of: The number of ones is rounded up to a multiple of it; see `kept_channels`.
    Shape:
        Result (n, c).
    Returns:
        Boolean; row i is member i's mask and has exactly `kept_channels(channels, n, scale, multiple_of)` ones.
    Raises:
        MaskError: An argument has a value that it cannot have.
    Source:
        Durasov et al. 2021, arXiv:2012.08334, section 3.
    Example:
        >>> masks = masksurgery.generate_masks(10, n=4, scale=2.0, seed=0)
        >>> masks.sum(axis=1)  # ones of each member
        array([5, 5, 5, 5])
        >>> bool(masks.any(axis=0).all())  # every channel is in use
        True
    """
    ones = kept_channels(channels, n, scale, multiple_of)
    channels, n, rng = int(channels), int(n), _generator(seed)  # numpy's small integers overflow
    if ones == channels:
        return np.ones((n, channels), dtype=bool)
    universe = _universe(channels, n, ones)
    if universe is None:
        fresh = _chain_by_weights(channels, n, ones, rng)
    else:
        fresh = _chain_by_rejection(channels, n, ones, universe, rng)
    return _fill(channels, ones, fresh, rng)


def kept_channels(channels: int, n: int, scale: float, multiple_of: int = 1) -> int:
    """Number of ones m in each of n masks: what makes c the expected size of their union, if that is enough to cover.

    m = max(floor(c / (scale (1 - (1 - 1/scale)^n))), ceil(c / n), 1), at most c.

    Then it is rounded up to a multiple, so that no member is smaller than `scale` asks for. Rounding never fills a
    mask, which would make the members equal: where the next multiple is c or more, the largest one below c is taken,
    and where there is none (c at most `multiple_of`), m stays as it is. Masks that are full anyway stay full.

    Raises:
        MaskError: channels, n or multiple_of is not a positive integer, or scale is not a finite number of at least 1.
    Source:
        Durasov et al. 2021, arXiv:2012.08334, section 3.
    """
    check_masks_arguments(n, scale)
    check_multiple(multiple_of)
    if isinstance(channels, bool) or not isinstance(channels, (int, np.integer)) or channels < 1:
        raise MaskError(f"channels={channels!r} is not a number of channels. Pass an integer of at least 1.")
    channels, n = int(channels), int(n)
    if n == 1 or scale == 1:
        return channels
    scale = float(min(scale, 10**300) if isinstance(scale, int) else scale)  # 10**400 is no float
    quotient = channels / growth(scale, n) * (1 + 1e-12)  # a whole number must not be floored to the one below
    return _rounded(min(channels, max(math.floor(quotient), -(-channels // n), 1)), channels, int(multiple_of))


def growth(scale: float, n: int) -> float:
    """c / m: how many times the channels of one mask the union of n masks is expected to have; scale above 1."""
    return -scale * math.expm1(n * math.log1p(-1 / scale))  # scale (1 - (1 - 1/scale)^n), which cancels if it is large


def _rounded(ones: int, channels: int, multiple: int) -> int:
    """A multiple between `ones` and `channels`, if it can be.

    The largest one below c is at least c/2, so that the masks still cover: there are two of them or more.
    """
    largest = (channels - 1) // multiple * multiple
    if ones == channels or not largest:
        return ones
    return min(-(-ones // multiple) * multiple, largest)


def site_seed(seed: int, layer: str, call: int) -> int:
    """Seed of the masks of one site, the same in every process and on every machine.

    Args:
        seed: The seed of the whole conversion.
        layer: Qualified name of the site's layer.
        call: Which call of that layer, from 0.
    Returns:
        An integer of 128 bits. Sites that differ in any of the three have independent streams.
    """
    text = f"{int(seed)}/{int(call)}/{layer}"  # the name last: it may hold a slash, the numbers cannot
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:16], "little")


def _generator(seed: Any) -> np.random.Generator:
    try:
        return np.random.default_rng(seed)
    except (TypeError, ValueError) as error:
        raise MaskError(
            f"generate_masks: seed={seed!r} is not what numpy.random.default_rng takes ({error}). "
            "Pass a non-negative integer, a sequence of them, or None for fresh entropy."
        ) from error


def _universe(channels: int, n: int, ones: int) -> int | None:
    """The smallest M at least c for which the union is expected within 1/2 of c; None if above numpy's limit.

    The expected union M (1 - (1 - m/M)^n) grows with M, by less than 1 a step, and is at most c at M = c.
    """

    def is_enough(universe: int) -> bool:
        return -universe * math.expm1(n * math.log1p(-ones / universe)) >= channels - 0.5

    low, high = channels, UNIVERSE_LIMIT - 1
    if low > high or not is_enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low


def _chain_by_rejection(channels: int, n: int, ones: int, universe: int, rng: np.random.Generator) -> np.ndarray:
    """Fresh channels of each mask: chains in a universe of M positions, the first that ends at c.

    This ends soon: the union's size is distributed as a constant plus a sum of independent 0/1 variables (Vatutin and
    Mikhailov 1982), of mean within 1/2 of c, so that c is its mode or next to it, and of a variance below c.

    Shape:
        Result (n,), integers that sum to c.
    """
    fresh = np.empty((n, TRIES), dtype=np.int64)
    while True:
        fresh[0] = union = np.full(TRIES, ones)
        for k in range(1, n):
            fresh[k] = rng.hypergeometric(universe - union, union, ones)
            union = union + fresh[k]
        (kept,) = np.nonzero(union == channels)
        if kept.size:
            return fresh[:, kept[0]]


def _chain_by_weights(channels: int, n: int, ones: int, rng: np.random.Generator) -> np.ndarray:
    """The same law without a universe: for wide masks that hardly overlap, for which M would be vast.

    State t is the overlap so far (union u = k m - t after k masks), d = n m - c in the end. A step with overlap o
    weighs C(u, o) m! / (m - o)!. Sums over all ways to end at d, from the last mask back; then the steps from the first
    mask on. Takes time n d^2 and memory d^2.

    Shape:
        Result (n,), integers that sum to c.
    """
    excess = n * ones - channels
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, channels + 1)))])

    def log_weights(k: int, before: np.ndarray) -> np.ndarray:
        union, overlap = k * ones - before, np.arange(excess + 1) - before
        possible = (overlap >= 0) & (overlap <= ones) & (union >= ones) & (union <= channels)
        u, o = np.where(possible, union, ones), np.where(possible, overlap, 0)
        weights = log_factorial[u] - log_factorial[u - o] - log_factorial[o] - log_factorial[ones - o]
        return np.where(possible, weights + log_factorial[ones], -np.inf)

    ways = np.full((n + 1, excess + 1), -np.inf)  # ways[k, t]: log of the total weight of going from t to d
    ways[n, excess] = 0.0
    for k in range(n - 1, 0, -1):
        ways[k] = np.logaddexp.reduce(log_weights(k, np.arange(excess + 1)[:, None]) + ways[k + 1], axis=1)
    total, fresh = 0, np.full(n, ones)
    for k in range(1, n):
        share = np.exp(log_weights(k, np.array(total)) + ways[k + 1] - ways[k, total])
        after = int(rng.choice(excess + 1, p=share / share.sum()))
        fresh[k] -= after - total
        total = after
    return fresh


def _fill(channels: int, ones: int, fresh: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Masks with the given chain. In a random order of the channels the union so far is always a beginning of it."""
    masks = np.zeros((len(fresh), channels), dtype=bool)
    order = rng.permutation(channels)
    union = 0
    for mask, new in zip(masks, fresh.tolist(), strict=True):
        mask[order[rng.choice(union, ones - new, replace=False, shuffle=False)]] = True
        mask[order[union : union + new]] = True
        union += new
    return masks

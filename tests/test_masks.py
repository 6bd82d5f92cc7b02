"""The masks: their shape, their law, their speed and their errors."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from masksurgery import masks as masks_module
from masksurgery.masks import generate_masks, kept_channels, site_seed
from masksurgery.types import MaskError

SCALES = (1, 1.0001, 1.3, 2, 2.5, 3, 4, 5, 6.5, 7, 8, 9, 10, 1e6, 1e18)


def check_masks(masks: np.ndarray, channels: int, n: int, scale: float, multiple_of: int = 1) -> None:
    assert masks.shape == (n, channels) and masks.dtype == np.bool_
    assert set(masks.sum(axis=1).tolist()) == {kept_channels(channels, n, scale, multiple_of)}
    assert masks.any(axis=0).all()


# The number of ones.


@pytest.mark.parametrize(
    ("channels", "n", "scale", "ones"),
    [
        (10, 4, 2.0, 5),  # 10 / (2 (1 - 1/16)) = 5.33
        (64, 4, 2.0, 34),
        (4096, 4, 2.0, 2184),
        (15, 4, 2.0, 8),  # 15 / 1.875, a whole number
        (11, 2, 1.6, 8),  # 11 / 1.375, a whole number that rounding puts at 7.999
        (7, 2, 5 / 3, 5),  # 7 / 1.4
        (7, 5, 1, 7),
        (7, 1, 3.0, 7),
        (1, 32, 10.0, 1),
        (100, 2, 1e6, 50),
        (101, 2, 1e6, 51),  # covering needs the ceiling
        (16384, 32, 1e18, 512),
        (16384, 2, 10**400, 8192),
        (np.int16(16384), np.uint8(4), np.float32(2.0), 8738),
    ],
)
def test_kept_channels(channels: int, n: int, scale: float, ones: int) -> None:
    assert kept_channels(channels, n, scale) == ones


def test_kept_channels_never_exceeds_channels_and_can_cover() -> None:
    for channels, n, scale in itertools.product(range(1, 80), range(1, 34), SCALES):
        ones = kept_channels(channels, n, scale)
        assert 1 <= ones <= channels <= n * ones


@pytest.mark.parametrize(
    ("channels", "multiple_of", "ones"),
    [
        (64, 1, 34),  # 64 / 1.875 = 34.1
        (64, 8, 40),  # up, although 32 is nearer: never fewer than the scale asks for
        (256, 8, 136),  # a multiple already
        (2048, 16, 1104),
        (2048, np.int64(16), 1104),
        (24, 16, 16),
        (20, 16, 16),
        (16, 16, 8),  # 16 would be full masks, and there is no multiple below
        (17, 16, 16),
        (10, 16, 5),
        (1, 8, 1),
    ],
)
def test_kept_channels_are_rounded_up_and_never_all(channels: int, multiple_of: int, ones: int) -> None:
    assert kept_channels(channels, 4, 2.0, multiple_of) == ones


def test_where_the_next_multiple_is_full_the_largest_below_is_taken() -> None:
    assert kept_channels(64, 4, 1.05) == 60  # of which 64 is the next multiple of 8
    assert kept_channels(64, 4, 1.05, 8) == 56
    assert kept_channels(64, 4, 1.0, 8) == kept_channels(64, 1, 2.0, 8) == 64  # full without rounding
    assert kept_channels(60, 4, 1.0, 8) == 60


# Every mask, for every argument.


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    channels=st.integers(1, 300),
    n=st.integers(1, 40),
    scale=st.floats(1, 12) | st.sampled_from(SCALES),
    multiple_of=st.integers(1, 64),
    seed=st.integers(0, 2**64),
)
def test_rounded_masks_have_equal_ones_and_cover(
    channels: int, n: int, scale: float, multiple_of: int, seed: int
) -> None:
    check_masks(generate_masks(channels, n, scale, seed=seed, multiple_of=multiple_of), channels, n, scale, multiple_of)
    plain, ones = kept_channels(channels, n, scale), kept_channels(channels, n, scale, multiple_of)
    assert 1 <= ones <= channels <= n * ones
    assert (ones == channels) == (plain == channels)  # rounding does not make members equal, nor unequal
    if plain < channels and multiple_of < channels:
        assert ones % multiple_of == 0 and ones < plain + multiple_of
        assert ones >= plain or ones + multiple_of >= channels
    else:
        assert ones == plain


def test_without_rounding_masks_are_what_they_were() -> None:
    for channels, n, scale in ((64, 4, 2.0), (10, 3, 1.5), (100_001, 2, 1e6)):
        plain = generate_masks(channels, n, scale, seed=3)
        np.testing.assert_array_equal(plain, generate_masks(channels, n, scale, seed=3, multiple_of=1))
    multiple = kept_channels(64, 4, 2.0)  # nothing to round: the same law, drawn in the same way
    np.testing.assert_array_equal(
        generate_masks(64, 4, 2.0, seed=3), generate_masks(64, 4, 2.0, seed=3, multiple_of=multiple)
    )


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    channels=st.integers(1, 300),
    n=st.integers(1, 40),
    scale=st.floats(1, 12) | st.sampled_from(SCALES),
    seed=st.integers(0, 2**64),
)
def test_masks_have_equal_ones_and_cover(channels: int, n: int, scale: float, seed: int) -> None:
    check_masks(generate_masks(channels, n, scale, seed=seed), channels, n, scale)


@pytest.mark.parametrize(
    ("channels", "n", "scale"),
    [(1, 1, 1.0), (1, 4, 2.0), (3, 4, 2.0), (9, 4, 2.0), (64, 4, 7.0), (64, 8, 10.0), (64, 1, 2.0), (64, 32, 2.0)]
    + [(12, 8, 6.0), (5, 32, 10.0), (16383, 2, 10.0), (16384, 64, 1e6), (65535, 2, 1e6), (1_000_003, 4, 1e6)],
)
def test_masks_where_the_plain_search_raises_or_hangs(channels: int, n: int, scale: float) -> None:
    for seed in range(5):
        check_masks(generate_masks(channels, n, scale, seed=seed), channels, n, scale)


def test_masks_take_milliseconds_for_every_width() -> None:
    widths = (1, 2, 3, 7, 10, 16, 31, 64, 100, 255, 512, 1000, 1023, 2048, 4096, 5000, 8191, 16383, 16384)
    seconds = []
    for channels, n, scale in itertools.product(widths, (1, 2, 3, 4, 5, 8, 17, 32), (1, 1.01, 2, 3.7, 6, 8, 10)):
        start = time.perf_counter()
        masks = generate_masks(channels, n, scale, seed=channels)
        seconds.append(time.perf_counter() - start)
        check_masks(masks, channels, n, scale)
    assert np.median(seconds) < 0.01 and max(seconds) < 0.25 and sum(seconds) < 20


# The law.


def coverings(channels: int, n: int, ones: int) -> list[bytes]:
    """All ordered coverings of the channels by n subsets of m, by trying every combination."""
    rows = np.array([np.isin(np.arange(channels), kept) for kept in itertools.combinations(range(channels), ones)])
    candidates = (rows[list(picked)] for picked in itertools.product(range(len(rows)), repeat=n))
    return [masks.tobytes() for masks in candidates if masks.any(axis=0).all()]


def plain_rejection(channels: int, n: int, ones: int, universe: int, rng: np.random.Generator) -> np.ndarray:
    """Subsets of M positions until their union has size c, renumbered: the definition, with no thought for speed."""
    while True:
        masks = np.zeros((n, universe), dtype=bool)
        for mask in masks:
            mask[rng.permutation(universe)[:ones]] = True
        used = masks.any(axis=0)
        if used.sum() == channels:
            return masks[:, used]


def chi_square_limit(freedom: int) -> float:
    return freedom + 5 * np.sqrt(2 * freedom)


def counts_by(keys: list[bytes], draw: Callable[[], np.ndarray], draws: int) -> np.ndarray:
    bins = {key: index for index, key in enumerate(keys)}
    return np.bincount([bins[np.ascontiguousarray(draw()).tobytes()] for _ in range(draws)], minlength=len(keys))


@pytest.mark.parametrize(
    ("channels", "n", "scale", "multiple_of", "ones", "size"),
    [
        (5, 3, 1.2, 1, 4, 120),  # 5^3 choices without the 5 that leave out one channel in all three masks
        (5, 3, 2.0, 1, 2, 180),  # 5 shared channels, 3 pairs of masks that share it, 4 * 3 ways to fill these two
        (6, 3, 1e6, 1, 2, 90),  # tight: the 6! / 2^3 partitions
        (5, 3, 1.7, 1, 3, 690),  # 10^3 - 5 * 4^3 + 10 * 1^3, by inclusion and exclusion of the channels left out
        pytest.param(5, 3, 2.0, 3, 3, 690, marks=pytest.mark.slow),  # the same, rounded up from 2
        pytest.param(4, 4, 2.0, 1, 2, 978, marks=pytest.mark.slow),  # 6^4 - 4 * 3^4 + 6 * 1^4
    ],
)
def test_law_is_uniform_over_coverings(
    channels: int, n: int, scale: float, multiple_of: int, ones: int, size: int
) -> None:
    assert kept_channels(channels, n, scale, multiple_of) == ones
    keys, rng = coverings(channels, n, ones), np.random.default_rng(1)
    assert len(keys) == size
    draws = 12 * size
    counts = counts_by(keys, lambda: generate_masks(channels, n, scale, seed=rng, multiple_of=multiple_of), draws)
    expected = draws / size
    assert ((counts - expected) ** 2 / expected).sum() < chi_square_limit(size - 1)


@pytest.mark.parametrize("universe", [5, 6, 9])
def test_law_is_that_of_plain_rejection_for_every_universe(universe: int) -> None:
    keys, rng, draws = coverings(5, 3, 2), np.random.default_rng(2), 1800
    ours = counts_by(keys, lambda: generate_masks(5, 3, 2.0, seed=rng), draws)
    plain = counts_by(keys, lambda: plain_rejection(5, 3, 2, universe, rng), draws)
    total = ours + plain
    assert ((ours - plain)[total > 0] ** 2 / total[total > 0]).sum() < chi_square_limit(len(keys) - 1)


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "n", "ones"), [(40, 4, 12), (39, 4, 10), (12, 3, 8), (50, 6, 12)])
def test_law_of_both_samplers_agrees_in_larger_cases(channels: int, n: int, ones: int) -> None:
    """Fresh channels of each mask: by rejection, by exact weights, and in plain rejection."""
    rng, draws = np.random.default_rng(3), 1500
    universe = masks_module._universe(channels, n, ones)
    assert universe is not None
    by_rejection = [masks_module._chain_by_rejection(channels, n, ones, universe, rng) for _ in range(draws)]
    by_weights = [masks_module._chain_by_weights(channels, n, ones, rng) for _ in range(draws)]
    plain = []
    for _ in range(draws):
        union = np.logical_or.accumulate(plain_rejection(channels, n, ones, universe, rng))
        plain.append(np.diff(union.sum(axis=1), prepend=0))
    for first, second in ((by_rejection, by_weights), (by_weights, plain), (by_rejection, plain)):
        for k in (1, n - 1):  # few bins each, for power
            samples = np.array(first)[:, k], np.array(second)[:, k]
            counts = np.stack([np.bincount(sample, minlength=ones + 1) for sample in samples])
            counts = counts[:, counts.sum(axis=0) > 0]
            statistic = ((counts[0] - counts[1]) ** 2 / counts.sum(axis=0)).sum()
            assert counts.shape[1] > 1 and statistic < chi_square_limit(counts.shape[1] - 1)


def test_both_samplers_are_used() -> None:
    assert masks_module._universe(4096, 4, 2184) == 4369  # 4368 (1 - 1/2^4) is 4095, more than 1/2 below
    assert masks_module._universe(100_001, 2, 50_001) is None  # one shared channel is too rare below numpy's limit


@pytest.mark.parametrize(("n", "scale"), [(4, 1.5), (4, 2.0), (8, 3.0), (4, 6.0)])
def test_overlap_is_that_of_random_subsets_of_the_universe(n: int, scale: float) -> None:
    channels = 2048
    ones = kept_channels(channels, n, scale)
    masks = generate_masks(channels, n, scale, seed=0).astype(int)
    shared = (masks @ masks.T)[np.triu_indices(n, 1)]
    assert shared.mean() == pytest.approx(ones / scale, rel=0.05)  # two subsets of m among scale * m positions
    assert shared.std() < 0.2 * shared.mean()


def test_channels_and_masks_are_exchangeable() -> None:
    share = np.mean([generate_masks(12, 3, 2.0, seed=seed) for seed in range(2000)], axis=0)
    assert np.abs(share - kept_channels(12, 3, 2.0) / 12).max() < 5 * 0.5 / np.sqrt(2000)


# Seeds.


@pytest.mark.parametrize("seed", [0, 2**80, [1, 2, 3], (4, 5), np.random.SeedSequence(7)])
def test_equal_seeds_give_equal_masks(seed: object) -> None:
    first = generate_masks(64, 4, 2.0, seed=seed)
    np.testing.assert_array_equal(first, generate_masks(64, 4, 2.0, seed=seed))
    assert (first != generate_masks(64, 4, 2.0, seed=12345)).any()


def test_without_a_seed_masks_differ() -> None:
    assert (generate_masks(64, 4, 2.0) != generate_masks(64, 4, 2.0)).any()


def test_global_state_is_neither_read_nor_moved() -> None:
    np.random.seed(0)
    before = np.random.get_state()
    first = generate_masks(64, 4, 2.0, seed=3)
    after = np.random.get_state()
    assert before[2] == after[2] and (before[1] == after[1]).all()
    np.random.seed(1)
    np.testing.assert_array_equal(first, generate_masks(64, 4, 2.0, seed=3))


def test_site_seed_is_stable_and_tells_sites_apart() -> None:
    assert site_seed(0, "layer1.0.conv1", 0) == 67785387463718237873669099715585594471
    sites = list(itertools.product((0, 1, 10, 2**70), ("", "fc", "0/fc", "layer1.0", "ä"), (0, 1, 10)))
    seeds = {site_seed(*site) for site in sites}
    assert len(seeds) == len(sites) and all(0 <= seed < 2**128 for seed in seeds)
    first, second = (generate_masks(64, 4, 2.0, seed=site_seed(0, layer, 0)) for layer in ("layer1.0", "layer1.1"))
    assert (first != second).any()


# Errors.


@pytest.mark.parametrize("channels", [0, -3, 2.0, True, None, "64"])
def test_channels_must_be_a_positive_integer(channels: object) -> None:
    with pytest.raises(MaskError, match=r"channels=.* is not a number of channels\. Pass an integer of at least 1"):
        generate_masks(channels, 4, 2.0)


@pytest.mark.parametrize("n", [0, -1, 4.0, True, None])
def test_n_must_be_a_positive_integer(n: object) -> None:
    with pytest.raises(MaskError, match=r"n=.* is not a number of members\. Pass an integer"):
        generate_masks(64, n, 2.0)


@pytest.mark.parametrize("scale", [0.99, 0, -2.0, float("nan"), float("inf")])
def test_scale_must_be_finite_and_at_least_one(scale: float) -> None:
    with pytest.raises(MaskError, match="is not a finite number of at least 1"):
        generate_masks(64, 4, scale)


def test_scale_must_be_a_number() -> None:
    with pytest.raises(MaskError, match="scale='2' is not a number"):
        generate_masks(64, 4, "2")


@pytest.mark.parametrize("seed", [-1, 1.5, "seed", [1, -1]])
def test_seed_must_be_what_numpy_takes(seed: object) -> None:
    with pytest.raises(MaskError, match=r"seed=.* is not what numpy\.random\.default_rng takes .* Pass a non-negative"):
        generate_masks(64, 4, 2.0, seed=seed)


@pytest.mark.parametrize("multiple_of", [0, -8, 1.5, 8.0, True, None, "8"])
def test_multiple_of_must_be_a_positive_integer(multiple_of: object) -> None:
    with pytest.raises(MaskError, match=r"multiple_of=.* is not a positive integer\. Pass .* such as multiple_of=8"):
        generate_masks(64, 4, 2.0, multiple_of=multiple_of)

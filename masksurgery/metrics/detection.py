"""Telling unknown data from known data by a score: the unknown images are to be found, larger is more suspicious."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from masksurgery.evaluation import Curve, Histogram
from masksurgery.metrics.bins import bin_edges
from masksurgery.metrics.ranking import RankedScores
from masksurgery.scores import Score

_ACCEPTED = 0.95


def detect(known: RankedScores, unknown: RankedScores) -> dict[Score, dict[str, float]]:
    """How well each score tells unknown images from known ones.

    Returns:
        "auroc", ties counting half; "aupr" as the average precision sum_i (R_i - R_{i-1}) P_i over the thresholds;
        "fpr95": the share of unknown images that the smallest threshold accepts that accepts at least 95% of the known
        ones. Scores in one bin, 0.1% wide, are tied.
    Raises:
        EvaluationError: One of the two holds no images.
    Source:
        Hendrycks and Gimpel 2017, arXiv:1610.02136; Liang, Li, Srikant 2018, arXiv:1706.02690 (FPR at 95%).
    """
    return {score: _figures(known.counted(score), unknown.counted(score)) for score in _common(known, unknown)}


def _figures(known: np.ndarray, unknown: np.ndarray) -> dict[str, float]:
    known_up_to, unknown_up_to = known.cumsum(), unknown.cumsum()
    knowns, unknowns = int(known_up_to[-1]), int(unknown_up_to[-1])
    auroc = (unknown * (known_up_to - known / 2)).sum() / (float(knowns) * unknowns)
    found = unknowns - unknown_up_to + unknown  # at the threshold that refuses this bin and all above
    refused = found + knowns - known_up_to + known
    aupr = (unknown * (found / np.maximum(refused, 1))).sum() / unknowns
    at = int(np.argmax(known_up_to / knowns >= _ACCEPTED))
    return {"auroc": float(auroc), "aupr": float(aupr), "fpr95": float(unknown_up_to[at] / unknowns)}


def roc(known: RankedScores, unknown: RankedScores, points: int = 200) -> dict[Score, Curve]:
    """For each score the share of unknown images refused over the share of known ones refused, from (0, 0) to (1, 1).

    The points are evenly spread over the length of the line.

    Raises:
        EvaluationError: One of the two holds no images.
    """
    curves: dict[Score, Curve] = {}
    for score in _common(known, unknown):
        x, y = (_refused(ranked.counted(score)) for ranked in (known, unknown))
        at = np.unique(np.searchsorted(x + y, np.linspace(0, 2, points)).clip(max=len(x) - 1))
        curves[score] = Curve(tuple(x[at].tolist()), tuple(y[at].tolist()))
    return curves


def _refused(counts: np.ndarray) -> np.ndarray:
    """The share in the last i bins, for i = 0..BINS."""
    return np.append(0, counts[::-1].cumsum()) / counts.sum()


def histograms(sets: Mapping[str, RankedScores], bins: int = 40) -> dict[Score, dict[str, Histogram]]:
    """The distribution of each score in each set, in bins of equal width that all sets have in common.

    They go from 0 to the largest of the sets' 99.9% quantiles; the last bin also takes what is above.

    Raises:
        EvaluationError: One of the sets holds no images.
    """
    edges = bin_edges()
    found: dict[Score, dict[str, Histogram]] = {}
    for score in _common(*sets.values()):
        counts = {name: ranked.counted(score) for name, ranked in sets.items()}
        top = max(ranked.quantile(score, 0.999) for ranked in sets.values())
        wide = np.linspace(0, top, bins + 1)
        index = np.searchsorted(wide[1:-1], edges[:-1], side="right")
        found[score] = {
            name: Histogram(
                tuple(wide.tolist()), tuple((np.bincount(index, weights=c, minlength=bins) / c.sum()).tolist())
            )
            for name, c in counts.items()
        }
    return found


def _common(*ranked: RankedScores) -> list[Score]:
    """The scores that all of them keep."""
    return [score for score in ranked[0].scores if all(score in other.scores for other in ranked)]

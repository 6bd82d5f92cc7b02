"""Figures in memory of fixed size, the same for any number of processes. They need torchmetrics."""

from __future__ import annotations

from masksurgery.metrics.detection import detect, histograms, roc
from masksurgery.metrics.ranking import RankedScores
from masksurgery.metrics.suite import Found, Suite

__all__ = ["Found", "RankedScores", "Suite", "detect", "histograms", "roc"]

"""Turn a pretrained PyTorch model into a Masksembles ensemble that knows how sure it is."""

from __future__ import annotations

from masksurgery.checkpoint import load, save
from masksurgery.convert import convert
from masksurgery.layers import Masksembles1D, Masksembles2D, Masksembles3D, repeat_targets
from masksurgery.masks import generate_masks
from masksurgery.model import ConvertedModel
from masksurgery.prediction import Prediction, RegressionPrediction
from masksurgery.recalibrate import recalibrate
from masksurgery.types import (
    CheckpointError,
    ConfigError,
    LayoutError,
    MaskError,
    MasksurgeryError,
    Site,
    SiteError,
    Skipped,
    Surgery,
    TraceError,
    VerificationError,
)
from masksurgery.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConvertedModel",
    "LayoutError",
    "MaskError",
    "Masksembles1D",
    "Masksembles2D",
    "Masksembles3D",
    "MasksurgeryError",
    "Prediction",
    "RegressionPrediction",
    "Site",
    "SiteError",
    "Skipped",
    "Surgery",
    "TraceError",
    "Verification",
    "VerificationError",
    "convert",
    "generate_masks",
    "load",
    "recalibrate",
    "repeat_targets",
    "save",
    "verify",
]

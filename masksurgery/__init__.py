"""Turn a pretrained PyTorch model into a Masksembles ensemble that knows how sure it is."""

from __future__ import annotations

from masksurgery.adopt import adopt
from masksurgery.checkpoint import load, save
from masksurgery.convert import convert
from masksurgery.data import DataConfig, DataError
from masksurgery.evaluate import evaluate
from masksurgery.evaluation import Evaluation, ModelEvaluation
from masksurgery.evaluation_config import EvaluateConfig
from masksurgery.events import Interrupted
from masksurgery.export import Exported, export, export_program
from masksurgery.finetune import finetune
from masksurgery.hub import push_to_hub
from masksurgery.layers import Masksembles1D, Masksembles2D, Masksembles3D, repeat_targets
from masksurgery.masks import generate_masks
from masksurgery.model import ConvertedModel
from masksurgery.pack import PackedModel, pack
from masksurgery.prediction import Prediction, RegressionPrediction
from masksurgery.recalibrate import recalibrate
from masksurgery.report import write_report
from masksurgery.scores import Threshold
from masksurgery.training_config import FinetuneConfig
from masksurgery.transforms import Augmentation
from masksurgery.types import (
    CheckpointError,
    ConfigError,
    EvaluationError,
    ExportError,
    LayoutError,
    MaskError,
    MasksurgeryError,
    Site,
    SiteError,
    Skipped,
    Surgery,
    TraceError,
    TrainingError,
    VerificationError,
)
from masksurgery.verify import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "Augmentation",
    "CheckpointError",
    "ConfigError",
    "ConvertedModel",
    "DataConfig",
    "DataError",
    "EvaluateConfig",
    "Evaluation",
    "EvaluationError",
    "ExportError",
    "Exported",
    "FinetuneConfig",
    "Interrupted",
    "LayoutError",
    "MaskError",
    "Masksembles1D",
    "Masksembles2D",
    "Masksembles3D",
    "MasksurgeryError",
    "ModelEvaluation",
    "PackedModel",
    "Prediction",
    "RegressionPrediction",
    "Site",
    "SiteError",
    "Skipped",
    "Surgery",
    "Threshold",
    "TraceError",
    "TrainingError",
    "Verification",
    "VerificationError",
    "adopt",
    "convert",
    "evaluate",
    "export",
    "export_program",
    "finetune",
    "generate_masks",
    "load",
    "pack",
    "push_to_hub",
    "recalibrate",
    "repeat_targets",
    "save",
    "verify",
    "write_report",
]

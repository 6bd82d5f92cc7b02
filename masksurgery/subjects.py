"""The models that are evaluated: converted ones and base models, wherever they come from, behind one interface."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from masksurgery.checkpoint import load, read_base
from masksurgery.copying import copy_module
from masksurgery.ensemble import Ensemble
from masksurgery.factory import create_base
from masksurgery.folders import find_folder
from masksurgery.images import given_names, image_input, label_names, preprocessing_of, readable
from masksurgery.losses import answered_prediction
from masksurgery.prediction import (
    Head,
    Prediction,
    RegressionPrediction,
    check_outputs,
    check_temperature,
    count_outputs,
    leaf_tasks,
)
from masksurgery.record import read_object, read_record
from masksurgery.scores import Threshold
from masksurgery.sources import NO_WEIGHTS, one_line
from masksurgery.transforms import Preprocessing
from masksurgery.types import ConfigError, ConvertConfig, MasksurgeryError, Task
from masksurgery.weights import CONFIG

PLACES = "A folder of masksurgery or timm, hf-hub:user/repo, torchvision:NAME or a timm name is needed"


class Predictor(nn.Module):
    """A model that returns one prediction for a batch of images, whatever else it has to say.

    Args:
        model: A converted or packed model, or a base model with a head of one member.
        head: Of a base model.
    """

    def __init__(self, model: nn.Module, head: Head | None = None) -> None:
        super().__init__()
        self.model, self.own_head = model, head

    @property
    def head(self) -> Head:
        return self.own_head or self.model.head_module  # type: ignore[union-attr, return-value]

    def forward(self, x: Tensor) -> Prediction | RegressionPrediction:
        outputs = self.model(x)
        found = answered_prediction(self.own_head.aggregate(outputs) if self.own_head else outputs)
        assert found is not None  # convert and `check_outputs` refuse a model that has nothing to aggregate
        return found


@dataclass(eq=False)
class Subject:
    """A model to evaluate.

    Attributes:
        name: Where it comes from.
        kind: "base" or "converted"; a packed model is a converted one, written out.
        model: In eval mode. It returns a Prediction or a RegressionPrediction for images [b, c, h, w].
        n: Number of members; 1 for a base model.
        task: What it does.
        class_dim: Where the classes stand in its output, not negative.
        heteroscedastic: It returns a mean and a log-variance.
        outputs: Number of classes, labels or numbers.
        segmentation: It says the class of each pixel.
        preprocessing: Of its images.
        label_names: What its pretrained_cfg calls the classes; None where it has no name for each of them.
        display_names: The same for people: with descriptions, and ImageNet's where their number fits.
        folder: Where a temperature and a threshold can be stored: that of a converted model on this machine.
    """

    name: str
    kind: Literal["base", "converted"]
    model: Predictor
    n: int
    task: Task
    class_dim: int
    heteroscedastic: bool
    outputs: int
    segmentation: bool
    preprocessing: Preprocessing
    label_names: tuple[str, ...] | None = None
    display_names: list[str] | None = None
    folder: Path | None = None

    @property
    def ensemble(self) -> Ensemble | None:
        """The converted or packed model itself; None of a base model."""
        return self.model.model if isinstance(self.model.model, Ensemble) else None

    @property
    def threshold(self) -> Threshold | None:
        """Of an ensemble, if one was fitted."""
        return self.ensemble._threshold if self.ensemble else None

    @property
    def temperature(self) -> float:
        """What the logits are divided by. See `Head.temperature`."""
        return self.model.head.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.model.head.temperature = check_temperature(value)


def open_subject(
    place: str | Path | nn.Module,
    *,
    task: Task = "classification",
    class_dim: int = 1,
    heteroscedastic: bool = False,
    trust: bool = False,
    name: str | None = None,
) -> Subject:
    """Open a model to evaluate.

    Args:
        place: A folder of `masksurgery.save`; one of timm's for the hub, as `finetune(base_only=True)` writes it;
            "hf-hub:user/repo" with either; a timm name or "torchvision:NAME" with pretrained weights; or a model
            itself, which is not changed.
        task: Of a base model; a converted one knows its own.
        class_dim: Likewise.
        heteroscedastic: Likewise.
        trust: Import and run the user's own factory that a folder names.
        name: What tables call it; by default the place.
    Raises:
        CheckpointError: A folder or a file in it is missing or damaged.
        ConfigError: There is no such model, it takes something else than images, or its outputs do not suit the task.
    """
    ConvertConfig(task=task, heteroscedastic=heteroscedastic)  # checks them
    model, folder = _open(place, trust)
    name, ensemble = name or _name_of(place), model if isinstance(model, Ensemble) else None
    if ensemble:
        settings = ensemble.settings
        task, class_dim, heteroscedastic = settings.task, settings.class_dim, settings.heteroscedastic
    try:
        preprocessing, x = preprocessing_of(model), _images(model)
        predictor = _predictor(model.eval(), x, task, class_dim, heteroscedastic).eval()
        with torch.no_grad():
            p = predictor(x)
    except MasksurgeryError as error:
        raise ConfigError(f"{name}: {error}") from error
    outputs, given, shown = count_outputs(p, task, class_dim), given_names(model), label_names(model)
    return Subject(
        name,
        "converted" if ensemble else "base",
        predictor,
        p.members.shape[1],
        task,
        class_dim % p.mean.dim(),
        heteroscedastic,
        outputs,
        p.mean.dim() > 2 and task in ("classification", "probabilities"),
        preprocessing,
        given if given and len(given) == outputs else None,
        shown if shown and len(shown) == outputs else None,
        folder if ensemble else None,
    )


# --- where a model comes from ----------------------------------------------------------------------------------------


def converted_settings(place: str | Path | nn.Module) -> dict[str, Any] | None:
    """What a converted model says of its outputs, as arguments of `open_subject`; None of a base model."""
    if isinstance(place, nn.Module):
        source: Any = place.settings if isinstance(place, Ensemble) else None
    else:
        folder = _find(place)
        content = read_object(folder / CONFIG) if folder else {}
        source = read_record(folder / CONFIG) if folder and "format_version" in content else None
    if source is None:
        return None
    return {name: getattr(source, name) for name in ("task", "class_dim", "heteroscedastic")}


def _find(place: str | Path) -> Path | None:
    """The folder, that of a hub repository too; None where it is the name of a model."""
    name = str(place)
    if isinstance(place, str) and re.match("hf[-_]hub:", name):
        return find_folder(f"hf-hub:{name[7:]}")
    folder = Path(name.removeprefix("local-dir:"))
    return find_folder(folder) if isinstance(place, Path) or folder.exists() or "/" in name else None


def _open(place: str | Path | nn.Module, trust: bool) -> tuple[nn.Module, Path | None]:
    """The model, and the folder that it was read from if that is the user's own."""
    if isinstance(place, nn.Module):
        return copy_module(place), None
    folder, name = _find(place), str(place)
    if folder is not None:
        return _read(folder, trust), None if re.match("hf[-_]hub:", name) else folder
    try:
        return create_base(name)[0], None
    except ConfigError as error:
        why = str(error).removesuffix(f" {NO_WEIGHTS}.")
        raise ConfigError(
            f"'{name}' is no folder here, and no model can be had by that name. {why} {PLACES}."
        ) from error


def _read(folder: Path, trust: bool) -> nn.Module:
    if "format_version" in read_object(folder / CONFIG):
        return load(folder, trust=trust)
    return read_base(folder, trust=trust)


def _name_of(place: str | Path | nn.Module) -> str:
    if not isinstance(place, nn.Module):
        return readable(Path(place)) if isinstance(place, Path) else place
    cfg = getattr(place, "pretrained_cfg", None) or {}
    kind = place._base_type if isinstance(place, Ensemble) else type(place)
    return str(cfg.get("architecture") or kind.__name__)


# --- what it predicts ------------------------------------------------------------------------------------------------


def _images(model: nn.Module) -> Tensor:
    """Two images without content."""
    shape, dtype = image_input(model)
    device = next((p.device for p in model.parameters()), None)
    return torch.zeros(2, *shape[1:], dtype=getattr(torch, dtype), device=device)


def _predictor(model: nn.Module, x: Tensor, task: Task, class_dim: int, heteroscedastic: bool) -> Predictor:
    if isinstance(model, Ensemble):
        model.output = "prediction"
        return Predictor(model)
    try:
        with torch.no_grad():
            outputs = model(x)
    except Exception as error:  # whatever a model raises
        raise ConfigError(f"The model cannot run on images {list(x.shape[1:])}: {one_line(error)}.") from error
    return Predictor(model, _head(outputs, len(x), task, class_dim, heteroscedastic))


def _head(outputs: Any, count: int, task: Task, class_dim: int, heteroscedastic: bool) -> Head:
    """A head of one member for the outputs of a base model for `count` images."""
    leaves = tree_leaves(outputs)
    batch_dims = [0 if isinstance(x, Tensor) and x.shape[:1] == (count,) else None for x in leaves]
    shapes = [
        x.shape if dim == 0 and x.is_floating_point() else None for x, dim in zip(leaves, batch_dims, strict=True)
    ]
    tasks = leaf_tasks(outputs, task)
    check_outputs(shapes, tasks, class_dim, heteroscedastic, batch_dims)
    for x, kind, shape in zip(leaves, tasks, shapes, strict=True):
        if kind == "probabilities" and shape is not None and x.min() < 0:
            raise ConfigError(
                'The model returns negative numbers, which are no probabilities. Pass task="classification".'
            )
    return Head(1, batch_dims, tasks, class_dim, heteroscedastic)

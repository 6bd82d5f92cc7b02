"""Fine-tune a converted model, or its base model by the same code, on Hugging Face Accelerate."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from masksurgery.checkpoint import load, load_base, save, save_base
from masksurgery.data import DataConfig, DataError, explained_death, steps_per_epoch
from masksurgery.ensemble import Ensemble
from masksurgery.events import Observer
from masksurgery.identity import describe_run
from masksurgery.images import preprocessing_of
from masksurgery.losses import Objective, choose_loss
from masksurgery.model import ConvertedModel, refuse_packed
from masksurgery.optimisation import check_optimizer, create_mixup
from masksurgery.processes import accelerated, require
from masksurgery.runs import TRACKERS, RunFolder
from masksurgery.trainer import Trainer
from masksurgery.training_config import FinetuneConfig
from masksurgery.training_data import Loaders, count_outputs, open_for_run
from masksurgery.transforms import Augmentation, Preprocessing
from masksurgery.types import CheckpointError, ConfigError, TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


def finetune(
    model: ConvertedModel | str | Path,
    data: DataConfig,
    output: str | Path,
    *,
    config: FinetuneConfig | None = None,
    augmentation: Augmentation | None = None,
    base_only: bool = False,
    resume: bool = False,
    force: bool = False,
    trust: bool = False,
    observer: Observer | None = None,
) -> Path:
    """Fine-tune a model, and leave the best one by validation in a folder that `load` and `predict` take.

    Beside it stand the last one (`last`), the figures (`metrics.csv`) and the state that `resume` goes on from. On CPU
    a run that was killed and resumed ends with bitwise the weights of one that was not. Every process of
    `accelerate launch` calls this.

    A temperature and a threshold were fitted to the weights before: the result has none, until they are fitted again.

    Args:
        model: A converted model, which is not changed, or a folder that `save` wrote.
        data: What to train on.
        output: The folder of the run.
        config: The settings.
        augmentation: Of the training images.
        base_only: Train the base model, without masks, instead; the folder is then one of timm's (`local-dir:`).
        resume: Go on with the run in `output`, if there is one.
        force: Begin anew in a folder that is not empty.
        trust: Run the user's own factory that the model's folder names.
        observer: Is told what is going on.
    Returns:
        The folder.
    Raises:
        ConfigError: The settings, the model and the data do not go together; nothing has been written.
        DataError: An image cannot be read.
        Interrupted: By SIGINT or SIGTERM, after the state was saved.
        TrainingError: The loss or a weight is no number.
        CheckpointError: A file cannot be read or written.
    """
    config, augmentation, folder = config or FinetuneConfig(), augmentation or Augmentation(), RunFolder(Path(output))
    if base_only and not isinstance(model, (str, Path)):
        raise ConfigError("base_only=True needs the folder of the converted model, which its base model is read from.")
    _check_place(folder.path, model, data)
    with _accelerator(config, folder.path) as accelerator:
        converted = _open(model, trust)
        if not base_only:
            _forget_fitted(converted, accelerator)
        check_optimizer(config)
        objective, trained = _choose_objective(converted, config), _choose_trained(converted, config)
        outputs = count_outputs(converted)
        parts = open_for_run(data, converted, outputs, config, accelerator)
        loaders = Loaders.of(converted, parts, config, augmentation, accelerator)
        steps = steps_per_epoch(parts.train, config.batch_size)
        module: nn.Module = load_base(model, trust=trust) if base_only else converted  # type: ignore[arg-type]
        _set_classes(module, parts.classes)
        if base_only:
            _set_images(module, preprocessing_of(converted))
        settings = describe_run(module, data, parts, config, augmentation, base_only, accelerator)
        state = _begin(folder, settings, resume, force, accelerator)
        if config.log_with:
            accelerator.init_trackers(TRACKERS, _plain(asdict(config)))
        trainer = Trainer(
            module,
            loaders,
            steps,
            config,
            objective,
            accelerator,
            folder,
            save=partial(save_base, recipe=converted.recipe) if base_only else partial(save, force=True),
            state=state,
            mixup=create_mixup(config, outputs),
            trained=trained,
            prepare=loaders.recalibrate if config.recalibrate and not base_only else None,
            observer=observer,
        )
        with _going_on(folder), explained_death():
            trainer.run()
    return folder.path


def _open(model: ConvertedModel | str | Path, trust: bool) -> ConvertedModel:
    """The converted model that the run trains; a ConfigError for a packed one."""
    opened = copy.deepcopy(model) if isinstance(model, Ensemble) else load(model, trust=trust)
    refuse_packed(opened, "finetune")
    return cast(ConvertedModel, opened)


@contextmanager
def _going_on(folder: RunFolder) -> Iterator[None]:
    """Errors that a user can put right say that the run can go on."""
    try:
        yield
    except (CheckpointError, DataError) as error:
        kept = " What was saved before is kept: when that is mended, go on with --resume." if folder.has_state else ""
        raise type(error)(f"{error}{kept}") from error


def _check_place(output: Path, model: ConvertedModel | str | Path, data: DataConfig) -> None:
    """Raise a ConfigError if the run would be written over what it reads."""
    read = [Path(place) for place in (model, data.data, data.masks) if isinstance(place, (str, Path))]
    for place in read:
        if place.exists() and output.resolve() == place.resolve():
            raise ConfigError(f"{output} is what the run reads from. Pass another folder for what it writes.")


@contextmanager
def _accelerator(config: FinetuneConfig, project: Path) -> Iterator[Accelerator]:
    """Accelerate as the settings say, with its trackers."""
    require("accelerate", "train", "Fine-tuning")
    from accelerate import DistributedDataParallelKwargs
    from accelerate.utils import LoggerType

    known = [str(kind.value) for kind in LoggerType if kind is not LoggerType.ALL]
    for name in config.log_with:
        if name not in known:
            raise ConfigError(f"log_with={name!r} is no tracker of Accelerate. Pass some of {', '.join(known)}.")
        if find_spec(name) is None:
            raise ConfigError(f"log_with={name!r} needs a package that is not installed: pip install {name}.")
    with accelerated(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulate,
        log_with=list(config.log_with) or None,
        project_dir=project,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.find_unused_parameters)],
    ) as accelerator:
        try:
            yield accelerator
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()


# --- what goes together ----------------------------------------------------------------------------------------------


def _begin(
    folder: RunFolder, settings: Mapping[str, Any], resume: bool, force: bool, accelerator: Accelerator
) -> dict[str, Any] | None:
    """Begin the run's folder, on the main process; returns its state, which every process has to find."""
    if accelerator.is_main_process:
        folder.begin(settings, resume, force)
    accelerator.wait_for_everyone()
    state = folder.read_state()
    step = torch.tensor([-1 if state is None else state["step"]], device=accelerator.device)
    if len(set(accelerator.gather(step).tolist())) > 1:
        raise TrainingError(
            f"{folder.path}: the processes find different states in it. All machines need to share the folder."
        )
    return state


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """What trackers can sort and plot: numbers, truth values and strings."""
    return {name: x if isinstance(x, (bool, int, float, str)) else str(x) for name, x in settings.items()}


def _choose_objective(model: ConvertedModel, config: FinetuneConfig) -> Objective:
    settings = model.settings
    loss = choose_loss(settings.task, settings.heteroscedastic, config.loss)
    if (config.mixup or config.cutmix) and settings.task != "classification":
        raise ConfigError(f"mixup and cutmix mix classes; this model has task={settings.task!r}. Leave them at 0.")
    return Objective(settings.task, loss, settings.class_dim, config.label_smoothing)


def _choose_trained(model: ConvertedModel, config: FinetuneConfig) -> tuple[str, ...] | None:
    """The names of the layers that are trained; None for all."""
    if not config.freeze:
        return None
    if not model.surgery.output_layers:
        raise ConfigError("freeze trains the output layers, but none is known of this model. Train all of it.")
    return model.surgery.output_layers


def _forget_fitted(model: ConvertedModel, accelerator: Accelerator) -> None:
    """Take away what was fitted to the weights that are about to change."""
    if model.head_module.temperature == 1 and model._threshold is None:
        return
    model.temperature, model.threshold = 1.0, None
    if accelerator.is_main_process:
        logger.warning(
            "the fitted temperature and threshold are of the weights before; fit them again with masksurgery evaluate"
        )


def _set_classes(model: nn.Module, classes: tuple[str, ...] | None) -> None:
    """Name the classes in what `predict` reads."""
    if classes is None:
        return
    cfg = {**(getattr(model, "pretrained_cfg", None) or {}), "num_classes": len(classes), "label_names": classes}
    cfg.pop("label_descriptions", None)
    model.pretrained_cfg = cfg  # type: ignore[assignment]


def _set_images(model: nn.Module, prepared: Preprocessing) -> None:
    """Say in timm's words which images a base model was trained on: the size may be that of a conversion."""
    cfg = {**(getattr(model, "pretrained_cfg", None) or {}), **prepared.config}
    for name in ("test_input_size", "test_crop_pct"):  # of the weights before, not validated here
        cfg.pop(name, None)
    model.pretrained_cfg = cfg  # type: ignore[assignment]

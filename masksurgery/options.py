"""What the commands share: their options, the checks of them that need no model, and how errors are told."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from masksurgery.types import TASKS, TRAIN_MODES, WHERE, ConfigError, ConvertConfig, MasksurgeryError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A timm name, hf-hub:..., local-dir:..., torchvision:resnet50, or module:factory for a model of your own.",
    ),
]
N = Annotated[int, typer.Option("--n", help="Number of members.")]
Scale = Annotated[float, typer.Option("--scale", help="At least 1; larger: the members overlap less.")]
Where = Annotated[
    str, typer.Option("--where", metavar="|".join(WHERE), help="Masks in every block, or only before the output layer.")
]
After = Annotated[
    str | None,
    typer.Option("--after", metavar="TYPES", help="Types of layers to mask after, such as Conv2d,Linear."),
]
Include = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="GLOB", help="Only layers of this name, such as 'layer4.*'. May be repeated."),
]
Exclude = Annotated[
    list[str] | None, typer.Option("--exclude", metavar="GLOB", help="No layer of this name. May be repeated.")
]
Task = Annotated[str, typer.Option("--task", metavar="TASK", help=f"{', '.join(TASKS[:-1])} or {TASKS[-1]}.")]
Tie = Annotated[
    str | None,
    typer.Option("--tie", metavar="stream", help="What is added into one residual stream shares its masks."),
]
MultipleOf = Annotated[
    int,
    typer.Option("--multiple-of", metavar="K", help="Every mask keeps a multiple of so many channels, such as 8."),
]
Heads = Annotated[bool, typer.Option("--heads", help="Mask whole attention heads too.")]
TrainMode = Annotated[
    str,
    typer.Option(
        "--train-mode", metavar="|".join(TRAIN_MODES), help="A sample goes through one member, or through all."
    ),
]
NumClasses = Annotated[int | None, typer.Option("--num-classes", min=1, metavar="K", help="Of a new output layer.")]
InChans = Annotated[int | None, typer.Option("--in-chans", min=1, metavar="C", help="Channels of the input.")]
ImgSize = Annotated[
    int | None,
    typer.Option("--img-size", min=1, metavar="PX", help="Height and width of the images, if not the model's own."),
]
ModelKwargs = Annotated[
    str | None, typer.Option("--model-kwargs", metavar="JSON", help="Further arguments for the model: a JSON object.")
]


Directory = Annotated[
    str, typer.Argument(metavar="DIR", show_default=False, help="A folder that convert wrote, or hf-hub:...")
]
Trust = Annotated[bool, typer.Option("--trust", help="Run the function module:factory that the folder names.")]


def place_of(directory: str) -> str | Path:
    """What `load` takes: a repository of the hub only where it is called one."""
    return directory if directory.startswith("hf-hub:") else Path(directory)


def check_settings(
    n: int,
    scale: float,
    where: Any,
    after: str | None,
    include: list[str] | None,
    exclude: list[str] | None,
    task: Any,
    **more: Any,
) -> dict[str, Any]:
    """The arguments of `convert`, checked as far as that goes without a model."""
    ConvertConfig(n=n, scale=scale, where=where, task=task, **more)
    types = None if after is None else [name.strip() for name in after.split(",") if name.strip()]
    chosen = {"include": include or None, "exclude": exclude or (), "after": types}
    return {"n": n, "scale": scale, "where": where, "task": task, **chosen, **more}


def parse_object(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads("{}" if text is None else text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"--model-kwargs={text} is not JSON: {error}. Pass an object: '{{\"img_size\": 256}}'."
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"--model-kwargs={text} is not a JSON object. Pass one: '{{\"img_size\": 256}}'.")
    return found


def check_output(directory: Path, force: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"-o {directory} is a file. Pass a folder, which is made if it does not exist.")
    if directory.is_dir() and any(directory.iterdir()) and not force:
        raise ConfigError(f"-o {directory} is not empty. Pass another folder, or --force to overwrite what is in it.")
    nearest = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"-o {directory} cannot be made: {nearest} is not a folder that you may write to.")


def check_files(*files: Path | None) -> None:
    """Raise a ConfigError for a file that could not be written at the end, or that two outputs share."""
    seen: list[Path] = []
    for file in (file.absolute() for file in files if file is not None):
        if not file.parent.is_dir():
            raise ConfigError(f"{file} cannot be written: there is no folder {file.parent}.")
        if not os.access(file.parent, os.W_OK):
            raise ConfigError(f"{file} cannot be written: you may not write to {file.parent}.")
        if file in seen:
            raise ConfigError(f"{file} is named twice. Pass another name for each output.")
        seen.append(file)


def is_main_process() -> bool:
    """Whether this process is the one that prints, as the launchers of torch and Accelerate say it."""
    return os.environ.get("RANK", "0") == "0"


# --- errors ----------------------------------------------------------------------------------------------------------

# Newer versions of typer have a click of their own, so its errors are not those of the package of that name.
ClickException: type[Any] = typer.BadParameter.__mro__[2]

LOGGERS = ("masksurgery", "timm")


class _Lines(logging.Handler):
    """Warnings as one line each; that a conversion needs fine-tuning is said by the commands themselves."""

    def emit(self, record: logging.LogRecord) -> None:
        from masksurgery.convert import FINE_TUNE
        from masksurgery.tables import print_line

        if FINE_TUNE not in record.getMessage():
            print_line("warning", record.getMessage())


class OneLineErrors(TyperGroup):
    """What a user can put right is a line on standard error and exit status 2; other exceptions stay what they are."""

    def main(self, *args: Any, **extra: Any) -> Any:
        handler = _Lines(logging.WARNING)
        loggers = [logging.getLogger(name) for name in LOGGERS]
        for logger in loggers:
            logger.addHandler(handler)
        try:
            status = super().main(*args, **{**extra, "standalone_mode": False})
        except ClickException as error:
            _fail(error.format_message())
        except MasksurgeryError as error:
            _fail(str(error))
        except (typer.Abort, KeyboardInterrupt):
            status = 130
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> NoReturn:
    from masksurgery.tables import print_line

    print_line("error", message)
    sys.exit(2)

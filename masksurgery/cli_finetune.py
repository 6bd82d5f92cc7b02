"""The command `finetune`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from masksurgery.data import DataConfig
from masksurgery.options import Directory, Trust, is_main_process, place_of
from masksurgery.settings_options import pick, with_settings
from masksurgery.training_config import FinetuneConfig
from masksurgery.transforms import Augmentation


@with_settings(DataConfig, Augmentation, FinetuneConfig, without=("enabled",))
def finetune(
    directory: Directory,
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="DATA",
            show_default=False,
            help="A folder of images, a CSV file of files and targets, torch/fashion_mnist, hfds/..., wds/...",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="DIR", show_default=False, help="Folder of the run and its best model."),
    ],
    base_only: Annotated[
        bool, typer.Option("--base-only", help="Train the base model instead, by the same code.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the output folder, if there is one.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Begin anew in a folder that is not empty.")] = False,
    trust: Trust = False,
    augment: Annotated[
        bool, typer.Option("--augment/--no-augment", help="Or train on images as they are in evaluation.")
    ] = True,
    **settings: Any,
) -> None:
    """Fine-tune a converted model; the best by validation is what the output folder holds, for predict.

    On a CPU, a GPU, or with `accelerate launch -m masksurgery finetune ...` on many. Ctrl-C saves, and the same command
    with --resume goes on.
    """
    config = pick(FinetuneConfig, settings)
    data_config = pick(DataConfig, settings, data=data)
    augmentation = pick(Augmentation, settings, enabled=augment)
    from masksurgery import finetune as run
    from masksurgery.events import Interrupted
    from masksurgery.images import readable
    from masksurgery.progress import TrainingProgress
    from masksurgery.tables import out, print_line

    main = is_main_process()
    try:
        with TrainingProgress(main) as progress:
            run(
                place_of(directory),
                data_config,
                output,
                config=config,
                augmentation=augmentation,
                base_only=base_only,
                resume=resume,
                force=force,
                trust=trust,
                observer=progress,
            )
    except Interrupted as interrupted:
        if main:
            print_line("stopped", f"{interrupted} {_again()}")
        raise typer.Exit(130) from None
    if main:
        name = readable(output)
        out().print(f"The best model is in {name}, the last one in {name}/last.", soft_wrap=True)
        if not base_only:
            out().print(f"Next: masksurgery predict {shlex.quote(name)} photo.jpg", soft_wrap=True)


def _again() -> str:
    """How to go on with this run."""
    if "WORLD_SIZE" in os.environ:  # only the user knows all of the launcher's arguments
        return "Go on with the same command and --resume."
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--force")]
    return f"Go on with: masksurgery {shlex.join([*arguments, '--resume'])}"

"""The command `export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from masksurgery.options import Directory, Trust, check_files, place_of
from masksurgery.types import ConfigError


def export(
    directory: Directory,
    format: Annotated[
        str | None,
        typer.Option("--format", metavar="onnx|pt2", show_default=False, help="By default what FILE ends in, or onnx."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", show_default=False, help="By default the folder's name, here."),
    ] = None,
    static: Annotated[bool, typer.Option("--static", help="Batches of one image, and no others.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    trust: Trust = False,
) -> None:
    """Write a converted or packed model as one file for other runtimes.

    What is in it is compared with the model at batch sizes 1, 2 and 5 before the file gets its name.
    """
    from masksurgery.checkpoint import load
    from masksurgery.export import export as export_model
    from masksurgery.export import format_of
    from masksurgery.images import readable
    from masksurgery.pack import PackedModel
    from masksurgery.tables import export_summary, out, step

    file = output or Path(f"{Path(directory).resolve().name}.{format or 'onnx'}")
    chosen = format_of(file, format)
    check_files(file)
    if file.exists() and not force:
        raise ConfigError(f"-o {readable(file)} exists. Pass another name, or --force to replace it.")
    with step(f"Loading {directory}"):
        model = load(place_of(directory), trust=trust)
    with step(f"Exporting {directory}"):
        found = export_model(model, file, format=chosen, static=static)
    out().print(export_summary(directory, readable(file), found, file.stat().st_size))
    if not isinstance(model, PackedModel):
        name = shlex.quote(directory)
        out().print(f"Next: masksurgery pack {name} -o packed, whose export is faster", soft_wrap=True)

"""The command `pack`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from masksurgery.options import Directory, Trust, check_output, place_of
from masksurgery.types import ConfigError, check_choice

LAYOUTS = ("auto", "unrolled", "grouped")


def pack(
    directory: Directory,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", show_default=False, help="Folder to write.")],
    layout: Annotated[
        str,
        typer.Option(
            "--layout",
            metavar="|".join(LAYOUTS),
            help="Members one after another, or side by side as groups; auto measures both.",
        ),
    ] = "auto",
    dense: Annotated[
        bool | None,
        typer.Option(
            "--dense/--no-dense",
            show_default=False,
            help="Sums with rows of zeros, or by index; auto measures both.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
    trust: Trust = False,
) -> None:
    """Write the members of a converted model out as the small networks that they are.

    The predictions stay the same, to rounding; a packed model can no longer be trained, so keep the converted one.
    """
    check_choice("layout", layout, LAYOUTS)
    if output.exists() and Path(directory).exists() and output.samefile(directory):
        raise ConfigError(f"-o {output} is the converted model itself, which cannot be had back. Pass another folder.")
    check_output(output, force)
    from masksurgery.checkpoint import load, load_base, save
    from masksurgery.images import readable
    from masksurgery.macs import conversion_macs
    from masksurgery.pack import PackedModel
    from masksurgery.pack import pack as pack_model
    from masksurgery.pack_tables import packing_summary
    from masksurgery.tables import out, step

    place, name = place_of(directory), readable(output)
    with step(f"Loading {directory}"):
        model = load(place, trust=trust)
    if isinstance(model, PackedModel):
        raise ConfigError(f"{directory} is packed already. Give the folder of the converted model.")
    with step(f"Packing {directory}"):
        base, packed = load_base(place, trust=trust), pack_model(model, layout, dense=dense)  # type: ignore[arg-type]
        macs = conversion_macs(base, packed)
    with step(f"Writing {output}"):
        save(packed, output, force=force)
    out().print(packing_summary(directory, name, base, packed, macs))
    trusted = "--trust " if (packed.recipe or {}).get("source") == "factory" else ""
    out().print(f"Next: masksurgery bench {trusted}{shlex.quote(name)}", soft_wrap=True)

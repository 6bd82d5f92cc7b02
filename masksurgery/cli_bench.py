"""The command `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from masksurgery.options import Directory, Trust, check_files, place_of
from masksurgery.types import ConfigError


def bench(
    directory: Directory,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="NAMES",
            show_default=False,
            help="What to measure beside the packed model: base, repeat (every input n times), late (as converted); "
            "by default all that the folder allows.",
        ),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", metavar="SIZES", help="Samples in a forward.")] = "1,8",
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, show_default=False, help="Of torch; by default its own choice.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=4, help="Forwards to measure of each model.")] = 10,
    device: Annotated[str, typer.Option("--device", help="cpu, or cuda.")] = "cpu",
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Weights and images in this memory format.")
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", dir_okay=False, help="Write all figures as JSON.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Measure the packed model beside the base model and the usual ways to run an ensemble.

    Latency is measured in turn in one process, peak memory in a process of its own for each model. DIR holds a
    converted model, which is packed here, or a packed one.
    """
    names = None if against is None else _split(against)
    sizes = _sizes(batch)
    check_files(json_file)
    import torch

    from masksurgery.bench import measure
    from masksurgery.bench_folder import check_against, open_variants
    from masksurgery.pack_tables import bench_table
    from masksurgery.progress import Steps
    from masksurgery.tables import out, step
    from masksurgery.variants import Conditions

    check_against(names or ())
    conditions = Conditions(threads or torch.get_num_threads(), device, channels_last)
    with step(f"Loading and packing {directory}"):
        variants = open_variants(place_of(directory), names, conditions, trust=trust)
    with Steps() as steps:
        found = measure(variants, sizes, conditions, repeats=repeats, observer=steps)
    out().print(bench_table(directory, found))
    if json_file is not None:
        found.write_json(json_file, directory=directory)


def _split(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(size) for size in _split(text)]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--batch={text} is no list of positive numbers. Pass such as --batch 1,8.")
    return sizes

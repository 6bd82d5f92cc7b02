"""The layers of masksurgery beside those of the reference package `masksembles`: speed, and what each can do.

    pip install --no-deps masksembles
    python examples/benchmarks/reference_layers.py [--json FILE]

Takes about a minute. Where the reference loops without end it is stopped after --limit seconds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import masksurgery

PACKAGES = ("masksembles", "masksurgery")
Case = tuple[int, int, float]
TYPICAL: tuple[Case, ...] = ((64, 4, 2.0), (512, 4, 2.0), (2048, 4, 2.0), (4096, 4, 2.0), (768, 8, 3.0))
HARD: tuple[Case, ...] = ((8, 4, 2.0), (64, 4, 8.0), (64, 1, 3.0), (64, 32, 2.0), (12, 8, 6.0))
# So large that the system hands out fresh memory every time: below that the times depend on what was freed before.
FORWARDS = (("vectors", (16384, 1024)), ("images", (64, 64, 56, 56)))
N, SCALE, C = 4, 2.0, 16


@dataclass(frozen=True)
class Row:
    """One line of the table; seconds where a time was measured, by package."""

    section: str
    what: str
    masksembles: str
    masksurgery: str
    seconds: dict[str, float] | None = None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE too")
    parser.add_argument("--repeats", type=int, default=15, help="times are medians of so many (default: 15)")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds until masks count as endless (default: 10)")
    options = parser.parse_args()
    if importlib.util.find_spec("masksembles") is None:
        print("masksembles is not installed. Run: pip install --no-deps masksembles", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    rows = [*generation(options.repeats, options.limit), *forward(options.repeats), *behaviour()]
    versions = {name: importlib.metadata.version(name) for name in (*PACKAGES, "torch", "numpy")}
    console = Console(width=80)
    console.print(as_table(rows, versions))
    console.print(
        f"Medians of {options.repeats}, one thread of {os.cpu_count()} CPUs, torch {versions['torch']}, "
        f"numpy {versions['numpy']}."
    )
    if options.json:
        document = {"versions": versions, "repeats": options.repeats, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


def as_table(rows: list[Row], versions: dict[str, str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, width=80)
    table.add_column("", ratio=5)
    for name in PACKAGES:
        table.add_column(f"{name} {versions[name]}", justify="right", ratio=3)
    section = ""
    for row in rows:
        if row.section != section:
            table.add_section()
            table.add_row(f"[bold]{row.section}[/bold]")
            section = row.section
        table.add_row(row.what, row.masksembles, row.masksurgery)
    return table


# Masks.


def generation(repeats: int, limit: float) -> Iterator[Row]:
    for case in TYPICAL:
        yield drawn("Time to draw masks", case, repeats, limit)
    for case in HARD:
        yield drawn("Masks at the edges", case, 1, limit)


def drawn(section: str, case: Case, repeats: int, limit: float) -> Row:
    """Times for a typical case, the number of ones for a hard one; or what went wrong."""
    channels, n, scale = case
    texts, times = [], {}
    for name in PACKAGES:
        found = limited(limit * repeats, draw, name, case, repeats)
        if isinstance(found, str):
            texts.append(found)
        else:
            times[name], ones = found
            texts.append(duration(times[name]) if case in TYPICAL else f"{ones} of {channels} kept")
    return Row(section, f"channels {channels}, n={n}, scale={scale:g}", texts[0], texts[1], times)


def draw(name: str, case: Case, repeats: int) -> tuple[float, int] | str:
    """Median seconds of a draw and the ones in a mask, or the name of the error."""
    if name == "masksembles":
        generate = importlib.import_module("masksembles.common").generation_wrapper
    else:
        generate = masksurgery.generate_masks
    seconds = []
    try:
        for _ in range(repeats):
            start = time.perf_counter()
            masks = generate(*case)
            seconds.append(time.perf_counter() - start)
    except Exception as error:  # whatever it is, it is the result
        return type(error).__name__
    return statistics.median(seconds), int(masks[0].sum())


def limited(seconds: float, function: Callable[..., Any], *args: Any) -> Any:
    """The result of a call in a process of its own, which is ended after so many seconds."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, args), daemon=True)
    process.start()
    try:
        ours.recv()  # its imports are done
        return ours.recv() if ours.poll(seconds) else f"no end in {seconds:.0f} s"
    finally:
        process.kill()
        process.join()


def _answer(connection: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    connection.send("ready")
    connection.send(function(*args))


# A forward.


def layer_of(name: str, kind: str, *args: Any) -> Any:
    module = importlib.import_module("masksembles.torch") if name == "masksembles" else masksurgery
    return getattr(module, kind)(*args)


def forward(repeats: int) -> Iterator[Row]:
    for what, shape in FORWARDS:
        kind = "Masksembles1D" if len(shape) == 2 else "Masksembles2D"
        layers = [layer_of(name, kind, shape[1], N, SCALE) for name in PACKAGES]
        plain, theirs, ours = interleaved(torch.randn(shape), layers, repeats)
        seconds = {"masksembles": theirs, "masksurgery": ours}
        size = " x ".join(map(str, shape))
        yield Row("Time of a forward", f"{what}, {size}", duration(theirs), duration(ours), seconds)
        yield Row("Time of a forward", "  relative to x * mask", f"{theirs / plain:.2f}", f"{ours / plain:.2f}")


def interleaved(x: Tensor, layers: list[Any], repeats: int) -> list[float]:
    """Median seconds of x * mask, then of each layer. They take turns, so that a busy moment meets them all."""
    mask = torch.ones(1, x.shape[1], *[1] * (x.dim() - 2))
    ways: list[Callable[[Tensor], Tensor]] = [mask.mul, *layers]
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(repeats):
        for kept, way in zip(seconds, ways, strict=True):
            way(x)  # not timed: takes the memory that the one before it gave back to the system
            start = time.perf_counter()
            way(x)
            kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in seconds]


# What a layer can do.


def behaviour() -> Iterator[Row]:
    checks: list[tuple[str, Callable[[str], str]]] = [
        ("float16 stays", lambda name: keeps(name, torch.float16)),
        ("bfloat16 stays", lambda name: keeps(name, torch.bfloat16)),
        ("float64 stays", lambda name: keeps(name, torch.float64)),
        ("channels_last stays", channels_last),
        ("batch of 1, n=4", lambda name: shape_of(name, "Masksembles1D", 1, C)),
        ("batch of 6, n=4", lambda name: shape_of(name, "Masksembles1D", 6, C)),
        ("tokens [8, 5, 16]", lambda name: shape_of(name, "Masksembles1D", 8, 5, C)),
        ("volumes [8, 16, 2, 3, 3]", lambda name: shape_of(name, "Masksembles3D", 8, C, 2, 3, 3)),
        ("masks in the state_dict", in_state_dict),
        ("load_state_dict restores them", restores),
        ("masks from a seed of their own", seeded),
        ("random state untouched", leaves_random_state),
    ]
    for what, check in checks:
        theirs, ours = (attempt(check, name) for name in PACKAGES)
        yield Row("Behaviour", what, theirs, ours)


def attempt(check: Callable[[str], str], name: str) -> str:
    try:
        return check(name)
    except Exception as error:  # whatever it is, it is the result
        return type(error).__name__


def yes(answer: bool) -> str:
    return "yes" if answer else "no"


def keeps(name: str, dtype: torch.dtype) -> str:
    return yes(layer_of(name, "Masksembles2D", C, N, SCALE)(torch.ones(8, C, 3, 3, dtype=dtype)).dtype == dtype)


def channels_last(name: str) -> str:
    x = torch.ones(8, C, 3, 3).contiguous(memory_format=torch.channels_last)
    return yes(layer_of(name, "Masksembles2D", C, N, SCALE)(x).is_contiguous(memory_format=torch.channels_last))


def shape_of(name: str, kind: str, *shape: int) -> str:
    """ "yes" where every row comes back, masked to one of the masks; else the shape that came."""
    layer = layer_of(name, kind, C, N, SCALE)
    y: Tensor = layer(torch.ones(shape))
    if y.shape != shape:
        return f"gives {list(y.shape)}"
    ones = int(layer.masks[0].sum()) * math.prod(shape) // shape[0] // C
    return yes(y.flatten(1).sum(1).tolist() == [ones] * shape[0])


def in_state_dict(name: str) -> str:
    return yes("masks" in layer_of(name, "Masksembles1D", C, N, SCALE).state_dict())


def restores(name: str) -> str:
    one, other = (layer_of(name, "Masksembles1D", 256, N, SCALE) for _ in range(2))
    other.load_state_dict(one.state_dict())
    return yes(torch.equal(one.masks, other.masks))


def seeded(name: str) -> str:
    one, other = (layer_of(name, "Masksembles1D", 256, N, SCALE) for _ in range(2))
    if name == "masksurgery":
        one, other = (masksurgery.Masksembles1D(256, N, SCALE, seed=7) for _ in range(2))
    return yes(torch.equal(one.masks, other.masks))


def leaves_random_state(name: str) -> str:
    np.random.seed(0)  # noqa: NPY002, this is the state that the reference draws from
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(0)  # noqa: NPY002
    layer_of(name, "Masksembles1D", C, N, SCALE)
    return yes(np.random.random() == expected)  # noqa: NPY002


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


if __name__ == "__main__":
    sys.exit(main())

"""What the command line prints: tables, sums and progress, readable at 80 columns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from masksurgery.export import Exported
from masksurgery.macs import Macs
from masksurgery.predict import Entry, Row
from masksurgery.types import Site, Skipped, Surgery

T = TypeVar("T")


def out() -> Console:
    """Standard output. Names of layers and files are not markup, and numbers are not coloured."""
    return Console(markup=False, highlight=False)


@cache
def err() -> Console:
    """Standard error: one console, so that a line goes above a spinner or a bar that turns there."""
    return Console(stderr=True, markup=False, highlight=False)


def print_line(kind: str, text: str) -> None:
    """One line on standard error, however long it is and whatever line breaks it had."""
    line = Text.assemble("masksurgery: ", (kind, "bold red" if kind == "error" else "bold yellow"), ": ")
    err().print(line.append(" ".join(text.split())), soft_wrap=True)


@contextmanager
def step(text: str, live: bool = True) -> Iterator[None]:
    """A spinner on standard error, if that is a terminal; it leaves nothing behind. Without `live` the text alone."""
    if live:
        with err().status(escape(text)):
            yield
    else:
        if err().is_terminal:
            err().print(text)
        yield


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Without the hub's warning for each attempt to reach it: the error at the end says it once."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def track(items: Iterable[T], total: int, text: str) -> Iterator[T]:
    """A progress bar on standard error, where that is a terminal; it leaves nothing behind."""
    if not err().is_terminal:  # where a bar would leave an empty line
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err(), transient=True) as progress:
        yield from progress.track(items, total=total, description=escape(text))


# --- what a conversion did -------------------------------------------------------------------------------------------


def inspection(name: str, surgery: Surgery, macs: Macs) -> RenderableType:
    """Every site, every skipped layer with its reason, and the cost."""
    head = f"{name}: {_count(len(surgery.sites), 'site')}, {_count(len(surgery.skipped), 'layer')} skipped, "
    parts: list[RenderableType] = [
        Text(f"{head}n={surgery.n}, scale={surgery.scale:g}", style="bold"),
        site_table(surgery.sites),
    ]
    if surgery.skipped:
        parts += [Text("\nSkipped", style="bold"), skipped_table(surgery.skipped)]
    parts += [Text("\nMultiply-adds (MACs) of one sample", style="bold"), macs_table(macs, surgery.n)]
    return Group(*parts, *(Text(f"\nNote: {note}.") for note in surgery.notes))


def site_table(sites: Sequence[Site]) -> Table:
    """A line for each site; the other layers that a mask serves stand below its own."""
    folded = any(site.fold > 1 for site in sites)
    layers = {site.mask: site.layer for site in sites}
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="underline")
    table.add_column("layer", overflow="fold")
    table.add_column("masked node", overflow="fold")
    for title in ("channels", "ones", *(("fold",) if folded else ())):
        table.add_column(title, justify="right", no_wrap=True)
    for site in sites:
        layer = Text(site.layer + (f" (call {site.call + 1})" if site.call else ""), style="cyan")
        for other in site.chain:
            layer.append(f"\n  and {other}", style="dim")
        if site.heads:
            layer.append(f"\n  {site.heads} heads", style="dim")
        if site.stream not in ("", site.mask):
            layer.append(f"\n  masks of {layers[site.stream]}", style="dim")
        fold = (str(site.fold) if site.fold > 1 else "",) if folded else ()
        table.add_row(layer, Text(site.node), str(site.channels), str(site.ones), *fold)
    return table


def by_reason(skipped: Iterable[Skipped]) -> dict[str, list[str]]:
    """Layers by reason; reasons that differ in the number of a node alone are one."""
    groups: dict[str, list[str]] = {}
    for skip in skipped:
        reason = re.sub(r"'[^']*'", lambda name: re.sub(r"\d+", "*", re.sub(r"_\d+'$", "'", name[0])), skip.reason)
        layers = groups.setdefault(reason, [])
        if skip.layer not in layers:  # a layer that is called twice
            layers.append(skip.layer)
    return groups


def skipped_table(skipped: Iterable[Skipped]) -> Table:
    """For each reason the number of layers, and below it their names."""
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for reason, layers in by_reason(skipped).items():
        table.add_row(str(len(layers)), Text(reason))
        table.add_row("", Text(", ".join(layers), style="cyan"))
    return table


def macs_table(macs: Macs, n: int) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column(justify="right")
    for what, count in (
        ("base model", macs.base),
        (f"{_count(n, 'member')}, input repeated", macs.input_repeat),
        (f"{_count(n, 'member')}, repeated as late as possible", macs.late_repeat),
    ):
        table.add_row(f"  {what}", short(count), f"{count / macs.base:.3f}" if macs.base else "")
    return table


def summary(name: str, directory: str, surgery: Surgery, macs: Macs, proof: str | None) -> RenderableType:
    """What a conversion did, in a few lines."""
    kept = sum(site.ones for site in surgery.sites) / sum(site.channels for site in surgery.sites)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("  members", f"{surgery.n} (scale {surgery.scale:g}, seed {surgery.seed})")
    table.add_row("  sites", f"{len(surgery.sites)}; each member keeps {kept:.1%} of their channels")
    for k, (reason, layers) in enumerate(by_reason(surgery.skipped).items()):
        shown = layers[0] if len(layers) == 1 else f"{len(layers)} layers"
        table.add_row("  skipped" if k == 0 else "", f"{shown}: {reason}")
    cost = f"{short(macs.late_repeat)}, {macs.ratio:.3f} times the base model's {short(macs.base)}"
    table.add_row("  MACs", cost)
    if proof is not None:
        table.add_row("  verified", proof)
    return Group(Text(f"{name} is now an ensemble in {directory}", style="bold"), table)


def export_summary(name: str, file: str, exported: Exported, size: int) -> RenderableType:
    """What an exported file takes and returns, and how close it is to the model."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("  inputs", ", ".join(exported.inputs))
    table.add_row("  outputs", ", ".join(exported.outputs))
    sizes = ", ".join(map(str, exported.differences))
    worst = max(exported.differences.values())
    table.add_row("  difference", f"at most {worst:.1e} from the model, at batch size {sizes}")
    table.add_row("  size", f"{short(size)}B")
    return Group(Text(f"{name} is exported to {file}", style="bold"), table)


def short(count: int) -> str:
    """4089184256 as 4.09 G."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


# --- predictions -----------------------------------------------------------------------------------------------------


def prediction_table(rows: Sequence[Row]) -> Table:
    """The best labels of each image. Entropies are those of the image, or of each label if labels are independent.

    An image without an answer has "unsure" in its first line; below it, in brackets, what the answer would have been.
    """
    entropies = any(row.entropy is not None or entry.entropy is not None for row in rows for entry in row.entries)
    form = ".3f" if entropies else ".4g"  # probabilities, or numbers of any size
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="underline")
    table.add_column("image", overflow="fold")
    table.add_column("label", overflow="fold", ratio=1)
    for title in ("mean", "std", *(("entropy", "mutual inf.") if entropies else ())):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        name, of_image = Text(row.path, style="cyan"), _numbers(row, entropies)
        if row.unsure:
            table.add_row(name, Text("unsure", style="bold yellow"), "", "", *of_image)
            name, of_image = Text(""), [""] * len(of_image)
        for entry in row.entries:
            own = of_image if row.entropy is not None else _numbers(entry, entropies)
            label = Text(f"({entry.label})" if row.unsure else entry.label)
            numbers = (f"{entry.mean:{form}}", f"{entry.std:{form}}")
            table.add_row(name, label, *numbers, *own, style="dim" if row.unsure else None)
            name, of_image = Text(""), [""] * len(of_image)
    return table


def _numbers(of: Row | Entry, entropies: bool) -> list[str]:
    """The two entropies, where the table has columns for them; empty where there are none."""
    both = (of.entropy, of.mutual_information) if entropies else ()
    return ["" if value is None else f"{value:.3f}" for value in both]

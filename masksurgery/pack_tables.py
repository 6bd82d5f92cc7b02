"""What packing did, and models measured side by side, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from masksurgery.bench import Bench, Measurement, count_parameters
from masksurgery.macs import Macs
from masksurgery.pack import Barrier, PackedModel
from masksurgery.tables import short

COLUMNS = ("batch", "model", "ms", "IQR", "images/s", "to base", "MiB", "MACs", "params")


def bench_table(title: str, bench: Bench) -> RenderableType:
    """A line for each variant and batch size."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="underline")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=name != "model")
    previous = None
    for measured in bench.measurements:
        if previous not in (None, measured.batch):
            table.add_section()
        table.add_row("" if measured.batch == previous else str(measured.batch), *_cells(bench, measured))
        previous = measured.batch
    return Group(Text(title, style="bold"), table, *(Text(line) for line in _notes(bench)))


def _cells(bench: Bench, m: Measurement) -> Sequence[str]:
    ratio = bench.ratio(m)
    return (
        m.variant,
        f"{m.latency * 1e3:.1f}",
        f"{m.spread * 1e3:.1f}",
        f"{m.per_second:.1f}",
        "-" if ratio is None else f"{ratio:.2f}",
        "-" if m.memory is None else f"{m.memory / 2**20:.0f}",
        short(m.macs),
        short(m.parameters),
    )


def _notes(bench: Bench) -> list[str]:
    conditions, lines = bench.conditions, []
    for name, details in bench.details.items():
        if "layout" in details:
            lines.append(f"{name}: {describe_packing(details['layout'], details['dense'])}")
    memory = "peak memory of the weights and one forward"
    threads = f"{conditions.threads} thread{'' if conditions.threads == 1 else 's'}"
    where = threads if conditions.device == "cpu" else str(bench.machine.get("gpu", conditions.device))
    repeats = len(bench.measurements[0].seconds)
    lines.append(f"Medians of {repeats} forwards in turn, {where}. MiB: {memory}.")
    return lines


def packing_summary(name: str, directory: str, base: nn.Module, packed: PackedModel, macs: Macs) -> RenderableType:
    """What packing did, in a few lines.

    Args:
        name: Of the folder of the converted model.
        directory: Of the packed one.
        base: The base model.
        packed: What was made of it.
        macs: Of both.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("  members", str(packed.surgery.n))
    table.add_row("  layout", describe_packing(packed.layout, packed.dense))
    table.add_row("  MACs", _times_base(macs.late_repeat, macs.base))
    table.add_row("  parameters", _times_base(count_parameters(packed), count_parameters(base)))
    for k, (reason, nodes) in enumerate(by_reason(packed.barriers).items()):
        shown = nodes[0] if len(nodes) == 1 else f"{len(nodes)} nodes, such as {nodes[0]}"
        table.add_row("  barriers" if k == 0 else "", f"{shown}: {reason}")
    return Group(Text(f"{name} is now packed in {directory}", style="bold"), table)


def _times_base(count: int, base: int) -> str:
    return f"{short(count)}, {count / base:.3f} times the base model's {short(base)}" if base else short(count)


def by_reason(barriers: Iterable[Barrier]) -> dict[str, list[str]]:
    """Names of the nodes by reason."""
    groups: dict[str, list[str]] = {}
    for barrier in barriers:
        groups.setdefault(barrier.reason, []).append(barrier.node)
    return groups


def describe_packing(layout: str, dense: bool) -> str:
    """How a model is packed, in words."""
    return f"{layout}, {'with rows of zeros' if dense else 'sums by index'}"

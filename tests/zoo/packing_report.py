"""What packing saves, for the smallest architecture of every family of timm: packing.md.

    python tests/zoo/packing_report.py    # writes packing.md again, for the installed timm; some minutes

Everything is converted and packed with the defaults, the large ones without values: which channels are left depends
on the masks, and not on the weights.
"""

from __future__ import annotations

import json
import logging
import re
import statistics
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import track
from torch import nn

import masksurgery
import smallest
from coverage_report import table
from masksurgery.macs import count_macs
from masksurgery.model import ConvertedModel
from masksurgery.pack import PackedModel

PACKING = Path(__file__).with_name("packing.md")
LARGE = 60_000_000
COLUMNS = ("architecture", "family", "base", "converted", "packed", "barriers")


@dataclass(frozen=True)
class Row:
    """What became of one architecture.

    Attributes:
        base: Multiply-adds of the base model for one image, in millions.
        converted: Of the converted model, relative to the base model.
        packed: Of the packed model, likewise.
        barriers: How often packing needed the full width, and for which reasons; or the error.
    """

    name: str
    family: str
    base: str
    converted: str = ""
    packed: str = ""
    barriers: str = ""

    @property
    def failed(self) -> bool:
        return not self.packed


def measure(entry: dict[str, Any], family: str, base: nn.Module, model: ConvertedModel, packed: PackedModel) -> Row:
    """The row of three models on any device."""
    shape = 1, base.default_cfg["input_size"][0], entry["size"], entry["size"]
    image = torch.zeros(shape, dtype=next(base.parameters()).dtype)
    one, all_converted, all_packed = (count_macs(net, (image,)) for net in (base, model, packed))
    reasons = Counter(barrier.reason for barrier in packed.barriers)
    told = "; ".join(
        f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item))
    )
    return Row(
        entry["name"], family, f"{one / 1e6:.2f}", f"{all_converted / one:.3f}", f"{all_packed / one:.3f}", _cell(told)
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


def check(family: str, entry: dict[str, Any]) -> Row:
    """Convert and pack one architecture without weights; a failure is noted in the row."""
    try:
        # Some make tensors on the CPU in their forward, and some read the indices that they hold.
        with torch.device("meta" if entry["parameters"] > LARGE else "cpu"):
            base = timm.create_model(entry["name"], num_classes=10, **entry["kwargs"]).eval()
            x = torch.zeros(1, base.default_cfg["input_size"][0], entry["size"], entry["size"])
        model = masksurgery.convert(base, example_inputs=(x,))
        return measure(entry, family, base, model, masksurgery.pack(model, "unrolled", dense=False))
    except Exception as error:  # whatever a model raises is a result
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {str(error)[:300]} ({Path(place.filename).name})"
        return Row(entry["name"], family, "", barriers=_cell(text))


def parse(text: str) -> list[Row]:
    """The rows of packing.md's table."""
    lines = [line.strip("|").split(" | ") for line in text[text.index("## Every family") :].splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) == len(COLUMNS)]
    return [Row(*line) for line in cells if line[0] not in ("architecture", "---")]


def summary(rows: Sequence[Row]) -> str:
    packed = [float(row.packed) for row in rows if not row.failed]
    within = [f"{sum(ratio <= limit for ratio in packed)} at most {limit:g}" for limit in (1.2, 1.5, 2, 2.5, 3)]
    free = sum(not row.barriers for row in rows)
    return (
        f"- {len(packed)} of {len(rows)} are packed. All four members cost, with the base model as 1: "
        f"{', '.join(within)}; median {statistics.median(packed):.2f}.\n"
        f"- {free} have no barrier.\n"
    )


def write(rows: Sequence[Row]) -> str:
    """The text of packing.md."""
    versions = re.sub(r"\+\w+", "", f"timm {timm.__version__}, torch {torch.__version__}")
    lines = [[getattr(row, name) for name in ("name", *COLUMNS[1:])] for row in rows]
    return f"""# Packing

Written by `tests/zoo/packing_report.py`: {versions}.
The smallest architecture of each family of timm, at the smallest images that it takes, n=4, scale=2, default sites.
`base` is the base model's multiply-adds for one image, in millions; `converted` and `packed` are those of all four
members, relative to it. A barrier is an operator that takes all channels: there the zeros are put back.

{summary(rows)}
## Every family

{table(COLUMNS, lines)}"""


def main() -> int:
    torch.set_num_threads(1)
    logging.getLogger("masksurgery").setLevel(logging.ERROR)
    families = json.loads(smallest.PATH.read_text(encoding="utf-8"))["families"]
    rows = [check(family, entry) for family, entry in track(sorted(families.items()))]
    PACKING.write_text(write(rows), encoding="utf-8")
    print(summary(rows), end="")
    for row in rows:
        if row.failed:
            print(f"{row.name}: {row.barriers}")
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())

"""What can be exported and compiled, for the smallest architecture of every family of timm: export.md.

    python tests/zoo/export_report.py [--jobs 2] [--again]    # adds what is missing to export.md; hours on two cores

With timm's random weights, at the smallest images. Architectures of more than 60 million parameters are left out.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import masksurgery
from coverage_report import between, table
from families import FAMILIES, LIMIT, TOO_LARGE
from masksurgery.export import difference, largest

EXPORT = Path(__file__).with_name("export.md")
README = Path(__file__).parents[2] / "README.md"
MARKS = ("<!-- export: begin -->\n", "<!-- export: end -->\n")
OK = "ok"
BATCHES = (4, 7)


@dataclass(frozen=True)
class Row:
    """What became of one architecture: "ok", or why not."""

    architecture: str
    family: str
    pt2: str = ""
    onnx: str = ""
    packed_pt2: str = ""
    packed_onnx: str = ""
    compile_eval: str = ""
    compile_packed: str = ""
    compile_train: str = ""

    @property
    def checks(self) -> dict[str, str]:
        return {f.name: getattr(self, f.name) for f in fields(self)[2:]}


COLUMNS = tuple(f.name for f in fields(Row))
TITLES = tuple(name.replace("_", " ") for name in COLUMNS)


def check(family: str, entry: dict[str, Any]) -> Row:
    """Try everything with one architecture; what fails is told in the row."""
    torch.set_num_threads(1)
    logging.getLogger("masksurgery").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    base = timm.create_model(entry["name"], num_classes=10, **entry["kwargs"]).eval()
    x = torch.randn(7, base.default_cfg["input_size"][0], entry["size"], entry["size"])
    with tempfile.TemporaryDirectory() as folder:
        files, model = Path(folder), masksurgery.convert(base, n=2, example_inputs=(x[:1],)).eval()
        masksurgery.recalibrate(model, [x])  # with BatchNorm's initial statistics rounding may grow to 3e-4
        packed = cache(lambda: masksurgery.pack(model, "unrolled", dense=False))
        tried: dict[str, Callable[[], object]] = {
            "pt2": lambda: masksurgery.export(model, files / "model.pt2"),
            "onnx": lambda: masksurgery.export(model, files / "model.onnx"),
            "packed_pt2": lambda: masksurgery.export(packed(), files / "packed.pt2"),
            "packed_onnx": lambda: masksurgery.export(packed(), files / "packed.onnx"),
            "compile_eval": lambda: compare_compiled(model, x[:2]),
            "compile_packed": lambda: compare_compiled(packed(), x[:2]),
            "compile_train": lambda: [train_compiled(model, x[:batch]) for batch in BATCHES],
        }
        return Row(entry["name"], family, **{name: attempt(run) for name, run in tried.items()})


def check_alone(family: str, entry: dict[str, Any]) -> Row:
    """The same in a process of its own, for torch's exporters keep what they have seen."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(check, family, entry).result()


def attempt(run: Callable[[], object]) -> str:
    try:
        run()
    except Exception as error:  # whatever is raised is a result
        text = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {text[0][:200]}".replace("|", "/")
    return OK


def compiled(model: nn.Module) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="eager", dynamic=False)


def compare_compiled(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        pairs = zip(tree_leaves(compiled(model)(x)), tree_leaves(model(x)), strict=True)
    far = largest(difference(a.numpy(), b.numpy()) for a, b in pairs)
    if not far <= 1e-4:
        raise ValueError(f"differs by {far:.1e}")


def train_compiled(model: nn.Module, x: Tensor) -> None:
    model.train()
    try:
        leaves = [leaf for leaf in tree_leaves(compiled(model)(x)) if isinstance(leaf, Tensor)]
        if len(leaves[0]) != len(x):
            raise ValueError(f"{len(leaves[0])} outputs of {len(x)} samples")
        sum(leaf.float().mean() for leaf in leaves).backward()  # type: ignore[union-attr]
    finally:
        model.zero_grad()
        model.eval()


# --- export.md -------------------------------------------------------------------------------------------------------


def candidates() -> dict[str, dict[str, Any]]:
    """Of each family the architecture that is tried, the smallest first."""
    families = FAMILIES.keys() - TOO_LARGE.keys()
    return {family: FAMILIES[family] for family in sorted(families, key=lambda name: FAMILIES[name]["parameters"])}


def parse(text: str) -> list[Row]:
    """The rows of export.md's table."""
    if "## Every family" not in text:
        return []
    lines = [line.strip("|").split(" | ") for line in text[text.index("## Every family") :].splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if len(line) == len(COLUMNS)]
    return [Row(*line) for line in cells if line[0] not in ("architecture", "---")]


def summary(rows: Sequence[Row]) -> str:
    """How many of the families that were tried can be had in each way."""
    counts = [
        [title, f"{sum(getattr(row, name) == OK for row in rows)} of {len(rows)}"] for name, title in NAMES.items()
    ]
    tried, all_of_them = len(rows), len(candidates())
    note = "" if tried == all_of_them else f"\n(Tried so far: {tried} of {all_of_them} families.)\n"
    return table(("", "families"), counts) + note


NAMES = {
    "pt2": "converted, torch.export",
    "onnx": "converted, ONNX",
    "packed_pt2": "packed, torch.export",
    "packed_onnx": "packed, ONNX",
    "compile_eval": "converted, `torch.compile(fullgraph=True)` in eval",
    "compile_packed": "packed, `torch.compile(fullgraph=True)`",
    "compile_train": "converted, `torch.compile(fullgraph=True)` in training, batches of 4 and 7",
}


def versions() -> str:
    return re.sub(r"\+\w+", "", f"timm {timm.__version__}, torch {torch.__version__}")


def write(rows: Sequence[Row]) -> str:
    """The text of export.md."""
    lines = [[getattr(row, name) for name in COLUMNS] for row in sorted(rows, key=lambda row: row.family)]
    return f"""# Export

Written by `tests/zoo/export_report.py`: {versions()}.
The smallest architecture of each family of timm, as far as it has at most {LIMIT // 10**6} million parameters, at the
smallest images that it takes, n=2, scale=2, default sites, random weights, BatchNorm re-estimated. Files take batches
of any size, and agree with the model to 1e-4 at batch sizes 1, 2 and 5 (onnxruntime, torch.export).

{summary(rows)}
## Every family

{table(TITLES, lines)}"""


def in_readme(text: str, rows: Sequence[Row]) -> str:
    """The README with the summary of these rows between its marks."""
    return between(text, *MARKS, summary(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread")
    parser.add_argument("--again", action="store_true", help="all families, those too that are there already")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", help="no others")
    options = parser.parse_args(arguments)
    entries = candidates()
    text = EXPORT.read_text(encoding="utf-8") if EXPORT.exists() and not options.again else ""
    kept = parse(text) if versions() in text else []  # figures of other versions are not mixed with these
    rows = {row.family: row for row in kept if row.family in entries}
    todo = [family for family in options.only or entries if family not in rows or options.only]
    with ThreadPoolExecutor(options.jobs) as pool:
        waiting = [pool.submit(check_alone, family, entries[family]) for family in todo]
        for future in as_completed(waiting):
            try:
                row = future.result()
            except Exception as error:  # a process that was killed, or a model that cannot be converted
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            rows[row.family] = row
            print(row.architecture, {name: text for name, text in row.checks.items() if text != OK} or OK, flush=True)
            EXPORT.write_text(write(list(rows.values())), encoding="utf-8")
    README.write_text(in_readme(README.read_text(encoding="utf-8"), list(rows.values())), encoding="utf-8")
    print(summary(list(rows.values())), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

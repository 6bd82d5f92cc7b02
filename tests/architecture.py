"""The architecture in one picture, drawn from the imports of the code: architecture.svg.

python tests/architecture.py     # after a change of imports; tests/test_package.py holds the picture to the code
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from html import escape
from importlib.util import resolve_name
from pathlib import Path
from textwrap import wrap

PACKAGE = "masksurgery"
SOURCE = Path(__file__).parents[1] / PACKAGE
PICTURE = Path(__file__).with_name("architecture.svg")

# From the bottom up. A module imports only from its own row and the rows above it in this list, and never in a circle.
# A subpackage stands for all of its modules. A new module needs a place here.
ROWS: Mapping[str, tuple[str, ...]] = {
    "Words, masks": ("types", "masks"),
    "Layers, predictions, rules of operators": (
        "inputs", "kinds", "copying", "axes", "rules", "example", "layers", "adopt", "opaque", "prediction", "scores",
        "drawing",
    ),
    "Tracing, and where batch and channels are": ("running", "tracker", "layout", "branches", "tracing"),
    "Which nodes are masked, and the rewriting": (
        "regions", "flow", "ties", "candidates", "heads", "sites", "rewrite",
    ),
    "Conversion": ("graphs", "ensemble", "part", "model", "macs", "convert", "input_repeat"),
    "Proof, recalibration, and where models come from": (
        "oracle", "record", "sources", "weights", "adapt", "sizes", "verify", "recalibrate", "factory",
    ),
    "A model from its record": ("rebuild",),
    "Packing": ("pack",),
    "Saved models": ("folders", "restore", "checkpoint"),
    "Images and data": (
        "images", "transforms", "randomness", "stopping", "processes", "data", "variants", "memory",
    ),
    "Training: settings, losses, runs": (
        "losses", "training_config", "training_data", "events", "runs", "identity", "figures", "freezing",
    ),
    "Evaluation: metrics and results": (
        "metrics", "calibration", "corruptions", "evaluation", "evaluation_config", "thumbnails",
    ),
    "The loops of both": (
        "optimisation", "validation", "trainer", "subjects", "evaluation_data", "galleries", "evaluator",
    ),
    "Files for other runtimes, cards": ("export_files", "model_card"),
    "What a user calls": (
        "hub", "predict", "finetune", "evaluate", "plots", "panels", "report", "demo", "export", "keras", "bench",
        "bench_folder",
    ),
    "The package": ("__init__",),
    "The command line": (
        "options", "settings_options", "tables", "evaluation_tables", "pack_tables", "progress", "cli_finetune",
        "cli_evaluate", "cli_pack", "cli_export", "cli_bench", "cli", "__main__",
    ),
}  # fmt: skip
RANKS = {module: rank for rank, row in enumerate(ROWS.values()) for module in row}


def read_sources() -> dict[str, str]:
    """Dotted name inside the package (`pack.slicing`; a subpackage by its own name) to source text."""
    sources = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        sources[name] = path.read_text(encoding="utf-8")
    return sources


def find_imports(module: str, sources: Mapping[str, str]) -> set[str]:
    """Full dotted names that a module imports, on top or inside a function; `from a import b` counts as `a.b` if that
    is a module of this package, else as `a`."""
    is_package = module != "__init__" and any(other.startswith(f"{module}.") for other in sources)
    package = PACKAGE if module == "__init__" else f"{PACKAGE}.{module}"
    if not is_package and module != "__init__":
        package = package.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(sources[module])):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                inner = f"{origin}.{alias.name}".removeprefix(f"{PACKAGE}.")
                found.add(f"{PACKAGE}.{inner}" if inner in sources else origin)
    return found


def own_imports(module: str, sources: Mapping[str, str]) -> set[str]:
    """The modules of this package that a module imports, by their names inside of it."""
    own = {name for name in find_imports(module, sources) if name.split(".")[0] == PACKAGE}
    return {name.removeprefix(PACKAGE).removeprefix(".") or "__init__" for name in own}


# --- the picture ------------------------------------------------------------------------------------------------------

WIDTH, BAND, LEFT, LINE, COLUMNS, GAP = 1000, 720, 20, 18, 92, 14
STYLE = """
text { font: 13px ui-monospace, monospace; fill: #1f2328 } .title { font: 600 14px system-ui, sans-serif }
rect { fill: #f6f8fa; stroke: #d0d7de } path { fill: none; stroke: #0969da; stroke-opacity: .45 }
svg { background: #fff }
"""


def draw(sources: Mapping[str, str]) -> str:
    """A band for each row, the command line on top; an arc for the imports of one row from another."""
    counts: Counter[tuple[int, int]] = Counter()
    for module in sources:
        for other in own_imports(module, sources):
            counts[RANKS[module.split(".")[0]], RANKS[other.split(".")[0]]] += 1
    parts, middle, y = [], {}, GAP
    for rank, (title, modules) in reversed(list(enumerate(ROWS.items()))):
        lines = wrap("  ".join(sorted(modules)), COLUMNS)
        height = LINE * (len(lines) + 1) + GAP
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{BAND}" height="{height}" rx="6"/>')
        parts.append(f'<text class="title" x="{LEFT + 12}" y="{y + LINE + 2}">{escape(title)}</text>')
        for k, line in enumerate(lines, 2):
            parts.append(f'<text x="{LEFT + 12}" y="{y + k * LINE}">{escape(line)}</text>')
        middle[rank] = y + height / 2
        y += height + GAP
    names = list(ROWS)
    for (upper, lower), count in sorted(counts.items()):
        if upper != lower:
            edge, bulge = LEFT + BAND, LEFT + BAND + 16 * (upper - lower)
            start, end = middle[upper] + 5, middle[lower] - 5
            parts.append(
                f'<path d="M{edge} {start:g}C{bulge} {start:g} {bulge} {end:g} {edge} {end:g}" '
                f'stroke-width="{min(0.6 * count**0.5, 5):.2f}"><title>{escape(names[upper])}: {count} imports from '
                f"{escape(names[lower])}</title></path>"
            )
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}">\n'
        f"<style>{STYLE}</style>\n{body}\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(read_sources()), encoding="utf-8")

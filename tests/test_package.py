"""The package as a whole: a light import, and imports between its modules that run downwards only."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

PACKAGE = "masksurgery"
SOURCE = Path(__file__).parents[1] / PACKAGE

# From the bottom up. A module imports only from its own row and the rows above it in this list, and never in a circle.
# A subpackage stands for all of its modules. A new module needs a place here.
ROWS = (
    ("types", "masks"),
    (
        "inputs",
        "kinds",
        "copying",
        "axes",
        "rules",
        "example",
        "layers",
        "adopt",
        "opaque",
        "prediction",
        "scores",
        "drawing",
    ),
    ("running", "tracker", "layout", "branches", "tracing"),
    ("regions", "flow", "ties", "candidates", "heads", "sites", "rewrite"),
    ("graphs", "ensemble", "part", "model", "macs", "convert", "input_repeat"),
    ("oracle", "record", "sources", "weights", "adapt", "sizes", "verify", "recalibrate", "factory"),
    ("rebuild",),
    ("pack",),
    ("folders", "restore", "checkpoint"),
    ("images", "transforms", "randomness", "stopping", "processes", "data", "variants", "memory"),
    ("losses", "training_config", "training_data", "events", "runs", "identity", "figures", "freezing"),
    ("metrics", "calibration", "corruptions", "evaluation", "evaluation_config", "thumbnails"),
    ("optimisation", "validation", "trainer", "subjects", "evaluation_data", "galleries", "evaluator"),
    ("export_files", "model_card"),
    (
        "hub",
        "predict",
        "finetune",
        "evaluate",
        "plots",
        "panels",
        "report",
        "demo",
        "export",
        "keras",
        "bench",
        "bench_folder",
    ),
    ("__init__",),
    (
        "options",
        "settings_options",
        "tables",
        "evaluation_tables",
        "pack_tables",
        "progress",
        "cli_finetune",
        "cli_evaluate",
        "cli_pack",
        "cli_export",
        "cli_bench",
        "cli",
        "__main__",
    ),
)
RANKS = {module: rank for rank, row in enumerate(ROWS) for module in row}
TIMM_ALLOWED = {"tracing", "checkpoint", "data", "transforms", "images", "optimisation", "cli", "factory", "adapt"}
HEAVY = ("timm", "rich", "typer", "matplotlib", "huggingface_hub", "torchvision")


def read_sources() -> dict[str, str]:
    """Dotted name inside the package (`pack.slicing`; a subpackage by its own name) to source text."""
    sources = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        sources[name] = path.read_text(encoding="utf-8")
    return sources


def find_imports(module: str, sources: dict[str, str]) -> set[str]:
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


def find_faults(sources: dict[str, str]) -> list[str]:
    """What breaks the layering, one line each; empty when all is well."""
    imports = {module: find_imports(module, sources) for module in sources}
    inside: dict[str, set[str]] = {}
    faults = []
    for module, names in imports.items():
        if module.split(".")[0] not in RANKS:
            faults.append(f"{module} has no rank: give it a place in ROWS")
        if module.split(".")[0] not in TIMM_ALLOWED and any(name.split(".")[0] == "timm" for name in names):
            faults.append(f"{module} imports timm")
        own = {name for name in names if name.split(".")[0] == PACKAGE}
        inside[module] = {name.removeprefix(PACKAGE).removeprefix(".") or "__init__" for name in own}
        for other in sorted(inside[module]):
            ranks = [RANKS.get(name.split(".")[0]) for name in (module, other)]
            if None not in ranks and ranks[0] < ranks[1]:
                faults.append(f"{module} imports {other}, which stands above it")
    try:
        TopologicalSorter(inside).prepare()
    except CycleError as error:
        faults.append("a circle of imports: " + " -> ".join(error.args[1]))
    return faults


def test_imports_run_downwards() -> None:
    sources = read_sources()
    assert {"__init__", "types", "masks"} <= set(sources)
    assert find_faults(sources) == []


@pytest.mark.parametrize(
    ("extra", "fault"),
    [
        ({"newcomer": ""}, "newcomer has no rank: give it a place in ROWS"),
        ({"masks": "from .layers import f"}, "masks imports layers, which stands above it"),
        ({"masks": "def f():\n    from . import layers"}, "masks imports layers, which stands above it"),
        ({"masks": "import masksurgery.layers"}, "masks imports layers, which stands above it"),
        ({"masks": "from masksurgery import convert"}, "masks imports __init__, which stands above it"),
        ({"layers": "from .pack.slicing import f"}, "layers imports pack.slicing, which stands above it"),
        ({"pack.slicing": "from ..cli import main"}, "pack.slicing imports cli, which stands above it"),
        ({"pack": "from .slicing import f", "pack.slicing": "from . import g"}, "a circle of imports: "),
        ({"masks": "from .types import a", "types": "from .masks import b"}, "a circle of imports: "),
        ({"layers": "from timm.layers import Format"}, "layers imports timm"),
    ],
)
def test_a_wrong_import_is_found(extra: dict[str, str], fault: str) -> None:
    sound = {"__init__": "from .masks import a", "types": "", "masks": "import numpy", "cli": "import timm.models"}
    sound |= {"layers": "from . import masks, types", "pack": "", "pack.slicing": "from ..layers import a"}
    assert find_faults(sound) == []
    assert any(found.startswith(fault) for found in find_faults(sound | extra))


def test_import_is_light(tmp_path: Path) -> None:
    code = f"import sys, {PACKAGE}; print(*sorted(m for m in sys.modules if m.split('.')[0] in {HEAVY}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")

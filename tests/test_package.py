"""The package as a whole: a light import, and imports between its modules that run downwards only."""

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml

import masksurgery
from architecture import PACKAGE, PICTURE, RANKS, SOURCE, draw, find_imports, own_imports, read_sources

TIMM_ALLOWED = {"tracing", "checkpoint", "data", "transforms", "images", "optimisation", "cli", "factory", "adapt"}
HEAVY = ("timm", "keras", "rich", "typer", "matplotlib", "huggingface_hub", "torchvision")


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
        inside[module] = own_imports(module, sources)
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


def test_the_picture_shows_them() -> None:
    assert PICTURE.read_text(encoding="utf-8") == draw(read_sources()), "run python tests/architecture.py"


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


@pytest.mark.slow
def test_import_is_light(tmp_path: Path) -> None:
    code = f"import sys, {PACKAGE}; print(*sorted(m for m in sys.modules if m.split('.')[0] in {HEAVY}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")


def test_one_version_everywhere() -> None:
    root = SOURCE.parent
    assert f'version = "{masksurgery.__version__}"' in (root / "pyproject.toml").read_text()
    assert yaml.safe_load((root / "CITATION.cff").read_text())["version"] == masksurgery.__version__
    assert f"## {masksurgery.__version__} " in (root / "CHANGELOG.md").read_text()


def test_everything_public_stands_in_the_readme() -> None:
    text = (SOURCE.parent / "README.md").read_text(encoding="utf-8")
    api = text[text.index("## API") :]
    assert [name for name in masksurgery.__all__ if f"`{name}`" not in api] == []

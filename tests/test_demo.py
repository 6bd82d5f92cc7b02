"""The demo, as a user runs it."""

import json
import resource
from pathlib import Path

import pytest

from browser import check_page
from finetuning import run
from masksurgery import ConfigError, load
from masksurgery.demo import Demo
from readme import block, shape, shell, without_installation

LIMIT = 600
"""CPU seconds that the demo may take. The README's machine needs under 180, one without AVX-512 three times that."""


def test_the_images(tmp_path: Path) -> None:
    demo = Demo(tmp_path / "demo")
    demo.prepare()
    parts = {part: sorted(demo.data.glob(f"{part}/*/*.png")) for part in ("train", "val", "test")}
    assert {part: len(files) for part, files in parts.items()} == {"train": 300, "val": 200, "test": 943}
    assert {file.parent.name for files in parts.values() for file in files} == set("01234567")
    names = [file.name for files in parts.values() for file in files]
    assert len(set(names)) == len(names)  # none is in two parts
    assert {file.name[0] for file in demo.unseen.iterdir()} == {"8", "9"} and len(list(demo.unseen.iterdir())) == 354
    with pytest.raises(ConfigError, match=r"demo is not empty\. Pass another folder"):
        demo.prepare()


@pytest.mark.slow
def test_the_demo(tmp_path: Path) -> None:
    assert without_installation(block("Try it", "bash").text.splitlines()[-1]) == "masksurgery demo"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out, err = run("demo", folder=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < LIMIT
    assert max(len(line) for line in out.splitlines() if not line.startswith("Next: ")) <= 80, out
    assert "fine-tuning the ensemble" in err and "warning" not in err
    for words in (
        "NLL",
        "Out of distribution",
        "entropy",
        "rotation",
        "The report is in masksurgery-demo/report.html.",
    ):
        assert words in out
    folder = tmp_path / "masksurgery-demo"
    found = json.loads((folder / "evaluation.json").read_text())
    base, ensemble = found["models"]
    assert base["figures"]["accuracy"] > 0.95 and ensemble["figures"]["accuracy"] > 0.95
    assert found["ood"][str(Path("masksurgery-demo") / "unseen")] == 354
    assert load(folder / "ensemble").threshold is not None
    check_page(folder / "report.html")
    assert (folder / "report.html").stat().st_size < 5_000_000
    ((command, told),) = block("Evaluation", "console").commands()
    assert told.pop() == "..."
    seen, expected = shape(shell(command, tmp_path).splitlines()), shape(told)
    assert seen[: len(expected)] == expected and "unsure" in seen[1]

"""The README's code blocks, by the section that they stand in."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
INSTALLS = re.compile(r"(?:\.venv/bin/)?pip install (-q )?(?P<what>.+?) && ")


@dataclass(frozen=True)
class Block:
    """A fenced block: its section, which one of the section's it is, its language, and the text."""

    section: str
    number: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.section}, {self.language} {self.number}"

    def commands(self) -> list[tuple[str, list[str]]]:
        """Command lines with the lines that each of them prints; of a `bash` block nothing is told of those."""
        if self.language == "bash":
            return [(line, []) for line in self.text.splitlines() if line.strip()]
        found: list[tuple[str, list[str]]] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                found.append((line.removeprefix("$ "), []))
            else:
                found[-1][1].append(line)
        return found


def blocks() -> list[Block]:
    section, found = "", []
    text = README.read_text(encoding="utf-8")
    for heading, language, body in re.findall(r"^(?:#+ (.+)|```(.*)\n((?:.*\n)*?)```)$", text, re.M):
        if heading:
            section = heading
        else:
            number = sum((block.section, block.language) == (section, language) for block in found)
            found.append(Block(section, number, language, body))
    return found


def block(section: str, language: str, number: int = 0) -> Block:
    return next(b for b in blocks() if (b.section, b.language, b.number) == (section, language, number))


def shell(command: str, folder: Path, **settings: str) -> str:
    """What a command line prints, in a terminal of 80 columns, with this Python's programs first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "COLUMNS": "80", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **settings}
    done = subprocess.run(
        ["bash", "-euc", command], cwd=folder, env={**os.environ, **own}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def replaced(text: str, replacements: Mapping[str, str]) -> str:
    """The text with each of these replaced; one that is not in it is an error."""
    for old, new in replacements.items():
        assert old in text, f"{old!r} is not in\n{text}"
        text = text.replace(old, new)
    return text


def shape(lines: list[str]) -> list[str]:
    """Lines without the figures, which differ between machines, and without the width of columns."""
    plain = [re.sub(r"\d+", "#", line) for line in lines]
    plain = [re.sub(r"#(\.#)?(e[+-]#)?", "#", line) for line in plain]
    return [" ".join(line.split()) for line in plain if line.strip()]


def without_installation(command: str) -> str:
    """The command without the parts that install, once what they install is found to be there."""
    command = command.replace("python3 -m venv .venv && ", "")
    extras = metadata("masksurgery").get_all("Provides-Extra")
    for found in INSTALLS.finditer(command):
        for what in found["what"].split():
            if extra := re.fullmatch(r'"?(?:-e )?"?\.\[(\w+)\]"?', what):
                assert extra[1] in extras
            elif not what.startswith("-"):
                done = subprocess.run([sys.executable, "-m", "pip", "show", "-q", what], check=False)
                assert done.returncode == 0, f"{what} is not installed"
    return INSTALLS.sub("", command).replace(".venv/bin/", "")

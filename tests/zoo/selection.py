"""Which part of the zoo and of the slow tests is run: all of it, or what the commit chooses.

`pytest -m "zoo or slow"` runs everything. With MASKSURGERY_TESTS=part, as in CI, it takes the part that the commit
chooses (MASKSURGERY_COMMIT, else git's HEAD; without either always the same part).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path


def sharded() -> bool:
    """Whether only a part is looked at."""
    tests = os.environ.get("MASKSURGERY_TESTS") or "all"
    if tests not in ("all", "part"):
        raise ValueError(f'MASKSURGERY_TESTS={tests!r} is not "all" or "part".')
    return tests == "part"


def chosen(name: str, parts: int = 8) -> bool:
    """Whether `name` is looked at: one of so many parts, which changes with the commit, or everything."""
    return not sharded() or in_part(name, parts)


@cache
def commit() -> str:
    """The commit that chooses the part; empty where it is not known."""
    given = os.environ.get("MASKSURGERY_COMMIT")
    if given is not None:
        return given
    command = ["git", "rev-parse", "HEAD"]
    try:
        return subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def in_part(name: str, parts: int) -> bool:
    """Whether `name` is in the one of so many parts that the commit chooses."""
    return int(hashlib.sha256(f"{name} {commit()}".encode()).hexdigest(), 16) % parts == 0

"""Options of a command that are the fields of a dataclass."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from masksurgery.data import DataConfig
from masksurgery.settings_options import pick, with_settings
from masksurgery.training_config import FinetuneConfig
from masksurgery.transforms import Augmentation


@dataclass(frozen=True)
class Settings:
    """A few.

    Attributes:
        rate: How fast. It is not
            shown beyond the first sentence.
        kind: Which `one`.
        limit: At most so many.
        names: Some names.
        span: From and to.
        quick: In a hurry.
        seed: For the draws.
    """

    rate: float = 0.5
    kind: Literal["a", "b"] | None = None
    limit: int | None = None
    names: tuple[str, ...] = ()
    span: tuple[float, float] = (0.5, 1.0)
    quick: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Others:
    """Others.

    Attributes:
        seed: Not shown: the first class has it.
        hidden: Is the command's own.
    """

    seed: int = 0
    hidden: str = ""


def call(*arguments: str) -> tuple[Any, str]:
    seen: list[Any] = []
    app = typer.Typer()

    @app.command()
    @with_settings(Settings, Others, without=("hidden",))
    def command(file: str, **settings: Any) -> None:
        seen.append((file, pick(Settings, settings), pick(Others, settings, hidden=file)))

    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
    return (seen or [None])[0], re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def test_fields_become_options() -> None:
    names = ("--names", "p", "--names", "q", "--span", "0.1", "0.2")
    found, _ = call("x", "--rate", "2", "--kind", "b", "--limit", "3", *names, "--quick", "--seed", "7")
    assert found == ("x", Settings(2.0, "b", 3, ("p", "q"), (0.1, 0.2), True, 7), Others(7, "x"))
    assert call("x")[0] == ("x", Settings(), Others(hidden="x"))
    assert call("x", "--no-quick")[0] == call("x")[0]
    assert call("x", "--limit", "many")[0] is None


def test_the_help_is_the_docstrings() -> None:
    _, text = call("--help")
    assert "How fast." in text and "beyond the first" not in text
    assert "Which one." in text and "a|b" in text
    assert "For the draws." in text and "Not shown" not in text and "--hidden" not in text
    assert "Some names. May be repeated." in text


@pytest.mark.parametrize("kind", [DataConfig, Augmentation, FinetuneConfig])
def test_every_setting_of_finetune_is_explained(kind: type) -> None:
    @with_settings(kind)
    def command(**settings: Any) -> None: ...

    import inspect

    for parameter in inspect.signature(command).parameters.values():
        (option,) = parameter.annotation.__metadata__
        assert len(option.help) > 10 and option.help.endswith((".", "..."))

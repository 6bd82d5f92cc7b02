"""What a run prints, as a terminal and a file see it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

import masksurgery.progress as progress
from masksurgery.events import Begun, Measured


def measured(step: int, **more: Any) -> Measured:
    return Measured(1 + (step - 1) // 5, step, 1e-3, 0.51234, 0.875, 123.4, 3725.0, **more)


def test_epochs_are_lines_of_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with progress.TrainingProgress() as show:
        show(Begun(5, 10, 5))
        show(measured(7))
        show(measured(10, val={"nll": 0.25, "accuracy": 0.9}, best=True))
        show(measured(10, val={"nll": 0.26, "accuracy": 0.9}))
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "Going on after step 5 of 10.",
        "epoch  train loss  train acc    val nll   val acc   images/s      time",
        "    2      0.5123      0.875     0.2500     0.900        123   1:02:05  best",
        "    2      0.5123      0.875     0.2600     0.900        123   1:02:05",
    ]
    assert err == ""


def test_numbers_have_other_columns(capsys: pytest.CaptureFixture[str]) -> None:
    show = progress.TrainingProgress()
    show(Measured(1, 5, 1e-3, 0.5, None, 10.0, 59.6, val={"nll": 1.5, "mse": 0.125}))
    assert capsys.readouterr().out.splitlines() == [
        "epoch  train loss    val nll    val mse   images/s      time",
        "    1      0.5000     1.5000     0.1250         10      1:00",
    ]


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.TrainingProgress(shown=False) as show:
        show(Begun(0, 10, 5))
        show(measured(5, val={"nll": 0.25}))
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(progress, "err", lambda: screen)
    with progress.TrainingProgress() as show:
        assert show.bar is not None
        show.bar.refresh()
        show(Begun(0, 10, 5))
        show(measured(7))
        show.bar.refresh()
        assert show.bar.tasks[0].completed == 7 and show.bar.tasks[0].total == 10
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "reading model and data" in text
    assert "epoch 2/2" in text and "loss 0.5123  acc 0.875  123 images/s" in text

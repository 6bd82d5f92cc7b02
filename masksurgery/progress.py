"""What long work prints: a bar while it runs, and for a training a line for each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn

from masksurgery.events import Begun, Measured
from masksurgery.tables import err, out

if TYPE_CHECKING:
    from typing_extensions import Self

TITLES = {
    "epoch": 5,
    "train loss": 10,
    "train acc": 9,
    "val nll": 9,
    "val mse": 9,
    "val acc": 8,
    "images/s": 9,
    "time": 8,
}
"""The columns of the table, with their widths."""


class _Bar:
    """A context with a bar on standard error, if that is a terminal; it leaves nothing behind.

    Args:
        text: What is done first.
        columns: Of the bar.
        shown: Whether this process prints; of several only the main one does.
        fields: Of the columns.
    """

    def __init__(self, text: str, columns: Sequence[ProgressColumn], shown: bool, **fields: Any) -> None:
        self.bar = Progress(*columns, console=err(), transient=True) if shown and err().is_terminal else None
        self.task = TaskID(0) if self.bar is None else self.bar.add_task(text, total=None, **fields)

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()


class TrainingProgress(_Bar):
    """Shows a run: a bar on standard error where that is a terminal, the figures of each epoch on standard output.

    Args:
        shown: Whether this process prints; of several only the main one does.
    """

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self.titles: list[str] = []
        self.steps_per_epoch = self.epochs = 1
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
        )  # fmt: skip
        super().__init__("reading model and data", columns, shown, figures="")

    def __call__(self, event: Begun | Measured) -> None:
        if not self.shown:
            return
        if isinstance(event, Begun):
            self._begin(event)
        elif event.val is not None:
            self._print_epoch(event)
        elif self.bar is not None:
            self.bar.update(
                self.task, completed=event.step, description=self._where(event.step), figures=_figures(event)
            )

    def _begin(self, event: Begun) -> None:
        self.steps_per_epoch, self.epochs = event.steps_per_epoch, event.steps // event.steps_per_epoch
        if event.processes > 1:
            out().print(f"On {event.processes} processes.")
        if event.step:
            out().print(f"Going on after step {event.step} of {event.steps}.")
        if self.bar is not None:
            self.bar.reset(self.task, total=event.steps, completed=event.step, description=self._where(event.step))

    def _where(self, step: int) -> str:
        epoch = min(step // self.steps_per_epoch + 1, self.epochs)
        return f"epoch {epoch}/{self.epochs}"

    def _print_epoch(self, event: Measured) -> None:
        cells = _cells(event)
        if not self.titles:
            self.titles = [title for title in TITLES if title in cells]
            out().print("  ".join(f"{title:>{TITLES[title]}}" for title in self.titles))
        line = "  ".join(f"{cells[title]:>{TITLES[title]}}" for title in self.titles)
        out().print(line + ("  best" if event.best else ""))


class Steps(_Bar):
    """Shows what is being done: a bar on standard error, if that is a terminal; it leaves nothing behind.

    Args:
        shown: Whether this process prints.
    """

    def __init__(self, shown: bool = True) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(compact=True))
        super().__init__("reading models and data", columns, shown)

    def __call__(self, text: str, done: int, total: int | None) -> None:
        """So many of so many are done (None where that is not known)."""
        if self.bar is not None:
            if self.bar.tasks[0].description != text:
                self.bar.reset(self.task, total=total, description=text)
            self.bar.update(self.task, completed=done)

    def say(self, text: str) -> None:
        """A step that takes a while begins; without a terminal too, where it is a line."""
        if self.bar is not None:
            self.bar.reset(self.task, total=None, description=text)
        else:
            err().print(text)


def _cells(event: Measured) -> dict[str, str]:
    val = event.val or {}
    cells = {"epoch": str(event.epoch), "train loss": f"{event.train_loss:.4f}"}
    if event.train_accuracy is not None:
        cells["train acc"] = f"{event.train_accuracy:.3f}"
    cells |= {f"val {name}": f"{val[name]:.4f}" for name in ("nll", "mse") if name in val}
    if "accuracy" in val:
        cells["val acc"] = f"{val['accuracy']:.3f}"
    return cells | {"images/s": f"{event.images_per_second:.0f}", "time": _time(event.seconds)}


def _figures(event: Measured) -> str:
    accuracy = "" if event.train_accuracy is None else f"  acc {event.train_accuracy:.3f}"
    return f"loss {event.train_loss:.4f}{accuracy}  {event.images_per_second:.0f} images/s"


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

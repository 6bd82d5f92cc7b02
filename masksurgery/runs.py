"""The folder of a training run: what it was asked, how far it is, what it has measured, and the models it has made."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from masksurgery.types import CheckpointError, ConfigError
from masksurgery.weights import CONFIG, WEIGHTS, read_tensors, replace_file

STATE = "resume.pt"
METRICS = "metrics.csv"
SETTINGS = "run.json"
LAST = "last"
TRACKERS = "masksurgery"
DRAFTS = (STATE, METRICS, SETTINGS, CONFIG, WEIGHTS, "backup")
VERSION = 1

COLUMNS = (
    "epoch", "step", "lr", "train_loss", "train_accuracy", "val_nll", "val_mse", "val_accuracy", "images_per_second",
    "seconds",
)  # fmt: skip
"""Of metrics.csv: a row every few steps, and a row with the validation's figures after each epoch."""


@dataclass(frozen=True)
class RunFolder:
    """A folder with the best model itself, and beside it the last one, the state to resume from, and the metrics."""

    path: Path

    @property
    def last(self) -> Path:
        return self.path / LAST

    @property
    def has_state(self) -> bool:
        return (self.path / STATE).exists()

    def begin(self, settings: Mapping[str, Any], resume: bool, force: bool) -> None:
        """Make the folder, or find that the run in it is the one that is to go on.

        Raises:
            ConfigError: It holds something else, or a run with other settings; nothing has been changed.
            CheckpointError: It cannot be written.
        """
        written = json.loads(json.dumps({"version": VERSION, **_flat(settings)}))
        if resume and (self.path / SETTINGS).exists():
            self._check_settings(written)
        elif not force and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            self._refuse()
        else:
            self._write_settings(written)
        for folder in (self.path, self.last):  # of a run that was killed while it wrote
            for stale in (path for name in DRAFTS for path in folder.glob(f".{name}.*.tmp")):
                with contextlib.suppress(OSError):
                    stale.unlink()

    def _refuse(self) -> None:
        if not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file. Pass a folder, which is made if it does not exist.")
        if (self.path / SETTINGS).exists():
            raise ConfigError(
                f"{self.path} holds a run. Pass --resume (resume=True) to go on with it, --force to begin anew."
            )
        raise ConfigError(f"{self.path} is not empty. Pass another folder, or --force to overwrite what is in it.")

    def _write_settings(self, settings: Mapping[str, Any]) -> None:
        text = json.dumps(settings, indent=2)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.path / SETTINGS).exists():  # else a folder `last` is somebody else's
                for folder in (self.last, self.path / TRACKERS):
                    shutil.rmtree(folder, ignore_errors=True)
            for name in (STATE, SETTINGS, METRICS, CONFIG, WEIGHTS):
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be written ({error.strerror}).") from error
        replace_file(self.path / SETTINGS, lambda path: path.write_text(text, encoding="utf-8"))

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        try:
            before = json.loads((self.path / SETTINGS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path / SETTINGS}: cannot be read ({error}). Begin anew with --force."
            ) from error
        differ = [
            f"{name} is {settings.get(name)!r}, then {before.get(name)!r}"
            for name in sorted({*settings, *before})
            if settings.get(name) != before.get(name)
        ]
        if differ:
            raise ConfigError(
                f"{self.path}: the run in it was begun with other settings: {'; '.join(differ)}. A run goes on with "
                f"its own; pass those, or begin another one in another folder."
            )

    # --- the state ---------------------------------------------------------------------------------------------------

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Replace the state to resume from; a CheckpointError leaves the one before as it was."""
        replace_file(self.path / STATE, lambda path: torch.save(dict(state), path))

    def read_state(self) -> dict[str, Any] | None:
        """The state to resume from; None if there is none yet. No code in it is run."""
        path = self.path / STATE
        if not self.has_state:
            return None
        state = read_tensors(path)
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise CheckpointError(f"{path}: is not of a training run. Begin anew with --force.")
        return state

    # --- the metrics -------------------------------------------------------------------------------------------------

    def keep_metrics(self, step: int, evaluated: bool) -> None:
        """Drop what a resumed run writes again: the rows of later steps, and a validation that is to be repeated.

        A file is begun if there is none.
        """
        path = self.path / METRICS
        rows = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                # A row that was cut short has less columns.
                whole = [row for row in csv.DictReader(file) if None not in row.values()]
                last = step if evaluated else step - 1
                rows = [row for row in whole if int(row["step"]) <= (last if _has_scores(row) else step)]

        def write(draft: Path) -> None:
            with draft.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
                writer.writeheader()
                writer.writerows(rows)

        replace_file(path, write)

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row; what it does not have stays empty."""
        path = self.path / METRICS
        try:
            with path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, COLUMNS).writerow(dict(row))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written ({error.strerror}).") from error


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def _has_scores(row: Mapping[str, str]) -> bool:
    return any(row[name] for name in COLUMNS if name.startswith("val_"))

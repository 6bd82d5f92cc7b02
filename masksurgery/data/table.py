"""A CSV file of images and their targets."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from masksurgery.data.config import TRAIN_NAMES, VAL_NAMES, DataConfig
from masksurgery.data.source import FileItems, Source
from masksurgery.images import readable
from masksurgery.types import ConfigError, DataError

FILE_COLUMNS = ("file", "path")
SPLIT_COLUMN = "split"
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class _Row:
    """One line: the file, the cells of the target columns, and its split ("" without that column)."""

    line: int
    file: Path
    cells: tuple[str, ...]
    split: str


def open_table(
    config: DataConfig, task: str, channels: int, num_classes: int | None, training: bool = True
) -> tuple[Source | None, Source | None, tuple[str, ...] | None]:
    """Read files and targets.

    The column `file` or `path`, else the first, holds the files, a column `split` their part, every other column a
    target: numbers for a regression, 0 or 1 for "multilabel", one label for a classification (if all labels are
    non-negative integers they are the indices themselves).

    Args:
        training: Open the training part where there is a validation part, too.
    Returns:
        The training part, the validation part or None, and the names of the classes (of the columns for "multilabel",
        None for a regression).
    Raises:
        DataError: With the line: a column is missing, a cell is none of these, a file does not exist; or there is
            nothing.
    """
    table, folder = _places(config)
    columns, rows = _read(table, folder)
    if task in ("regression", "multilabel"):
        targets, classes = _numbers(table, columns, rows, task), columns if task == "multilabel" else None
    else:
        targets, classes = _labels(table, columns, rows, num_classes)
    everything = Source(FileItems([row.file for row in rows], targets, folder), np.arange(len(rows)), channels)
    train, val = _divide(config, table, [row.split for row in rows], everything, training)
    return train, val, classes


def open_unlabelled_table(config: DataConfig, channels: int) -> Source:
    """Read files alone: those of the validation part, else of the test part, else all. Every target is 0.

    Raises:
        DataError: With the line: the table cannot be read, or a file does not exist.
    """
    table, folder = _places(config)
    _, rows = _read(table, folder, labelled=False)
    splits = {row.split for row in rows}
    wanted = next((name for name in (*VAL_NAMES, "test") if name in splits), None)
    files = [row.file for row in rows if wanted in (None, row.split)]
    return Source(FileItems(files, np.zeros(len(files), int), folder), np.arange(len(files)), channels, "unlabelled")


def _places(config: DataConfig) -> tuple[Path, Path]:
    """The table, and the folder of the images."""
    table = Path(config.data)
    return table, Path(config.data_dir) if config.data_dir else table.parent


def _read(table: Path, folder: Path, labelled: bool = True) -> tuple[tuple[str, ...], list[_Row]]:
    """The names of the target columns, and the lines."""
    name = readable(table)
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream)
            header = [cell.strip() for cell in next(reader, [])]
            file_at, split_at, target_at = _find_columns(name, header, labelled)
            rows = list(_rows(name, reader, len(header), folder, file_at, split_at, target_at))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"'{name}' cannot be read as a CSV file: {error}.") from error
    if not rows:
        raise DataError(f"'{name}' has a header and no line: {','.join(header)}.")
    return tuple(header[k] for k in target_at), rows


def _find_columns(name: str, header: Sequence[str], labelled: bool) -> tuple[int, int | None, list[int]]:
    """Where the file, the split and the targets stand."""
    if not any(header):
        raise DataError(f"'{name}' is empty. Its first line has to name the columns, such as: file,target.")
    if len(set(header)) < len(header):
        raise DataError(f"'{name}', line 1: two columns have one name: {','.join(header)}.")
    file_at = next((header.index(column) for column in FILE_COLUMNS if column in header), 0)
    split_at = header.index(SPLIT_COLUMN) if SPLIT_COLUMN in header and header[file_at] != SPLIT_COLUMN else None
    target_at = [k for k in range(len(header)) if k not in (file_at, split_at)]
    if labelled and not target_at:
        raise DataError(f"'{name}', line 1: a column of targets is missing beside {','.join(header)}.")
    return file_at, split_at, target_at


def _rows(
    name: str,
    reader: Iterator[list[str]],
    width: int,
    folder: Path,
    file_at: int,
    split_at: int | None,
    target_at: Sequence[int],
) -> Iterator[_Row]:
    for cells in reader:
        line = reader.line_num  # type: ignore[attr-defined]  # of csv's own reader
        if not cells:
            continue
        if len(cells) != width:
            raise DataError(f"'{name}', line {line}: {len(cells)} cells where the header has {width} columns.")
        cells = [cell.strip() for cell in cells]
        file = folder / cells[file_at]
        if not file.is_file():
            raise DataError(f"'{name}', line {line}: there is no file '{readable(file)}'.")
        split = "" if split_at is None else cells[split_at]
        yield _Row(line, file, tuple(cells[k] for k in target_at), split)


def _numbers(table: Path, columns: Sequence[str], rows: Sequence[_Row], task: str) -> np.ndarray:
    """Targets [k, columns]."""
    targets = np.empty((len(rows), len(columns)), np.float32)
    for k, row in enumerate(rows):
        for column, (name, cell) in enumerate(zip(columns, row.cells, strict=True)):
            where = f"'{readable(table)}', line {row.line}, column '{name}'"
            try:
                value = float(cell)
            except ValueError as error:
                raise DataError(f"{where}: '{cell}' is not a number.") from error
            if not abs(value) <= _LARGEST:  # also true for nan
                raise DataError(f"{where}: '{cell}' is not a finite number of 32 bits.")
            if task == "multilabel" and value not in (0, 1):
                raise DataError(f"{where}: '{cell}' is neither 0 nor 1, as task=\"multilabel\" wants it.")
            targets[k, column] = value
    return targets


def _labels(
    table: Path, columns: Sequence[str], rows: Sequence[_Row], num_classes: int | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Indices of classes [k], and the names of the classes."""
    if len(columns) != 1:
        raise DataError(
            f"'{readable(table)}', line 1: {len(columns)} columns of targets ({','.join(columns)}) where a "
            'classification has one label. Convert with task="multilabel" or task="regression", or leave columns out.'
        )
    labels = [row.cells[0] for row in rows]
    are_indices = all(label.isascii() and label.isdecimal() for label in labels)
    for row, label in zip(rows, labels, strict=True):
        where = f"'{readable(table)}', line {row.line}, column '{columns[0]}'"
        if not label:
            raise DataError(f"{where}: the label is missing.")
        if are_indices and num_classes is not None and int(label) >= num_classes:
            raise DataError(f"{where}: the model has no class {label}, only 0 to {num_classes - 1}.")
    if are_indices:
        indices = np.array([int(label) for label in labels])
        return indices, tuple(map(str, range(indices.max() + 1)))
    classes = sorted(set(labels))
    places = {label: k for k, label in enumerate(classes)}
    return np.array([places[label] for label in labels]), tuple(classes)


def _divide(
    config: DataConfig, table: Path, splits: Sequence[str], everything: Source, training: bool
) -> tuple[Source | None, Source | None]:
    """By the column `split`; what is of another part than those two is not used."""
    if not any(splits):
        if config.train_split or config.val_split:
            raise ConfigError(f"'{readable(table)}' has no column '{SPLIT_COLUMN}' to find the parts by.")
        return everything, None

    def part(asked: str | None, names: Sequence[str]) -> Source:
        wanted = [asked] if asked else [name for name in names if name in splits][:1]
        return everything.take(np.flatnonzero([split in wanted for split in splits]))

    train, val = part(config.train_split, TRAIN_NAMES), part(config.val_split, VAL_NAMES)
    only_val = not training and bool(config.val_split or len(val))
    for name, asked, found in (
        ("training", None if only_val else config.train_split or "train", train),
        ("validation", config.val_split, val),
    ):
        if asked and not len(found):
            seen = ", ".join(sorted(set(splits)))
            raise DataError(f"'{readable(table)}': no line has the split '{asked}' for {name}. There are {seen}.")
    return None if only_val else train, replace(val, called="validation") if len(val) else None

"""Images in, rows of predictions out, as JSON and CSV too."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from masksurgery.ensemble import Ensemble
from masksurgery.images import (
    BY_HAND,
    Broken,
    ImageError,
    label_names,
    open_image,
    preprocessing_of,
    readable,
)
from masksurgery.prediction import Prediction, RegressionPrediction, first_prediction
from masksurgery.types import ConfigError

BATCH_SIZE = 16
FIELDS = ("path", "rank", "index", "label", "mean", "std", "entropy", "mutual_information", "unsure")


@dataclass(frozen=True)
class Entry:
    """One class, label or output of one image. Only a label of "multilabel" has an entropy of its own."""

    index: int
    label: str
    mean: float
    std: float
    entropy: float | None = None
    mutual_information: float | None = None


@dataclass(frozen=True)
class Row:
    """The prediction for one image.

    Attributes:
        entropy: Of the image in nats, where there is one.
        mutual_information: The same.
        unsure: It gets no answer, by the model's threshold; None if that has none.
    """

    path: str
    entries: tuple[Entry, ...]
    entropy: float | None = None
    mutual_information: float | None = None
    unsure: bool | None = None


class Reader:
    """Opens images as the tensors that a model takes.

    Raises:
        ConfigError: The model takes something else than one image.
    """

    def __init__(self, model: Ensemble) -> None:
        preprocessing = preprocessing_of(model)
        self.channels: int = preprocessing.channels
        self.transform = preprocessing.evaluation()

    def __call__(self, path: Path) -> Tensor:
        """An image [c, h, w]; an ImageError if it cannot be read."""
        x, _ = self.transform(open_image(path, self.channels), None)
        return x


def predict_images(
    model: Ensemble, paths: Sequence[Path], topk: int = 5, batch_size: int = BATCH_SIZE
) -> Iterator[Row | Broken]:
    """Predict images in batches, in their order.

    Args:
        model: Converted or packed. Its mode is switched to eval.
        paths: Image files.
        topk: Classes or labels per image, the most probable first. A regression has all its outputs.
        batch_size: Images per forward.
    Raises:
        ConfigError: The model takes or returns something else than a batch of images and one row for each.
    """
    reader, names = Reader(model), label_names(model)
    model.eval()
    model.output = "prediction"
    for start in range(0, len(paths), batch_size):
        results: list[Tensor | Broken] = []
        for path in paths[start : start + batch_size]:
            try:
                results.append(reader(path))
            except ImageError as error:
                results.append(Broken(readable(path), str(error)))
        images = [result for result in results if isinstance(result, Tensor)]
        predicted = iter(_predict_batch(model, torch.stack(images)) if images else ())
        for path, result in zip(paths[start:], results, strict=False):
            yield result if isinstance(result, Broken) else _row(readable(path), *next(predicted), names, topk)


def _predict_batch(model: Ensemble, x: Tensor) -> Iterator[tuple[Prediction | RegressionPrediction, bool | None]]:
    """The prediction of each image, in double precision on the CPU, and whether it is unsure."""
    with torch.inference_mode():
        outputs = model(x)
    p = first_prediction(outputs)
    assert p is not None  # convert refuses a model that has nothing to aggregate
    if isinstance(p, Prediction) and p.mean.dim() != 2:
        raise ConfigError(
            f"predict writes a row for each image; this model returns {list(p.mean.shape)} for {len(x)}. {BY_HAND}"
        )
    unsure = [None] * len(x) if model._threshold is None else model.unsure(p).tolist()
    for refused, *fields in zip(unsure, *(field.double().cpu() for field in p), strict=True):
        yield type(p)(*fields), refused


def _row(
    path: str, p: Prediction | RegressionPrediction, unsure: bool | None, names: Sequence[str] | None, topk: int
) -> Row:
    means, stds = p.mean.flatten().tolist(), p.variance.sqrt().flatten().tolist()
    if isinstance(p, RegressionPrediction):
        numbers = enumerate(zip(means, stds, strict=True))
        return Row(path, tuple(Entry(i, f"output {i}", *pair) for i, pair in numbers), unsure=unsure)
    labels = names if names and len(names) == len(means) else [f"class {i}" for i in range(len(means))]
    best = p.mean.argsort(descending=True, stable=True)[:topk].tolist()
    if p.entropy.dim() == 0:
        entries = tuple(Entry(i, labels[i], means[i], stds[i]) for i in best)
        return Row(path, entries, p.entropy.item(), p.mutual_information.item(), unsure)
    own = list(zip(p.entropy.tolist(), p.mutual_information.tolist(), strict=True))
    return Row(path, tuple(Entry(i, labels[i], means[i], stds[i], *own[i]) for i in best), unsure=unsure)


# --- rows in files ---------------------------------------------------------------------------------------------------


@contextmanager
def _writing(file: Path) -> Iterator[TextIO]:
    try:
        with file.open("w", encoding="utf-8", newline="") as stream:
            yield stream
    except OSError as error:
        raise ConfigError(f"'{readable(file)}' cannot be written: {error.strerror}.") from error


def write_json(rows: Sequence[Row], file: Path) -> None:
    """A list with an object for each image; what is not finite becomes null, what does not apply is left out."""
    text = json.dumps([_finite(asdict(row)) for row in rows], indent=2, ensure_ascii=False)
    with _writing(file) as stream:
        stream.write(text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items() if part is not None}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_csv(rows: Sequence[Row], file: Path) -> None:
    """A line for each class, label or output of each image, the most probable first."""
    with _writing(file) as stream:
        writer = csv.writer(stream)
        writer.writerow(FIELDS)
        for row in rows:
            unsure = "" if row.unsure is None else str(row.unsure).lower()
            for rank, entry in enumerate(row.entries, 1):
                of = entry if row.entropy is None else row
                own = (of.entropy, of.mutual_information)
                writer.writerow((row.path, rank, entry.index, entry.label, entry.mean, entry.std, *own, unsure))

"""The files that `export` writes: names and facts of a model, and how each format is written and run."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from masksurgery.ensemble import Ensemble
from masksurgery.images import label_names, preprocessing_of
from masksurgery.prediction import Prediction, RegressionPrediction, first_prediction
from masksurgery.rebuild import version_of
from masksurgery.sources import one_line
from masksurgery.types import ConfigError, ExportError

Format = Literal["onnx", "pt2"]
FORMATS: tuple[Format, ...] = ("onnx", "pt2")
METADATA = "masksurgery"
"""Under which the facts of a model stand in the file, as JSON: in ONNX's metadata, in the extra files of a .pt2."""
LARGEST = 2**31 - 2**20
"""Bytes of weights that an ONNX file holds, with some room for the graph."""


# --- names and facts -------------------------------------------------------------------------------------------------


def output_names(model: Ensemble, found: Any) -> tuple[str, ...]:
    """The names of the tensors that a model has returned in eval, in the order in which torch flattens them."""
    if isinstance(found, Tensor):
        return (model.head_module.output,)
    return tuple(".".join(parts) for parts in _names_in(found))


def _names_in(value: Any) -> Iterator[tuple[str, ...]]:
    if isinstance(value, (Prediction, RegressionPrediction)):
        yield from ((name,) for name in value._fields)
    elif isinstance(value, Mapping):
        yield from ((str(key), *rest) for key, part in value.items() for rest in _names_in(part))
    elif isinstance(value, (tuple, list)):
        yield from ((str(i), *rest) for i, part in enumerate(value) for rest in _names_in(part))
    else:
        yield ()


def describe_model(model: Ensemble, found: Any) -> dict[str, Any]:
    """What a program has to know of a model that has nothing but the exported file, as JSON.

    Args:
        model: In eval.
        found: What it has returned.
    Returns:
        The version of this package, n, task, the names of the classes, the temperature that is in the graph already,
        the threshold beyond which a prediction is unsure ({"score": ..., "value": ...}), and where the model takes one
        image, its preprocessing in timm's words (input_size, mean, std, interpolation, crop_pct, crop_mode).
    """
    threshold, p, labels = model.threshold, first_prediction(found), label_names(model)
    scores = found if isinstance(found, Tensor) else p.mean if p is not None else torch.zeros(0)
    fits = labels is not None and scores.shape[1:2] == (len(labels),)
    try:
        preprocessing: dict[str, Any] | None = dict(preprocessing_of(model).config)
    except ConfigError:  # it takes something else
        preprocessing = None
    facts = {
        "version": version_of("masksurgery"), "n": model.surgery.n, "task": model.settings.task,
        "labels": labels if fits else None, "temperature": model.head_module.temperature,
        "threshold": threshold and {"score": threshold.score, "value": threshold.value},
        "preprocessing": preprocessing,
    }  # fmt: skip
    return {name: value for name, value in facts.items() if value is not None}


# --- the two formats -------------------------------------------------------------------------------------------------

Run = Callable[[Sequence[Any], Mapping[str, Any]], Sequence[np.ndarray]]
"""The outputs of a forward, flattened, of args and kwargs."""


def _write_onnx(program: torch.export.ExportedProgram, path: Path, outputs: Sequence[str], facts: Any) -> None:
    size = sum(x.numel() * x.element_size() for x in program.state_dict.values())
    if size > LARGEST:
        raise ExportError(
            f"The weights take {size / 2**30:.1f} GiB, and an ONNX file holds 2. Export model.half(), or a .pt2."
        )
    try:
        with quiet():
            found = torch.onnx.export(program, dynamo=True, verbose=False)
    except Exception as error:  # its exporter has errors of its own, and raises those of onnxscript
        raise ExportError(f"torch.onnx cannot write this model: {one_line(error)}. Export it as .pt2.") from error
    assert found is not None
    _name_outputs(found.model.graph, outputs)
    found.model.metadata_props[METADATA] = json.dumps(facts)
    found.save(path, external_data=False)


def _name_outputs(graph: Any, names: Sequence[str]) -> None:
    """Other values of these names get new ones: exporting with `output_names` leaves two of a name."""
    taken = {value.name for node in graph for value in node.outputs} | {value.name for value in graph.inputs}
    for node in graph:
        for value in node.outputs:
            if value.name in names:
                value.name = next(new for k in count() if (new := f"{value.name}_{k}") not in taken)
                taken.add(value.name)
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    def run(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[np.ndarray]:
        leaves = [leaf.cpu().numpy() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        names = [given.name for given in session.get_inputs()]
        return session.run(None, dict(zip(names, leaves, strict=True)))

    return run


def _write_program(program: torch.export.ExportedProgram, path: Path, outputs: Sequence[str], facts: Any) -> None:
    with path.open("wb") as stream:  # torch.export.save looks at the suffix of a path
        torch.export.save(program, stream, extra_files={METADATA: json.dumps({**facts, "outputs": outputs})})


def _read_program(path: Path) -> Run:
    with path.open("rb") as stream:
        program = torch.export.load(stream).module()

    def run(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[np.ndarray]:
        with torch.no_grad():
            return [leaf.cpu().numpy() for leaf in tree_leaves(program(*args, **kwargs)) if isinstance(leaf, Tensor)]

    return run


WRITERS = {"onnx": _write_onnx, "pt2": _write_program}
READERS: Mapping[Format, Callable[[Path], Run]] = {"onnx": _read_onnx, "pt2": _read_program}


@contextmanager
def quiet() -> Iterator[None]:
    """Without what torch's exporters say to their own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

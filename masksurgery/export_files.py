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
from torch.fx import Node
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from masksurgery.ensemble import Ensemble
from masksurgery.images import label_names, preprocessing_of
from masksurgery.prediction import Prediction, count_outputs, first_prediction
from masksurgery.rebuild import version_of
from masksurgery.types import ConfigError, ExportError

Format = Literal["onnx", "pt2"]
FORMATS: tuple[Format, ...] = ("onnx", "pt2")
METADATA = "masksurgery"
"""Under which the facts of a model stand in the file, as JSON: in ONNX's metadata, in the extra files of a .pt2."""
LARGEST = 2**31 - 2**24
"""Bytes of weights that an ONNX file holds, with some room for the graph."""


# --- names and facts -------------------------------------------------------------------------------------------------


def name_outputs(model: Ensemble, found: Any) -> tuple[str, ...]:
    """The names of the tensors that a model has returned in eval, in the order in which torch flattens them."""
    if isinstance(found, Tensor):
        return (str(model.head_module.output),)
    leaves, _ = tree_flatten_with_path(found)
    return tuple(".".join(map(_part, path)) for path, leaf in leaves if isinstance(leaf, Tensor))


def _part(key: Any) -> str:
    """A field's name, a key or an index."""
    return str(next(value for name in ("name", "key", "idx") if (value := getattr(key, name, None)) is not None))


def describe_model(model: Ensemble, prediction: Any, outputs: Sequence[str]) -> dict[str, Any]:
    """What a program has to know of a model that has nothing but the exported file, as JSON.

    Args:
        model: In eval.
        prediction: What it returns where its output is "prediction".
        outputs: The names of what is in the file.
    Returns:
        The version of this package, n, task, class_dim, the names of the classes, the temperature that is in the graph
        already, the threshold beyond which a prediction is unsure ({"score": ..., "value": ...}), if the file has what
        it looks at, and where the model takes one image, its preprocessing in timm's words (input_size, mean, std,
        interpolation, crop_pct, crop_mode).
    """
    settings, threshold = model.settings, model._threshold
    p, labels = first_prediction(prediction), label_names(model)
    fits = isinstance(p, Prediction) and count_outputs(p, settings.task, settings.class_dim) == len(labels or ())
    if not fits:
        labels = None
    if threshold is not None:
        field = "mean" if threshold.score == "max_probability" else threshold.score
        threshold = threshold if field in {name.rpartition(".")[2] for name in outputs} else None
    try:
        preprocessing: dict[str, Any] | None = dict(preprocessing_of(model).config)
    except ConfigError:  # it takes something else
        preprocessing = None
    facts = {
        "version": version_of("masksurgery"), "n": model.surgery.n, "task": settings.task,
        "class_dim": settings.class_dim, "labels": labels, "temperature": model.head_module.temperature,
        "threshold": threshold and {"score": threshold.score, "value": threshold.value},
        "preprocessing": preprocessing,
    }  # fmt: skip
    return {name: value for name, value in facts.items() if value is not None}


# --- the two formats -------------------------------------------------------------------------------------------------

Run = Callable[[Sequence[Any], Mapping[str, Any]], Sequence[np.ndarray]]
"""The outputs of a forward, flattened, of args and kwargs."""


def to_numpy(tree: Any) -> list[np.ndarray]:
    """The tensors of a tree, flattened; bfloat16, which numpy does not have, as float32."""
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return [(x.float() if x.dtype == torch.bfloat16 else x).cpu().numpy() for x in tensors]


def _write_onnx(program: torch.export.ExportedProgram, path: Path, outputs: Sequence[str], facts: Any) -> None:
    tensors = [*program.state_dict.values(), *program.constants.values()]
    size = sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))
    if size > LARGEST:
        raise ExportError(
            f"The weights take {size / 2**30:.1f} GiB, and an ONNX file holds 2. Export model.half(), or as .pt2."
        )
    _lay_out_attention(program)
    with quiet():
        found = torch.onnx.export(program, dynamo=True, verbose=False)
    assert found is not None
    _set_output_names(found.model.graph, outputs)
    found.model.metadata_props[METADATA] = json.dumps(facts)
    path.write_bytes(found.model_proto.SerializeToString())  # its own `save` puts large weights into a second file


def _lay_out_attention(program: torch.export.ExportedProgram) -> None:
    """Give fused attention four dimensions, and lay its results out in rows, in place.

    torch.onnx writes it for four dimensions alone. And it traces a program twice: in between the operator may become
    another, whose result lies in another order, and a view of it that was taken in the first trace is an error in the
    second (torch 2.14, where attention has a bias and the batch is dynamic).
    """
    graph, aten = program.graph_module.graph, torch.ops.aten

    def call(target: Any, x: Node, *args: Any, **kwargs: Any) -> Node:
        found = graph.call_function(target, (x, *args), kwargs)
        found.meta = {**x.meta, "val": target(x.meta["val"], *args, **kwargs)}
        return found

    for node in list(graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        outer = node.meta["val"].shape[:-3]  # several where windows have a dimension of their own; they become one
        users = list(node.users)
        several = len(outer) > 1 and len(node.args) == 3 and all(isinstance(size, int) for size in outer[1:])
        if several:
            with graph.inserting_before(node):
                node.args = tuple(call(aten.flatten.using_ints, x, 0, len(outer) - 1) for x in node.args)
            node.meta["val"] = node.meta["val"].flatten(0, len(outer) - 1)
        with graph.inserting_after(node):
            result = call(aten.clone.default, node, memory_format=torch.contiguous_format)
        if several:
            with graph.inserting_after(result):
                result = call(aten.unflatten.int, result, 0, [-1, *outer[1:]])
        for user in users:
            user.replace_input_with(node, result)
    program.graph_module.recompile()


def _set_output_names(graph: Any, names: Sequence[str]) -> None:
    """Other values of these names get new ones: exporting with `output_names` leaves two of a name."""
    values = [value for node in graph for value in node.outputs]
    taken = {value.name for value in (*values, *graph.inputs, *graph.initializers.values())} | {*names}
    if clash := sorted({value.name for value in graph.inputs} & {*names}):
        raise ExportError(
            f"'{clash[0]}' is the name of an input and of an output. Rename the argument of the base model's forward, "
            f"or export it as .pt2."
        )

    def rename(value: Any) -> None:
        value.name = next(new for k in count() if (new := f"{value.name}_{k}") not in taken)
        taken.add(value.name)

    for value in values:
        if value.name in names:
            rename(value)
    for name in [name for name in graph.initializers if name in names]:
        value = graph.initializers.pop(name)
        rename(value)
        graph.register_initializer(value)
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])

    def run(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[np.ndarray]:
        names = [given.name for given in session.get_inputs()]
        return session.run(None, dict(zip(names, to_numpy((args, kwargs)), strict=True)))

    return run


def _write_program(program: torch.export.ExportedProgram, path: Path, outputs: Sequence[str], facts: Any) -> None:
    with path.open("wb") as stream:  # torch.export.save looks at the suffix of a path
        torch.export.save(program, stream, extra_files={METADATA: json.dumps({**facts, "outputs": outputs})})


def _read_program(path: Path) -> Run:
    with path.open("rb") as stream:
        program = torch.export.load(stream).module()

    def run(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[np.ndarray]:
        with torch.no_grad():
            return to_numpy(program(*args, **kwargs))

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

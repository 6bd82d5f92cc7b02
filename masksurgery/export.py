"""Export: an ensemble as a program of torch.export, or as an ONNX file, which needs neither torch nor this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from masksurgery.copying import share_tensors
from masksurgery.ensemble import Ensemble, zero_inputs
from masksurgery.export_files import FORMATS, READERS, WRITERS, Format, Run, describe_model, output_names, quiet
from masksurgery.inputs import random_values
from masksurgery.sources import one_line
from masksurgery.types import ConfigError, ExportError, check_choice
from masksurgery.weights import replace_file

CHECKED = (1, 2, 5)
"""Batch sizes at which what was exported is compared with the model."""
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        format: "onnx" or "pt2".
        inputs: Their names.
        outputs: Their names: the fields of the Prediction, of several outputs after the output's own name ("out.mean").
        differences: By batch size, the largest difference from the model, of a field's largest number or of 1.
    """

    path: Path
    format: Format
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    differences: Mapping[int, float]


def export(model: Ensemble, file: str | Path, *, format: Format | None = None, static: bool = False) -> Exported:
    """Write a converted or packed model as a file for other runtimes, and compare what is in it with the model.

    The file holds what the model does in eval, on inputs of the size of its example inputs: with `model.output` as it
    is, its temperature, and as metadata what a program needs that has nothing else (`describe_model`). It is compared
    on random inputs at batch sizes 1, 2 and 5 before it gets its name.

    Args:
        model: What `convert`, `pack` or `load` returned, in any mode. It is not changed.
        file: What is there already is replaced, once all is well.
        format: "onnx": by torch's exporter, for ONNX Runtime and others. "pt2": the program of torch.export, which
            `torch.export.load(file).module()` runs where this package has been imported; it takes its inputs in their
            order, and by name only what the base model's forward takes by name alone. None: by the file's suffix.
        static: Batches of one sample, and no others, for runtimes that want all sizes fixed.
    Raises:
        ConfigError: The model is no ensemble, the format is unknown, or its packages are not installed.
        ExportError: The model cannot be exported, or what was exported computes something else. No file is written.
        CheckpointError: The file cannot be written.
    """
    path = Path(file)
    chosen = format_of(path, format)
    twin = _for_export(model)
    program = export_program(model, static=static)
    with torch.no_grad():
        args, kwargs = zero_inputs(twin)
        found = twin(*args, **kwargs)
    outputs, facts = output_names(twin, found), describe_model(twin, found)
    differences: dict[int, float] = {}

    def write(draft: Path) -> None:
        WRITERS[chosen](program, draft, outputs, facts)
        try:
            differences.update(_compare(twin, READERS[chosen](draft), (1,) if static else CHECKED, path))
        except ExportError:
            raise
        except Exception as error:  # each runtime has errors of its own
            raise ExportError(
                f"{path}: what was exported does not run: {one_line(error)}. No file was written."
            ) from error

    replace_file(path, write)
    return Exported(path, chosen, _input_names(program), outputs, differences)


def format_of(file: Path, format: str | None = None) -> Format:
    """The format that a file is to have, once its packages are found installed.

    Raises:
        ConfigError: It is unknown, or a package is missing.
    """
    if format is None and file.suffix.removeprefix(".") not in FORMATS:
        raise ConfigError(
            f"{file}: neither .onnx nor .pt2. Call it so, or pass format={' or '.join(map(repr, FORMATS))}."
        )
    chosen = format or file.suffix.removeprefix(".")
    check_choice("format", chosen, FORMATS)
    if chosen == "onnx":
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ConfigError(f"ONNX needs {error.name}. Install it: pip install masksurgery[export].") from error
    return chosen  # type: ignore[return-value]


def export_program(model: Ensemble, *, static: bool = False) -> torch.export.ExportedProgram:
    """What a converted or packed model does in eval, as a program of torch.export.

    Args:
        model: In any mode. It is not changed.
        static: Batches of one sample, and no others; else the batch of every input is dynamic.
    Raises:
        ConfigError: The model is no ensemble.
        ExportError: The model cannot be exported.
    """
    twin = _for_export(model)
    args, kwargs = zero_inputs(twin, 1 if static else 2)
    batch, unbatched = torch.export.Dim("batch", min=1), set(twin.settings.unbatched)

    def dynamic(name: str, value: Any) -> Any:
        return tree_map(lambda x: {0: batch} if name not in unbatched and _has_batch(x) else None, value)

    names = dict(zip(twin._takes, args, strict=False))
    shapes = {name: dynamic(name, value) for name, value in {**names, **kwargs}.items()}
    try:
        with quiet():
            return torch.export.export(twin, args, kwargs, dynamic_shapes=None if static else shapes, strict=False)
    except Exception as error:  # torch.export raises whatever the operators and the tracer do
        hint = "" if static else " A batch of a fixed size may go: static=True (--static)."
        raise ExportError(
            f"torch.export cannot follow this {type(model).__name__}: {one_line(error)}.{hint}"
        ) from error


def _for_export(model: Ensemble) -> Ensemble:
    """A copy in eval, of the same tensors."""
    if not isinstance(model, Ensemble):
        raise ConfigError(
            f"export takes a converted or packed model, not {type(model).__name__}. Pass what convert or pack returned."
        )
    return share_tensors(model).eval()


def _has_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _input_names(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    return tuple(str(name) for name in program.graph_signature.user_inputs)


# --- the comparison --------------------------------------------------------------------------------------------------


def _compare(model: Ensemble, run: Run, sizes: Sequence[int], path: Path) -> dict[int, float]:
    """The largest difference at each batch size; an ExportError if one is too large."""
    found: dict[int, float] = {}
    for size in sizes:
        args, kwargs = random_values(zero_inputs(model, size), size)
        with torch.no_grad():
            expected = [x.cpu().numpy() for x in tree_leaves(model(*args, **kwargs)) if isinstance(x, Tensor)]
        found[size] = max(difference(a, b) for a, b in zip(run(args, kwargs), expected, strict=True))
        if not found[size] <= TOLERANCE:
            raise ExportError(
                f"{path}: what was exported differs by {found[size]:.1e} from the model at batch size {size}, and "
                f"{TOLERANCE:g} is allowed. No file was written. Try the other format."
            )
    return found


def difference(seen: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, of the largest number that was expected or of 1; NaN for other shapes."""
    if seen.shape != expected.shape:
        return float("nan")
    if not expected.size:
        return 0.0
    same = np.isnan(seen) & np.isnan(expected)
    apart = np.abs(np.where(same, 0, seen.astype(np.float64) - expected.astype(np.float64)))
    return float(apart.max() / max(1.0, float(np.nanmax(np.abs(expected.astype(np.float64))))))

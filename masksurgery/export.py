"""Export: an ensemble as a program of torch.export, or as an ONNX file, which needs neither torch nor this package."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from masksurgery.copying import share_tensors
from masksurgery.ensemble import Ensemble, given_inputs, whole_output, zero_inputs
from masksurgery.export_files import (
    FORMATS,
    READERS,
    WRITERS,
    Format,
    Run,
    describe_model,
    name_outputs,
    quiet,
    to_numpy,
)
from masksurgery.inputs import random_values
from masksurgery.sources import one_line
from masksurgery.types import CheckpointError, ConfigError, ExportError, check_choice
from masksurgery.weights import replace_file

CHECKED = (1, 2, 5)
"""Batch sizes at which what was exported is compared with the model."""
TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
TOLERANCE = 1e-4
"""The largest difference, of the largest number of an output or of 1; half precision rounds by more."""


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


def export(
    model: Ensemble, file: str | Path, *, format: Format | None = None, static: bool = False, inputs: Any = None
) -> Exported:
    """Write a converted or packed model as a file for other runtimes, and compare what is in it with the model.

    The file holds what the model does in eval, on inputs of the size of its example inputs: with `model.output` as it
    is, its temperature, and as metadata what a program needs that has nothing else (`describe_model`). It is compared
    at batch sizes 1, 2 and 5 before it gets its name: on random numbers (whole numbers are 0 or 1), and on yours.

    Args:
        model: What `convert`, `pack` or `load` returned, in any mode and on any device. It is not changed; the file is
            for the CPU, or for what its runtime moves it to.
        file: What is there already is replaced, once all is well.
        format: "onnx": by torch's exporter, for ONNX Runtime and others. "pt2": the program of torch.export, which
            `torch.export.load(file).module()` runs where this package has been imported; it takes its inputs in their
            order, and by name only what the base model's forward takes by name alone. torch reads parts of such a file
            as pickles: load only those that you wrote yourself. None: by the file's suffix.
        static: Batches of one sample, and no others, for runtimes that want all sizes fixed.
        inputs: Args (a tuple), kwargs (a dict) or a tensor of one forward, to compare on too.
    Returns:
        The file, its format, the names of its inputs and outputs, and by how much it differs at each batch size.
    Raises:
        ConfigError: The model is no ensemble, the format is unknown, or its packages are not installed.
        TraceError: The inputs are not what the model takes.
        ExportError: The model cannot be exported, or what was exported computes something else. No file is written.
        CheckpointError: The file cannot be written.
    """
    path = Path(file)
    chosen = format_of(path, format)
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path}: cannot be written, for there is no folder {path.absolute().parent}. Make it.")
    twin = _for_export(model, on_cpu=True)
    sizes = (1,) if static else CHECKED
    calls = [(size, random_values(zero_inputs(twin, size), size, integers=True)) for size in sizes]
    if inputs is not None:
        args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
        args = args if isinstance(args, (tuple, list)) else (args,)
        calls += [(size, tree_map(_to_cpu, given_inputs(twin, args, kwargs, size))) for size in sizes]
    program = export_program(twin, static=static)
    with torch.no_grad():
        args, kwargs = zero_inputs(twin)
        outputs = name_outputs(twin, twin(*args, **kwargs))
        with whole_output(twin):
            prediction = twin(*args, **kwargs)
    differences: dict[int, float] = {}

    def write(draft: Path) -> None:
        with _explained(path, f"cannot be written as {chosen}"):
            WRITERS[chosen](program, draft, outputs, describe_model(twin, prediction, outputs))
        with _explained(path, "does not run"):
            run = READERS[chosen](draft)
        for size, (args, kwargs) in calls:
            differences[size] = max(_compare(twin, run, args, kwargs, path), differences.get(size, 0.0))

    replace_file(path, write)
    return Exported(path, chosen, _input_names(program), outputs, differences)


def format_of(file: Path, format: str | None = None) -> Format:
    """The format that a file is to have, once its packages are found installed.

    Raises:
        ConfigError: It is unknown, the file is called otherwise, or a package is missing.
    """
    suffix = file.suffix.removeprefix(".")
    if format is None and suffix not in FORMATS:
        raise ConfigError(f'{file}: neither .onnx nor .pt2. Call it so, or pass format="onnx" or "pt2".')
    chosen = format or suffix
    check_choice("format", chosen, FORMATS)
    if suffix in FORMATS and suffix != chosen:
        raise ConfigError(f"{file}: called .{suffix}, but format={chosen!r}. Call it .{chosen}, or pass no format.")
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
        model: In any mode. It is not changed; the program is for the device that it is on.
        static: Batches of one sample, and no others; else the batch of every input is dynamic.
    Returns:
        The program, which takes the inputs of the base model and returns the fields of the Prediction.
    Raises:
        ConfigError: The model is no ensemble.
        ExportError: The model cannot be exported.
    """
    twin = _for_export(model)
    try:
        return _program(twin, static)
    except Exception as error:  # torch.export raises whatever the operators and the tracer do
        hint = " A batch of a fixed size goes: static=True (--static)." if not static and _goes_static(twin) else ""
        raise ExportError(
            f"torch.export cannot follow this {type(model).__name__}: {one_line(error)}.{hint}"
        ) from error


def _program(model: Ensemble, static: bool) -> torch.export.ExportedProgram:
    args, kwargs = zero_inputs(model, 1 if static else 2)
    batch, unbatched = torch.export.Dim("batch", min=1), set(model.settings.unbatched)

    def dynamic(name: str, value: Any) -> Any:
        return tree_map(lambda x: {0: batch} if name not in unbatched and _has_batch(x) else None, value)

    names = dict(zip(model._takes, args, strict=False))
    shapes = {name: dynamic(name, value) for name, value in {**names, **kwargs}.items()}
    with quiet():
        return torch.export.export(model, args, kwargs, dynamic_shapes=None if static else shapes, strict=False)


def _goes_static(model: Ensemble) -> bool:
    try:
        _program(model, True)
    except Exception:  # it is asked for a hint alone
        return False
    return True


def _for_export(model: Ensemble, on_cpu: bool = False) -> Ensemble:
    """A copy in eval, of the same tensors, or of such on the CPU."""
    if not isinstance(model, Ensemble):
        raise ConfigError(
            f"export takes a converted or packed model, not {type(model).__name__}. Pass what convert or pack returned."
        )
    elsewhere = any(x.device.type != "cpu" for x in (*model.parameters(), *model.buffers()))
    return (copy.deepcopy(model).cpu() if on_cpu and elsewhere else share_tensors(model)).eval()


def _to_cpu(leaf: Any) -> Any:
    return leaf.cpu() if isinstance(leaf, Tensor) else leaf


def _has_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _input_names(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    return tuple(str(name) for name in program.graph_signature.user_inputs)


# --- the comparison --------------------------------------------------------------------------------------------------


def _compare(model: Ensemble, run: Run, args: Sequence[Any], kwargs: Mapping[str, Any], path: Path) -> float:
    """The largest difference between the file and the model; an ExportError if it is too large."""
    with torch.no_grad():
        outputs = model(*args, **kwargs)
    expected = to_numpy(outputs)
    if not all(np.isfinite(x).any() for x in expected if x.size):
        raise ExportError(
            f"{path}: the model itself returns no finite number for random inputs, so nothing can be compared. Train "
            f"it, or recalibrate it, first. No file was written."
        )
    with _explained(path, "does not run"):
        seen = run(args, kwargs)
    far = largest(difference(a, b) for a, b in zip(seen, expected, strict=True))
    dtype = next((x.dtype for x in model.parameters() if x.is_floating_point()), torch.float32)
    allowed = TOLERANCES.get(dtype, TOLERANCE)
    if not far <= allowed:
        size = len(expected[0])
        raise ExportError(
            f"{path}: what was exported differs by {far:.1e} from the model at batch size {size}, and {allowed:g} is "
            f"allowed. No file was written. Try the other format."
        )
    return far


@contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    """Exporters and runtimes have errors of their own, which become an ExportError; what a disk refuses stays."""
    try:
        yield
    except (ExportError, OSError):
        raise
    except Exception as error:
        told = re.sub(r"\x1b\[\d*m", "", one_line(error))  # torch.onnx writes in colours
        raise ExportError(
            f"{path}: what was exported {what}: {told}. No file was written. Try the other format."
        ) from error


def largest(differences: Iterable[float]) -> float:
    """The largest of them; NaN, which max would lose, if one is."""
    return float(np.max([0.0, *differences]))


def difference(seen: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, of the largest number that was expected or of 1; NaN for other shapes."""
    if seen.shape != expected.shape:
        return float("nan")
    ours, theirs = seen.astype(np.float64), expected.astype(np.float64)
    same = (np.isnan(ours) & np.isnan(theirs)) | (ours == theirs)  # infinities are equal too
    finite = np.abs(theirs[np.isfinite(theirs)])
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(ours - theirs))
    return float(np.max(apart, initial=0.0) / max(1.0, np.max(finite, initial=0.0)))

"""config.json of a saved model: its fields, and their types, checked one by one when it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from masksurgery.axes import Axis, Dims
from masksurgery.example import Example
from masksurgery.inputs import bind, describe, describe_inputs, make_inputs, placeholder_values
from masksurgery.scores import Threshold
from masksurgery.types import (
    CheckpointError,
    ConvertConfig,
    MasksurgeryError,
    Site,
    Skipped,
    Task,
    Tie,
    TrainMode,
    Where,
)

FORMAT_VERSION = 1

AGAIN = "Save the model again, or take another copy of the folder"

_NAMES: dict[Any, str] = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}

Output = Literal["prediction", "mean", "variance", "logits", "entropy", "mutual_information", "members"]


@dataclass(frozen=True)
class BaseRecipe:
    """A `Recipe` as it is written."""

    source: Literal["timm", "torchvision", "factory"]
    name: str
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """Example inputs as `describe_inputs` writes them: a tensor is {"shape": [...], "dtype": "float32"}."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Axes = tuple[tuple[tuple[int, ...], ...], ...]


def _axes(dims: Dims) -> Axes:
    return tuple(tuple((axis.size, int(axis.batch)) for axis in dim) for dim in dims)


@dataclass(frozen=True)
class PartInputs:
    """What a module takes that has a graph of its own, inside of one that cannot be traced.

    Attributes:
        first: One forward of the first of two batch sizes.
        second: Inputs of the second batch size, by name.
        axes: For each input its tensors, for each tensor its dimensions, for each dimension its axes, outermost first:
            the length, and 1 if the axis counts the samples.
    """

    name: str
    first: Inputs
    second: dict[str, Any]
    axes: dict[str, tuple[Axes, ...]]

    @classmethod
    def of(cls, name: str, example: Example) -> PartInputs:
        axes = {placeholder: tuple(map(_axes, tensors)) for placeholder, tensors in example.dims.items()}
        inputs = describe_inputs(example.bound)
        second = describe(dict(example.values[1]))
        return cls(name, Inputs(tuple(inputs["args"]), inputs["kwargs"]), second, axes)

    def example(self, module: nn.Module) -> Example:
        """What it takes, for the module itself.

        Raises:
            TraceError: This is not how it is called.
        """
        args, kwargs = make_inputs({"args": list(self.first.args), "kwargs": self.first.kwargs})
        bound = bind(module, args, kwargs)
        values = placeholder_values(bound, integers=True), make_inputs({"args": [], "kwargs": self.second})[1]
        dims = {
            name: [tuple(tuple(Axis(size, bool(batch)) for size, batch in dim) for dim in axes) for axes in tensors]
            for name, tensors in self.axes.items()
        }
        return Example(bound, values, dims, integers=True)


@dataclass(frozen=True)
class Packing:
    """What packs a model again: the arguments of `pack`; and the digest of what it made, which it has to make again."""

    layout: Literal["unrolled", "grouped"]
    dense: bool
    digest: str


@dataclass(frozen=True)
class Record:
    """What config.json holds. Fields with a default may be missing from it.

    Attributes:
        versions: Of masksurgery, torch and timm when it was saved.
        id: Stands in the header of model.safetensors too, if that is of the same save.
        base: How to make the base model; None if the caller of `load` has to supply it.
        base_type: Class of the base model, to be read by people.
        base_note: What the caller of `load` has to do, for people too.
        dtype: Of the floating-point parameters.
        parts: Modules with a graph of their own.
        aliases: Name of a tied parameter to the name that its values are saved under.
        after: Layer types as "module.QualName"; None for every convolution and Linear.
        output: What eval returns.
        temperature: What was fitted; None if nothing was.
        threshold: The same.
        packed: Of a packed model; None of a converted one, and then not written.
    """

    format_version: int
    versions: dict[str, str]
    id: str
    base: BaseRecipe | None
    base_type: str
    base_note: str | None
    n: int
    scale: float
    seed: int
    task: Task
    class_dim: int
    train_mode: TrainMode
    rescale: bool
    heteroscedastic: bool
    unbatched: tuple[str, ...]
    after: tuple[str, ...] | None
    where: Where
    output: Output
    dtype: str | None
    inputs: Inputs
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    aliases: dict[str, str]
    parts: tuple[PartInputs, ...] = ()
    pretrained_cfg: dict[str, Any] | None = None
    temperature: float | None = None
    threshold: Threshold | None = None
    packed: Packing | None = None
    tie: Tie | None = None
    multiple_of: int = 1
    heads: bool = False

    def config(self, after: Sequence[type] | None = None) -> ConvertConfig:
        """The settings of `convert`, without the selectors, which the recorded sites stand for."""
        shared = {f.name: getattr(self, f.name) for f in fields(ConvertConfig) if hasattr(self, f.name)}
        return ConvertConfig(**{**shared, "after": None if after is None else tuple(after)})

    def to_json(self) -> str:
        content = asdict(self)
        if self.packed is None:  # a key that readers from before there was packing refuse
            del content["packed"]
        return json.dumps(content, indent=2, allow_nan=False) + "\n"


def read_object(path: Path) -> dict[str, Any]:
    """Read a config.json, whoever wrote it; a CheckpointError if it is missing or holds no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file, so this is no folder of masksurgery.save.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}). {AGAIN}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds {_shown(content)}, not a JSON object. {AGAIN}.")
    return content


def read_record(path: Path) -> Record:
    """Read and check a config.json.

    Raises:
        CheckpointError: It is missing, no JSON, of another format version, or a field has a wrong type.
    """
    content = read_object(path)
    check_version(content, path)
    record: Record = parse(Record, content, "", path)
    given = [*record.inputs.args, *record.inputs.kwargs.values()]
    given += [
        x for part in record.parts for x in (*part.first.args, *part.first.kwargs.values(), *part.second.values())
    ]
    for i, part in enumerate(given):
        _check_input(part, f"inputs[{i}]", path)
    if record.dtype is not None:
        _check_dtype(record.dtype, "dtype", path)
    if record.temperature is not None and record.temperature <= 0:
        raise _wrong(record.temperature, "a number above 0", "temperature", path)
    try:
        record.config()
    except MasksurgeryError as error:
        raise CheckpointError(f"{path}: {error} {AGAIN}.") from error
    try:
        if record.threshold is not None:
            record.threshold.check_task(record.task)
    except MasksurgeryError as error:
        raise CheckpointError(f"{path}: 'threshold': {error} {AGAIN}.") from error
    return record


def check_version(content: Mapping[str, Any], path: Path) -> None:
    version = content.get("format_version")
    if version is None:
        raise CheckpointError(f"{path}: 'format_version' is missing, so masksurgery.save did not write it.")
    if type(version) is not int or version != FORMAT_VERSION:
        versions = content.get("versions")
        writer = f" (written by masksurgery {versions.get('masksurgery')})" if isinstance(versions, dict) else ""
        raise CheckpointError(
            f"{path}: 'format_version' is {_shown(version)}{writer}; this masksurgery reads {FORMAT_VERSION}. "
            f"Install the version that wrote it."
        )


def parse(kind: Any, value: Any, where: str, path: Path) -> Any:
    """A value of JSON as the type says: lists as tuples, objects as dataclasses.

    Args:
        kind: A class of this module or of `types`, or an annotation in one.
        where: The key, such as `sites[0].channels`.
    Raises:
        CheckpointError: It is of another type; names file and key.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):  # always "or None" here
        (other,) = (argument for argument in arguments if argument is not type(None))
        return None if value is None else parse(other, value, where, path)
    if origin is Literal:
        if isinstance(value, str) and value in arguments:
            return value
        raise _wrong(value, f"one of {', '.join(map(repr, arguments))}", where, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(value, "a list", where, path)
        return tuple(parse(arguments[0], part, f"{where}[{i}]", path) for i, part in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(value, "an object", where, path)
        return {key: parse(arguments[1], part, f"{where}.{key}", path) for key, part in value.items()}
    if is_dataclass(kind):
        return _parse_dataclass(kind, value, where, path)
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return value
    if kind is not float and type(value) is kind:
        return value
    raise _wrong(value, _NAMES[kind], where, path)


def _parse_dataclass(kind: Any, value: Any, where: str, path: Path) -> Any:
    if not isinstance(value, dict):
        raise _wrong(value, "an object", where, path)
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}
    dot = f"{where}." if where else ""
    for name, f in known.items():
        if name not in value and f.default is MISSING and f.default_factory is MISSING:
            raise CheckpointError(f"{path}: '{dot}{name}' is missing. {AGAIN}.")
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise CheckpointError(f"{path}: '{dot}{unknown[0]}' is not a key that this masksurgery knows. {AGAIN}.")
    return kind(**{name: parse(hints[name], part, f"{dot}{name}", path) for name, part in value.items()})


def _wrong(value: Any, wanted: str, where: str, path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: '{where}' is {_shown(value)}, not {wanted}. {AGAIN}.")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_input(value: Any, where: str, path: Path) -> None:
    if isinstance(value, dict) and set(value) == {"shape", "dtype"}:
        _check_dtype(value["dtype"], f"{where}.dtype", path)
        for size in parse(tuple[int, ...], value["shape"], f"{where}.shape", path):
            if size < 0:
                raise _wrong(value["shape"], "a list of sizes", f"{where}.shape", path)
    elif isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _check_input(part, f"{where}.{key}", path)


def _check_dtype(value: Any, where: str, path: Path) -> None:
    if not isinstance(value, str) or not isinstance(getattr(torch, value, None), torch.dtype):
        raise _wrong(value, "the name of a dtype, such as float32", where, path)

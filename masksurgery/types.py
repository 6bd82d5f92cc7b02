"""The words of the package: layouts, sites, the record of a surgery, its settings and its errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypeAlias

import numpy as np

Task = Literal["classification", "multilabel", "regression", "probabilities"]
TrainMode = Literal["split", "repeat"]
Where = Literal["all", "head"]
Tie = Literal["stream"]
Selector: TypeAlias = "str | Callable[[str, Any], bool]"

TASKS: tuple[Task, ...] = ("classification", "multilabel", "regression", "probabilities")
TRAIN_MODES: tuple[TrainMode, ...] = ("split", "repeat")
WHERE: tuple[Where, ...] = ("all", "head")


class MasksurgeryError(ValueError):
    """Whatever a user can put right. Says what, where, what was seen and what to do."""


class MaskError(MasksurgeryError):
    """Masks cannot be generated, or do not fit the tensor they are to mask."""


class SiteError(MasksurgeryError):
    """The selection of layers names nothing, or something that cannot be masked."""


class TraceError(MasksurgeryError):
    """torch.fx cannot follow the model, or its inputs are not what the model takes."""


class LayoutError(MasksurgeryError):
    """The batch dimension of a tensor is lost, mixed or not known."""


class ConfigError(MasksurgeryError):
    """An argument has a value that it cannot have."""


class CheckpointError(MasksurgeryError):
    """A saved folder or file is missing, damaged or of another model."""


class DataError(MasksurgeryError):
    """Images or their targets are missing, broken, or not what they are taken for."""


class VerificationError(MasksurgeryError):
    """The converted model is not the base model with its masks multiplied in."""


class TrainingError(MasksurgeryError):
    """A training run cannot go on, or not from here."""


class ExportError(MasksurgeryError):
    """A model cannot be exported, or computes something else once it is."""


class EvaluationError(MasksurgeryError):
    """What a model predicts cannot be evaluated, or nothing can be fitted to it."""


@dataclass(frozen=True)
class Layout:
    """Where the batch and the channels of a tensor are.

    The batch dimension holds outer * b * fold rows: `fold` rows of one sample stand together (windows of an image),
    and the whole batch is repeated `outer` times.
    """

    batch_dim: int | None
    channel_dim: int | None = None
    outer: int = 1
    fold: int = 1


@dataclass(frozen=True)
class Site:
    """One masked activation.

    Attributes:
        layer: Qualified name of the convolution or Linear (for `where="head"`: of the output layer that reads it).
        call: Which call of that layer, from 0.
        node: Name of the graph node whose output is masked.
        mask: Name of the mask module in the converted model.
        channels: Length c of a mask.
        ones: Kept channels m of every mask.
        batch_dim: Dimension of the samples.
        channel_dim: Dimension of the channels.
        fold: Rows of one sample in the batch dimension.
        outer: How many times the whole batch stands in the batch dimension.
        chain: Further candidate layers that the same mask serves (depthwise convolutions).
        readers: Nodes that read the masked tensor; empty for all of them.
        stream: Name of the first mask of the residual stream that shares its masks; empty if they are the site's own.
        heads: Attention heads that the channels consist of, one after another, each of them masked as a whole; 0 if
            single channels are masked. The layer is the one that makes the values.
        part: Name of the module whose own graph holds the node, inside of one that cannot be traced; else empty.
    """

    layer: str
    call: int
    node: str
    mask: str
    channels: int
    ones: int
    batch_dim: int
    channel_dim: int
    fold: int = 1
    chain: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    part: str = ""
    outer: int = 1
    stream: str = ""
    heads: int = 0


@dataclass(frozen=True)
class Skipped:
    """A candidate layer without a mask, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class Surgery:
    """What a conversion did, as data.

    Attributes:
        n: Number of members.
        scale: What the masks were drawn with.
        seed: The same.
        sites: What is masked.
        skipped: The candidate layers that are not.
        notes: What there is to know beside.
        masks: As they were decided, boolean [n, c] by the name of the mask module: what `verify` compares the model
            with.
        output_layers: Qualified names of the convolutions and Linear layers that make the model's output.
    """

    n: int
    scale: float
    seed: int
    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    masks: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    output_layers: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings; without the masks."""
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "masks"}
        record["sites"] = [asdict(site) for site in self.sites]
        record["skipped"] = [asdict(skip) for skip in self.skipped]
        return record

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent)


@dataclass(frozen=True)
class ConvertConfig:
    """The settings of `convert`, checked. See `masksurgery.convert` for their meaning."""

    n: int = 4
    scale: float = 2.0
    after: tuple[type, ...] | None = None
    where: Where = "all"
    include: tuple[Selector, ...] | None = None
    exclude: tuple[Selector, ...] = ()
    task: Task = "classification"
    class_dim: int = 1
    train_mode: TrainMode = "split"
    rescale: bool = True
    seed: int = 0
    heteroscedastic: bool = False
    unbatched: tuple[str, ...] = ()
    tie: Tie | None = None
    multiple_of: int = 1
    heads: bool = False

    def __post_init__(self) -> None:
        check_masks_arguments(self.n, self.scale)
        check_multiple(self.multiple_of)
        check_choice("where", self.where, WHERE)
        check_choice("task", self.task, TASKS)
        check_choice("train_mode", self.train_mode, TRAIN_MODES)
        if self.tie not in (None, "stream"):
            raise ConfigError(f'tie={self.tie!r} is not "stream", for masks that a residual stream shares, nor None.')
        if self.heads and self.where == "head":
            raise ConfigError('heads=True masks attention inside of the network, and where="head" only its end.')
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, np.integer)) or self.seed < 0:
            raise ConfigError(f"seed={self.seed!r} is not a non-negative integer.")
        if self.heteroscedastic and self.task != "regression":
            raise ConfigError(f'heteroscedastic=True needs task="regression", not task={self.task!r}.')


def check_masks_arguments(n: Any, scale: Any) -> None:
    """Raise a MaskError unless n is a positive integer and scale a finite number of at least 1."""
    if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
        raise MaskError(f"n={n!r} is not a number of members. Pass an integer of at least 1, such as n=4.")
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.integer, np.floating)):
        raise MaskError(f"scale={scale!r} is not a number. Pass a number of at least 1, such as scale=2.0.")
    if not 1 <= scale < float("inf"):  # false for nan
        raise MaskError(
            f"scale={scale!r} is not a finite number of at least 1, where all masks are equal. Try scale=2.0."
        )


def check_multiple(multiple_of: Any) -> None:
    """Raise a MaskError unless it is a positive integer."""
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, (int, np.integer)) or multiple_of < 1:
        raise MaskError(
            f"multiple_of={multiple_of!r} is not a positive integer. Pass what kept channels are to be a multiple of, "
            f"such as multiple_of=8, or 1 for any number of them."
        )


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ConfigError(f"{name}={value!r} is not one of {listed}.")

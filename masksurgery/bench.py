"""Measures models side by side: latency in turn in one process, peak memory, multiply-adds and parameters."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from masksurgery.macs import count_macs
from masksurgery.memory import cpu_peaks, cuda_peak, weight_bytes
from masksurgery.rebuild import version_of
from masksurgery.types import ConfigError
from masksurgery.variants import Conditions, Variant
from masksurgery.weights import replace_file

Observer = Callable[[str, int, int | None], None]

WARM_UP = 2
"""Forwards that are not measured: the first ones choose kernels and allocate what stays."""
FEWEST = 4
"""Forwards whose quartiles say anything."""


@dataclass(frozen=True)
class Measurement:
    """One model at one batch size.

    Attributes:
        variant: Its name.
        batch: Samples in a forward.
        seconds: Of each forward; the k-th of all variants were measured one after another.
        peak: Bytes of a forward at its peak, above what stood before; None where that cannot be measured.
        weights: Bytes of the parameters and buffers.
        macs: Multiply-adds of one sample.
        parameters: Their number.
    """

    variant: str
    batch: int
    seconds: tuple[float, ...]
    peak: int | None
    weights: int
    macs: int
    parameters: int

    @property
    def latency(self) -> float:
        """Median seconds of a forward."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range of the seconds."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return high - low

    @property
    def per_second(self) -> float:
        """Samples in a second, at the median."""
        return self.batch / self.latency

    @property
    def memory(self) -> int | None:
        """Bytes that the model needs: its weights, and a forward at its peak."""
        return None if self.peak is None else self.peak + self.weights


@dataclass(frozen=True)
class Bench:
    """Models measured side by side.

    Attributes:
        measurements: By batch size, and in it in the order of the variants.
        conditions: That they ran under.
        details: Of variants that have any, by name.
        machine, versions: That they ran on.
    """

    measurements: tuple[Measurement, ...]
    conditions: Conditions
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def find(self, variant: str, batch: int) -> Measurement | None:
        """What was measured of a variant at a batch size."""
        return next((m for m in self.measurements if (m.variant, m.batch) == (variant, batch)), None)

    def ratio(self, measured: Measurement, to: str = "base") -> float | None:
        """Of the latency to that of another variant at this batch size; None if that was not measured."""
        other = self.find(to, measured.batch)
        return None if other is None else paired_ratio(measured.seconds, other.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, numbers and strings."""
        return {
            "conditions": asdict(self.conditions),
            "details": {name: dict(details) for name, details in self.details.items()},
            "measurements": [self._row(m) for m in self.measurements],
            "machine": dict(self.machine),
            "versions": dict(self.versions),
        }

    def _row(self, m: Measurement) -> dict[str, Any]:
        mib = {"peak_memory_mib": m.memory, "forward_memory_mib": m.peak, "weights_mib": m.weights}
        return {
            "variant": m.variant, "batch": m.batch, "latency_ms": m.latency * 1e3, "iqr_ms": m.spread * 1e3,
            "images_per_second": m.per_second, "ratio_to_base": self.ratio(m),
            **{name: None if size is None else size / 2**20 for name, size in mib.items()},
            "macs": m.macs, "parameters": m.parameters, "seconds": list(m.seconds),
        }  # fmt: skip

    def write_json(self, file: Path, **more: Any) -> None:
        """Write `to_dict`, and more beside it; a CheckpointError if that fails."""
        text = json.dumps({**more, **self.to_dict()}, indent=2) + "\n"
        replace_file(file, lambda draft: draft.write_text(text, encoding="utf-8"))


def measure(
    variants: Sequence[Variant],
    batches: Sequence[int],
    conditions: Conditions,
    *,
    repeats: int = 10,
    observer: Observer | None = None,
) -> Bench:
    """Measure models side by side.

    Args:
        variants: What to measure. Their models are moved to the device of the conditions.
        batches: Samples in a forward.
        conditions: For all of them; torch's threads are put back afterwards.
        repeats: Forwards to measure of each model at each batch size.
        observer: Is told what is done, how much of it, and of how much.
    Raises:
        ConfigError: Nothing is to be measured, something twice, or too few of it.
        TraceError: A model cannot be run to count its MACs.
    """
    _check(variants, batches, repeats)
    tell = observer or (lambda what, done, total: None)
    machine, found = describe_machine(conditions), []
    static = {variant.name: _count(variant, tell) for variant in variants}
    peaks = {variant.name: _peaks(variant, batches, conditions, tell) for variant in variants}
    with conditions.hold(), torch.inference_mode():
        for variant in variants:
            conditions.prepare(variant.model)
        for k, batch in enumerate(batches):
            calls = [_call(variant, batch, conditions) for variant in variants]
            seconds = take_turns(calls, repeats, lambda done, b=batch: tell(f"batches of {b}", done, repeats))  # type: ignore[misc]
            found += [
                Measurement(v.name, batch, times, peaks[v.name][k], *static[v.name])
                for v, times in zip(variants, seconds, strict=True)
            ]
    details = {variant.name: variant.details for variant in variants if variant.details}
    versions = {name: version_of(name) for name in ("masksurgery", "torch", "timm")}
    return Bench(tuple(found), conditions, details, machine, {"python": platform.python_version(), **versions})


def take_turns(
    calls: Sequence[Callable[[], Any]], repeats: int, tell: Callable[[int], None] = lambda done: None
) -> list[tuple[float, ...]]:
    """Seconds of each repetition of each call. They take turns, and another one begins each round."""
    seconds: list[list[float]] = [[] for _ in calls]
    for call in calls:
        for _ in range(WARM_UP):
            call()
    for k in range(repeats):
        for i in range(len(calls)):
            which = (i + k) % len(calls)
            calls[which]()  # not timed: takes the memory and the caches that the one before it has left
            start = time.perf_counter()
            calls[which]()
            seconds[which].append(time.perf_counter() - start)
        tell(k + 1)
    return [tuple(times) for times in seconds]


def paired_ratio(seconds: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios round by round: what slows a round down slows both of its forwards."""
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def describe_machine(conditions: Conditions) -> dict[str, Any]:
    """What the figures hold for."""
    found: dict[str, Any] = {"platform": platform.platform(), "cpu": _cpu_name(), "cpus": os.cpu_count()}
    if hasattr(os, "getloadavg"):
        found["load_before"] = round(os.getloadavg()[0], 2)
    if torch.device(conditions.device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(conditions.device)
    return found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _check(variants: Sequence[Variant], batches: Sequence[int], repeats: int) -> None:
    names = [variant.name for variant in variants]
    for what, values in (("variants", names), ("batches", list(batches))):
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{what}={values} is empty or has something twice. Pass each of them once.")
    for what, value, least in (("batch", min(batches), 1), ("repeats", repeats, FEWEST)):
        if value < least:
            raise ConfigError(f"{what}={value} is too small. Pass at least {least}.")


def _count(variant: Variant, tell: Observer) -> tuple[int, int, int]:
    """Bytes of the weights, MACs of one sample, and the number of parameters."""
    tell(f"counting the MACs of {variant.name}", 0, None)
    args, kwargs = Conditions(1).draw(variant.inputs(1))
    macs = count_macs(variant.model, args, kwargs)
    return weight_bytes(variant.model), macs, count_parameters(variant.model)


def count_parameters(model: nn.Module) -> int:
    """Their numbers; what is shared counts once."""
    return sum(x.numel() for x in model.parameters())


def _peaks(variant: Variant, batches: Sequence[int], conditions: Conditions, tell: Observer) -> Sequence[int | None]:
    """Peak memory of a forward at each batch size."""
    tell(f"measuring the memory of {variant.name}", 0, None)
    kind = torch.device(conditions.device).type
    if kind == "cpu" and variant.again is not None:
        return cpu_peaks(variant.again, [variant.inputs(batch) for batch in batches], conditions)
    if kind == "cuda":
        conditions.prepare(variant.model)
        with torch.inference_mode():
            runs = [_call(variant, batch, conditions) for batch in batches]
            for run in runs:
                run()  # what libraries make once and keep is theirs, not the forward's
            return [cuda_peak(run, conditions.device) for run in runs]
    return [None] * len(batches)


def _call(variant: Variant, batch: int, conditions: Conditions) -> Callable[[], Any]:
    """One forward, to its end."""
    args, kwargs = conditions.draw(variant.inputs(batch))
    on_cuda = torch.device(conditions.device).type == "cuda"

    def run() -> None:
        variant.model(*args, **kwargs)
        if on_cuda:
            torch.cuda.synchronize(conditions.device)

    return run

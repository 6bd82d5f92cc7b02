"""Which of several packed forms of a model is fastest, found by running them."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from masksurgery.ensemble import zero_inputs
from masksurgery.pack.packed import PackedModel
from masksurgery.types import ConfigError

ROUNDS = 5
BATCH = 8
"""Samples of a forward that "grouped" has to be faster at too: side by side members save calls, which shows where each
of them computes little."""


def fastest(models: Sequence[PackedModel]) -> PackedModel:
    """The one with the shortest median time of a forward on the example inputs, where the models are.

    Members side by side are chosen only if they are faster on a batch as well.

    Args:
        models: Of one converted model. Without data (on the meta device) the first is taken.
    """
    device = _device(models[0])
    if len(models) == 1 or device.type == "meta":
        return models[0]
    ranked = _rank(models, zero_inputs(models[0]), device)
    first, rival = ranked[0], next((model for model in ranked if model.layout == "unrolled"), ranked[0])
    return first if first is rival else _rank([rival, first], zero_inputs(first, BATCH), device)[0]


def _rank(models: Sequence[PackedModel], inputs: tuple[Any, Any], device: torch.device) -> list[PackedModel]:
    """The models, the fastest one first."""
    args, kwargs = inputs
    seconds: list[list[float]] = [[] for _ in models]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators that torch.vmap can only loop over
        for round_ in range(ROUNDS + 1):  # the first round warms up
            for model, times in zip(models, seconds, strict=True):
                start = time.perf_counter()
                model(*args, **kwargs)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if round_:
                    times.append(time.perf_counter() - start)
    medians = [statistics.median(times) for times in seconds]
    return [models[i] for i in sorted(range(len(models)), key=medians.__getitem__)]


def check_runs(model: PackedModel) -> None:
    """Raise a ConfigError if members side by side cannot be run, for torch.vmap has no rule for an operator in them."""
    device = _device(model)
    if device.type == "meta":
        return
    args, kwargs = zero_inputs(model)
    try:
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operators that torch.vmap can only loop over
            model(*args, **kwargs)
    except RuntimeError as error:
        raise ConfigError(
            f'layout="grouped" is not possible for this model: {str(error).strip().splitlines()[0]} '
            f'Pass layout="unrolled".'
        ) from error


def _device(model: PackedModel) -> torch.device:
    return next((x.device for x in (*model.parameters(), *model.buffers())), torch.device("cpu"))

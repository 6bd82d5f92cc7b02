"""Re-estimate BatchNorm statistics: masks change what the layers before them see."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from masksurgery.model import ConvertedModel, refuse_packed
from masksurgery.types import ConfigError


def recalibrate(model: ConvertedModel, loader: Iterable[Any], *, max_batches: int | None = None) -> int:
    """Replace the running mean and variance of every BatchNorm by those over a data set, under all masks.

    What the model computes changes: a temperature or a threshold that was fitted before has to be fitted again.

    Args:
        model: Changed in place; its training flags are as before afterwards.
        loader: Batches: a tensor, a tuple or list whose first entry is the input, or a dict of keyword inputs. Targets
            are not read. Tensors are moved to the model's device.
        max_batches: Stop after so many.
    Returns:
        How many BatchNorm layers were re-estimated; 0 if the model has none that tracks statistics.
    Raises:
        ConfigError: The loader is empty, or the model is packed.
    Example:
        >>> base = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        >>> model = masksurgery.convert(base, example_inputs=(torch.ones(1, 8),))
        >>> masksurgery.recalibrate(model, [torch.randn(32, 8) for _ in range(4)])
        1
    """
    refuse_packed(model, "recalibrate")
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    flags = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    saved = {norm: {name: x.clone() for name, x in norm._buffers.items() if x is not None} for norm in norms}
    seen = 0
    try:
        model.eval()  # the root sends every sample through all members, and dropout is off
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain average over the batches
            norm.train()
        with torch.no_grad():
            for seen, batch in enumerate(loader, 1):
                args, kwargs = _inputs(batch, device)
                model(*args, **kwargs)
                if seen == max_batches:
                    break
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        if not seen:
            for norm, buffers in saved.items():
                for name, x in buffers.items():
                    getattr(norm, name).copy_(x)
        model.train(flags[model])
        for module, flag in flags.items():
            module.training = flag
    if not seen:
        raise ConfigError("The loader has no batch: nothing was re-estimated, and the statistics are as before.")
    return len(norms)


def _inputs(batch: Any, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def move(x: Any) -> Any:
        return x.to(device, non_blocking=True) if isinstance(x, Tensor) else x

    if isinstance(batch, Mapping):
        return (), {name: move(x) for name, x in batch.items()}
    if isinstance(batch, (tuple, list)):
        batch = batch[0]
    return (move(batch),), {}

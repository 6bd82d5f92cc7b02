"""The scores of a model over a validation set, which all processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from masksurgery.ensemble import whole_output
from masksurgery.losses import Objective

if TYPE_CHECKING:
    from accelerate import Accelerator


class Stopped(Exception):
    """The validation was left before its end."""


def validate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    objective: Objective,
    accelerator: Accelerator,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """The mean of each score over the batches of all processes.

    Args:
        model: Not wrapped, so that processes may have different numbers of batches. It is left in eval mode.
        batches: Of this process.
        objective: Its scores are taken.
        accelerator: Of the processes.
        stop: Is asked before each batch.
    Raises:
        Stopped: `stop` has said so.
    """
    names = objective.scores
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    _share_buffers(model, accelerator)
    model.eval()
    with torch.no_grad(), whole_output(model):
        for x, y in batches:
            if stop():
                raise Stopped
            with accelerator.autocast():
                outputs = model(x.to(accelerator.device, non_blocking=True))
            found = objective.score(outputs, y.to(accelerator.device, non_blocking=True))
            sums += torch.stack([torch.stack(found[name]).cpu().double() for name in names])
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device), "sum")
    return {name: value / max(count, 1) for name, (value, count) in zip(names, sums.tolist(), strict=True)}


def _share_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Each process has statistics of its own since its last forward; those of the main process are what is saved."""
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        for buffer in model.buffers():
            if buffer.is_floating_point():
                broadcast(buffer)

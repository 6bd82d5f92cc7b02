"""What every model of another library has to stand: the proof in both modes, its keys, and an account of its layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import masksurgery
from masksurgery.kinds import is_layer
from masksurgery.model import ConvertedModel
from nets import randomise


def in_double(value: Any) -> Any:
    """A tree with its floating-point tensors in float64."""
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


def prove(
    base: nn.Module, *args: Any, options: dict[str, Any] | None = None, double: bool = True, **kwargs: Any
) -> tuple[ConvertedModel, nn.Module]:
    """Randomise a model, convert it, and prove every member in eval and in training.

    Args:
        base: The model. It is changed.
        *args: What one forward takes, positional or as **kwargs.
        options: For `convert`.
        double: In float64.
    Returns:
        The converted model and the base model, in eval.
    """
    randomise(base, 1)
    base = (base.double() if double else base).eval()
    args, kwargs = in_double((args, kwargs)) if double else (args, kwargs)
    model = masksurgery.convert(base, example_inputs=kwargs or args, **(options or {}))
    for mode in ("eval", "train"):
        assert masksurgery.verify(model, base, *args, mode=mode, **kwargs).relative <= (1e-12 if double else 1e-4)
    keys = list(base.state_dict())
    assert list(model.state_dict())[: len(keys)] == keys
    surgery = model.surgery
    named = {site.layer for site in surgery.sites} | {layer for site in surgery.sites for layer in site.chain}
    layers = {name for name, module in base.named_modules() if is_layer(module)}
    assert named | {skip.layer for skip in surgery.skipped} == layers
    return model, base


def skipped_as(model: ConvertedModel, word: str) -> set[str]:
    """The layers that are skipped for a reason that begins with a word."""
    return {skip.layer for skip in model.surgery.skipped if skip.reason.startswith(word)}


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

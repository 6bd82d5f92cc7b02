"""Models for images of another size than their weights were made for."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from masksurgery.convert import default_inputs
from masksurgery.sources import one_line
from masksurgery.types import ConfigError


def takes_size(model: Any) -> bool:
    """It is one of timm's models that are built for one size, which their argument `img_size` is."""
    kinds = type(model).__mro__  # some hand their arguments on to the class that has it
    named = any("img_size" in inspect.signature(kind.__init__).parameters for kind in kinds)  # type: ignore[misc]
    return bool(named or model.pretrained_cfg.get("fixed_input_size"))


def at_size(model: Any, name: str, inputs: Any, size: int) -> tuple[Tensor]:
    """Example inputs of a size in pixels; a pretrained_cfg of the model names it from then on.

    Args:
        model: In eval mode.
        name: For the message.
        inputs: One image or video of the model's own size, None where its pretrained_cfg has it.
        size: Height and width.
    Raises:
        ConfigError: The model cannot run on it.
    """
    (x,) = default_inputs(model) if inputs is None else inputs
    x = x.new_zeros(*x.shape[:-2], size, size)
    refused = f"img_size={size} (--img-size): '{name}' does not take images of {size} x {size} pixels"
    for edge in _edges_of_patches(model):
        if size % edge:
            near = sorted({max(size // edge, 1) * edge, (size // edge + 1) * edge})
            raise ConfigError(f"{refused}: its patches have {edge} x {edge}. Pass {' or '.join(map(str, near))}.")
    try:
        with torch.no_grad():
            model(x)
    except Exception as error:  # whatever a model raises at a size that it was not made for
        raise ConfigError(f"{refused}: {one_line(error)}. Pass another size.") from error
    if getattr(model, "pretrained_cfg", None):
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": tuple(x.shape[1:])}
    return (x,)


def _edges_of_patches(model: nn.Module) -> tuple[int, ...]:
    """Height and width of the patches that an image is cut into: a narrower margin would be left out without a word."""
    patches = getattr(model, "patch_embed", None)
    size = getattr(patches, "patch_size", None)
    if getattr(patches, "dynamic_img_pad", False):
        return ()
    return tuple(edge for edge in (size if isinstance(size, (tuple, list)) else (size,)) if isinstance(edge, int))

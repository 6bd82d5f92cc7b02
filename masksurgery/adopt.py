"""Mask layers of other packages, replaced by ours with the same masks and the same outputs."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from masksurgery.layers import Masksembles1D, Masksembles2D, _Masksembles
from masksurgery.types import MaskError

logger = logging.getLogger(__name__)

UNSAVED = (
    "masksembles 1.1.1 leaves its masks out of the state_dict. Weights from a checkpoint were trained with masks that "
    "cannot be had from the file: fine-tune them, or build the model after the same numpy.random.seed, adopt it, "
    "and save it again, now with its masks."
)


@dataclass(frozen=True)
class Kind:
    """Which of our layers does what another package's class does."""

    layer: type[Masksembles1D] | type[Masksembles2D]
    spatial: tuple[int, ...] = ()
    channel_dim: int | None = None


# Recognised by the name of the class, so that none of these packages has to be imported or installed.
KINDS = {
    "Masksembles1D": Kind(Masksembles1D),  # masksembles
    "Masksembles2D": Kind(Masksembles2D, (3, 2)),  # masksembles, probly
    "Mask1d": Kind(Masksembles1D),  # torch-uncertainty, in its MaskedLinear
    "Mask2d": Kind(Masksembles2D, (3, 2)),  # torch-uncertainty, in its MaskedConv2d and MaskedConvTranspose2d
    "MasksemblesLinear": Kind(Masksembles1D),  # probly
    "MasksemblesLinearLayer": Kind(Masksembles1D),  # probly, before it was renamed
    "Masksembles2DLayer": Kind(Masksembles2D, (3, 2)),
    "MasksemblesLayer": Kind(Masksembles1D, channel_dim=1),  # lightning-uq-box: vectors and images
}


def adopt(model: nn.Module) -> nn.Module:
    """Replace, in place, the mask layers of other packages by Masksembles1D and Masksembles2D with the same masks.

    Known are the layers of masksembles (1.1.1, and older ones that keep their masks as float64 parameters),
    torch-uncertainty, probly and lightning-uq-box. Each is compared with what replaces it, on random rows and in eval
    mode: the outputs are equal bit by bit in float32. What is new: the masks are boolean buffers in the state_dict, a
    batch need not be a multiple of n, and half precision and channels_last stay what they are. The rest of the model,
    and how it is used (inputs repeated n times, member after member), stays as it is.

    Checkpoints of the older masksembles and of torch-uncertainty load into the adopted model as they are. Those of
    masksembles 1.1.1 hold no masks: a warning says so, here and when one is loaded.

    probly's layers draw a member for each sample of a training batch; ours deal the samples out in order, as those of
    all other packages do.

    Args:
        model: Changed in place: its modules, none of its weights. Built by whatever package it was built with.
    Returns:
        The model; or, if it is itself a mask layer, what replaces it.
    Raises:
        MaskError: There is no such layer, or one cannot be replaced. The model is as it was then.
    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Mask1d(nn.Module):  # stands for another package's layer
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.masks = nn.Parameter(torch.eye(2, dtype=torch.float64), requires_grad=False)
        ...     def forward(self, x):
        ...         return (x.unflatten(0, (2, -1)) * self.masks.unsqueeze(1)).flatten(0, 1).to(x.dtype)
        >>> masksurgery.adopt(nn.Sequential(nn.Linear(3, 2), Mask1d()))
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
          (1): Masksembles1D(2, n=2, scale=1000000.0, ones=1)
        )
    """
    found = {layer: name for name, layer in model.named_modules() if _is_foreign(layer)}
    if not found:
        raise MaskError(_nothing_found(model))
    adopted = {layer: _replacement(name or type(layer).__name__, layer) for layer, name in found.items()}
    unsaved = sum("masks" in layer._non_persistent_buffers_set for layer in found)
    if unsaved:
        logger.warning("%s: no checkpoint of it holds its masks (%d). %s", type(model).__name__, unsaved, UNSAVED)
    if model in adopted:
        return adopted[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out second names
            if child in adopted:
                setattr(parent, name, adopted[child])
    model.register_load_state_dict_post_hook(_tell_of_missing_masks)
    return model


def _is_foreign(layer: nn.Module) -> bool:
    return type(layer).__name__ in KINDS and not isinstance(layer, _Masksembles)


def _nothing_found(model: nn.Module) -> str:
    if any(isinstance(layer, _Masksembles) for layer in model.modules()):
        return f"adopt: the mask layers in {type(model).__name__} are masksurgery's already."
    return (
        f"adopt: {type(model).__name__} has no mask layer of another package (one of {', '.join(KINDS)}). "
        "A model without any gets them from masksurgery.convert."
    )


def _replacement(name: str, layer: nn.Module) -> Masksembles1D | Masksembles2D:
    """Our layer with the masks of `layer`, once both are seen to compute the same."""
    kind = KINDS[type(layer).__name__]
    masks = getattr(layer, "masks", None)
    if not isinstance(masks, Tensor) or masks.dim() != 2:
        _fail(name, layer, "has no tensor `masks` [n, channels]")
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        _fail(name, layer, "has hooks, which would be lost. Remove them first")
    rows = masks.detach().cpu()
    if not ((rows == 0) | (rows == 1)).all():
        _fail(name, layer, "has masks of other numbers than 0 and 1")
    n, channels = rows.shape
    scale = getattr(layer, "scale", None) or implied_scale(float(rows[0].sum()) / channels, n)
    try:
        ours = kind.layer(channels, n, scale, channel_dim=kind.channel_dim, masks=rows.bool().numpy())
    except MaskError as error:
        _fail(name, layer, f"cannot be replaced: {error}")
    ours.to(masks.device).eval()
    x = torch.randn(2 * n, channels, *kind.spatial, generator=torch.Generator().manual_seed(0)).to(masks.device)
    with torch.no_grad():
        try:
            theirs: Any = copy.deepcopy(layer).eval()(
                x
            )  # a copy: a forward may count, and must not before all is checked
        except Exception as error:  # whatever another package's code raises
            raise MaskError(f"adopt: {_what(name, layer)} fails on {tuple(x.shape)}: {error}") from error
        if not (isinstance(theirs, Tensor) and theirs.shape == x.shape and torch.equal(theirs.to(x.dtype), ours(x))):
            _fail(name, layer, "computes something else than its masks, one after another, over equal parts of a batch")
    return ours.train(layer.training)


def implied_scale(share: float, n: int) -> float:
    """The scale whose masks keep this share of the channels, where a layer does not say its own.

    Args:
        share: Kept share r of the channels, between 1/n and 1.
        n: Number of masks.
    Returns:
        What solves r = 1 / (scale (1 - (1 - 1/scale)^n)), to four digits after the point; at most 10^6, for masks that
        do not overlap.
    """
    low, high = 1.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 / (middle * (1 - (1 - 1 / middle) ** n)) > share else (low, middle)
    return round(low, 4)


def _tell_of_missing_masks(model: nn.Module, keys: Any) -> None:
    """After a load_state_dict: whether the checkpoint lacked the masks of this model."""
    masks = [
        f"{name}.masks" if name else "masks" for name, layer in model.named_modules() if isinstance(layer, _Masksembles)
    ]
    missing = [key for key in keys.missing_keys if any(key == name or key.endswith(f".{name}") for name in masks)]
    if missing:
        logger.warning("The checkpoint has no %s (%d of %d). %s", missing[0], len(missing), len(masks), UNSAVED)


def _what(name: str, layer: nn.Module) -> str:
    return f"{name} ({type(layer).__module__}.{type(layer).__name__})"


def _fail(name: str, layer: nn.Module, seen: str) -> NoReturn:
    raise MaskError(f"adopt: {_what(name, layer)} {seen}.")

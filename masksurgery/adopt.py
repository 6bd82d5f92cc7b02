"""Mask layers of other packages, replaced by ours with the same masks and the same outputs."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from masksurgery.layers import Masksembles1D, Masksembles2D, _Masksembles
from masksurgery.masks import growth
from masksurgery.types import MaskError

logger = logging.getLogger(__name__)

UNSAVED = (
    "masksembles 1.1.1 leaves its masks out of the state_dict, and torch-uncertainty on a GPU. Weights from such "
    "a checkpoint were trained with masks that cannot be had from the file: fine-tune them, or (masksembles) build the "
    "model after the same numpy.random.seed, adopt it, and save it again, now with its masks."
)
HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks",
    "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """Which of our layers does what another package's class does."""

    layer: type[Masksembles1D] | type[Masksembles2D]
    spatial: tuple[int, ...] = ()
    channel_dim: int | None = None


# Recognised by the name of the class and a tensor `masks`: none of these packages has to be imported or installed.
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

    Known are the layers of masksembles (1.1.1, and older ones that keep their masks as float64 parameters), of
    torch-uncertainty, of probly's repository and of lightning-uq-box, and subclasses of them. Each is compared with
    what replaces it, on random rows and in eval mode: the outputs are equal bit by bit in float32. What is new: the
    masks are boolean buffers in the state_dict, a batch need not be a multiple of n, and half precision and
    channels_last stay what they are. The rest of the model, and how it is used (inputs repeated n times, member after
    member), stays as it is; a layer of masksembles 1.1.1 makes n rows of a single one, and so does what replaces it.

    Checkpoints with masks load into the adopted model as they are; the state of an optimiser that counted them as
    parameters does not. Those of masksembles 1.1.1 hold none: a warning says so, here and when one is loaded.

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
    parents = list(model.modules())
    if any(parent._modules.get("_orig_mod") in adopted for parent in parents):
        raise MaskError("adopt: a mask layer is compiled by itself, as it is. Adopt the model first, then compile it.")
    unsaved = sum("masks" not in layer.state_dict() for layer in found)
    if unsaved:
        logger.warning("%s: no checkpoint of it holds its masks (%d). %s", type(model).__name__, unsaved, UNSAVED)
    for parent in parents:
        for name, child in parent._modules.items():  # named_children() leaves out second names
            if child in adopted:
                parent._modules[name] = adopted[child]
    return adopted.get(model, model)


def _kind(layer: nn.Module) -> Kind | None:
    if isinstance(layer, _Masksembles):
        return None
    return next((KINDS[base.__name__] for base in type(layer).__mro__ if base.__name__ in KINDS), None)


def _is_foreign(layer: nn.Module) -> bool:
    masks = getattr(layer, "masks", None)
    return _kind(layer) is not None and isinstance(masks, Tensor) and masks.dim() == 2


def _nothing_found(model: nn.Module) -> str:
    if any(isinstance(layer, _Masksembles) for layer in model.modules()):
        return f"adopt: the mask layers in {type(model).__name__} are masksurgery's already."
    return (
        f"adopt: {type(model).__name__} has no mask layer of another package, of a class {', '.join(KINDS)} with a "
        "tensor `masks` [n, channels]. A model without any gets them from masksurgery.convert."
    )


def _replacement(name: str, layer: nn.Module) -> _Masksembles:
    """Our layer with the masks of `layer`, once both are seen to compute the same."""
    kind, masks = _kind(layer), layer.masks
    assert kind is not None and isinstance(masks, Tensor)
    if any(getattr(layer, hooks, None) for hooks in HOOKS):
        _fail(name, layer, "has hooks, which would be lost. Remove them first")
    if hasattr(layer, "parametrizations"):
        _fail(name, layer, "is parametrised. Remove its parametrisations first")
    if masks.is_meta:
        _fail(name, layer, "is on the meta device, where masks have no values. Adopt the model once it has its weights")
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
    _compare(name, layer, ours, kind.spatial)
    ours.register_load_state_dict_pre_hook(_read_masks)
    return ours.train(layer.training)


def _compare(name: str, layer: nn.Module, ours: _Masksembles, spatial: tuple[int, ...]) -> None:
    """See that both give the same, for all members and for a single row, of which masksembles 1.1.1 makes n rows."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(2 * ours.n, ours.channels, *spatial, generator=draws, device="cpu").to(ours.masks.device)
    with torch.no_grad():
        try:
            theirs = copy.deepcopy(layer).eval()  # a forward may count, and must not before all is checked
            seen: Any = theirs(x)
        except Exception as error:  # whatever another package's code raises
            raise MaskError(f"adopt: {_what(name, layer)} fails on {tuple(x.shape)}: {error}") from error
        if not (isinstance(seen, Tensor) and seen.shape == x.shape and torch.equal(seen.to(x.dtype), ours(x))):
            _fail(name, layer, "computes something else than its masks, one after another, over equal parts of a batch")
        try:
            single = theirs(x[:1])
        except Exception:  # most take no such batch, and ours may do with it what it does
            return
        ours.expands_single = ours.n > 1 and len(single) == ours.n
        if not torch.equal(single.to(x.dtype), ours(x[:1])):
            _fail(name, layer, "computes something else than its masks for a single row")


def implied_scale(share: float, n: int) -> float:
    """The scale whose masks keep this share of the channels, where a layer does not say its own.

    Args:
        share: Kept share r of the channels, between 1/n and 1.
        n: Number of masks.
    Returns:
        What solves r = 1 / (scale (1 - (1 - 1/scale)^n)), to four digits after the point; at most 10^6, for masks that
        do not overlap.
    """
    if share >= 1:
        return 1.0
    low, high = 1.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 / growth(middle, n) > share else (low, middle)
    return round(low, 4)


def _read_masks(
    layer: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, _strict: bool, missing: list[str], *_: Any
) -> None:
    """Before a load_state_dict: masks of other dtypes become boolean; once for all layers, whether they are missing."""
    key = f"{prefix}masks"
    if key in state:
        state[key] = state[key].bool()
    elif not any(name.endswith("masks") for name in missing):
        logger.warning("The checkpoint has no %s. %s", key, UNSAVED)


def _what(name: str, layer: nn.Module) -> str:
    return f"{name} ({type(layer).__module__}.{type(layer).__name__})"


def _fail(name: str, layer: nn.Module, seen: str) -> NoReturn:
    raise MaskError(f"adopt: {_what(name, layer)} {seen}.")

"""Checkpoints of another number of classes, channels or pixels, made to fit a model as timm does with its own weights.

Each function takes a state dict and a model, and gives the state dict back as it is where it is of no use.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping

from torch import Tensor, nn

from masksurgery.weights import other_rows, other_shapes

logger = logging.getLogger(__name__)

State = Mapping[str, Tensor]


def renew_classifier(state: State, model: nn.Module, num_classes: int) -> State:
    """Leave the output layer as it was initialised, if nothing but its number of classes differs; says so in the log.

    It is what the model's pretrained_cfg calls the classifier, else the only layer that differs.
    """
    own = model.state_dict()
    rows = other_rows(other_shapes(state, own))
    named = _named(model, "classifier") or tuple(rows)[:1]
    wanted_by_all = all(wanted == num_classes for _, wanted in rows.values())
    if set(state) != set(own) or not set(rows) <= set(named) or not wanted_by_all:
        return state
    for layer, (found, wanted) in rows.items():
        logger.warning("%s: new, %d classes (the checkpoint has %d)", layer, wanted, found)
    return {key: own[key] if key.rpartition(".")[0] in rows else value for key, value in state.items()}


def adapt_channels(state: State, model: nn.Module, in_chans: int) -> State:
    """Sum the weights of the first convolution for grey images, or repeat them for more than three channels."""
    from timm.models import adapt_input_conv

    first, adapted = _named(model, "first_conv"), dict(state)
    for key, (found, wanted) in other_shapes(state, model.state_dict()).items():
        if key.removesuffix(".weight") in first and (found[0], found[2:]) == (wanted[0], wanted[2:]):
            try:
                adapted[key] = adapt_input_conv(in_chans, state[key])
            except (AssertionError, NotImplementedError):  # it has another number than three
                return state
    return adapted


def resample(state: State, model: nn.Module) -> State:
    """Resample position embeddings, and whatever else depends on the size of the image, as the model's timm does."""
    own = model.state_dict()
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None or set(state) != set(own) or not other_shapes(state, own):
        return state
    try:
        return dict(convert(dict(state), model))
    except Exception:  # timm's functions for foreign checkpoints raise anything; the shapes are then the error
        return state


def _named(model: nn.Module, entry: str) -> tuple[str, ...]:
    """The layers that an entry of timm's pretrained_cfg names: one, several or none."""
    cfg = getattr(model, "pretrained_cfg", None)
    names = cfg.get(entry) if isinstance(cfg, Mapping) else None
    return (names,) if isinstance(names, str) else tuple(names or ())

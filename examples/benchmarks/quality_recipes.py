"""Other ways to fine-tune a converted model, which may lose less of what the base model knows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from masksurgery.masks import generate_masks, kept_channels
from masksurgery.model import ConvertedModel
from masksurgery.prediction import Prediction, RegressionPrediction

Losses = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """What differs from plain fine-tuning.

    Attributes:
        shrink: Share of the epochs in which the masks shrink, from full ones to what they are; 0 for masks as they are
            from the first step on.
        core: Share of a mask's channels that is the same for all members: those that matter most to the base model.
        teacher: Share of the loss that is the distance from the base model's answer, and not from the label.
        last: Epochs at the end in which every sample goes through all members.
    """

    shrink: float = 0.0
    core: float = 0.0
    teacher: float = 0.0
    last: int = 0

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[Recipe, dict[str, Any]]:
        """A recipe, and the options that are none of its own."""
        names = [f.name for f in fields(cls)]
        mine = {name: options[name] for name in names if name in options}
        return cls(**mine), {name: value for name, value in options.items() if name not in mine}


# --- masks that shrink -----------------------------------------------------------------------------------------------


class Shrinking:
    """Masks that lose channels from epoch to epoch: those of an epoch are a part of those of the one before it.

    Args:
        model: Whose masks are changed; after `epochs` they are what they were.
        epochs: Over which they shrink.
        rng: For the order in which channels go.
    """

    def __init__(self, model: ConvertedModel, epochs: int, rng: np.random.Generator) -> None:
        self.model, self.epochs = model, epochs
        self.ranks: dict[str, Tensor] = {}
        for site in model.surgery.sites:
            masks = layer_of(model, site.mask).masks.cpu().numpy()
            order = np.argsort(rng.random(masks.shape) - masks, axis=1)  # the final mask's channels first
            self.ranks[site.mask] = torch.from_numpy(np.argsort(order, axis=1))

    def begin(self, epoch: int) -> None:
        """The masks of an epoch, counted from 0."""
        share = min(1.0, (epoch + 1) / (self.epochs + 1))
        for site in self.model.surgery.sites:
            layer = layer_of(self.model, site.mask)
            layer.kept = round(site.channels - share * (site.channels - site.ones))
            layer.masks.copy_(self.ranks[site.mask] < layer.kept)


def layer_of(model: nn.Module, name: str) -> Any:
    """A mask's module."""
    return model.get_submodule(name)


# --- members with statistics of their own ----------------------------------------------------------------------------


def alone(model: ConvertedModel, member: int, whole: ConvertedModel) -> ConvertedModel:
    """One member as a network of its own, whose BatchNorm statistics can be its own.

    Args:
        model: That it is a member of.
        member: Its number.
        whole: The same base model converted to one member; it is changed, and returned.
    """
    state = {name: x for name, x in model.state_dict().items() if not name.endswith(".masks")}
    whole.load_state_dict(state, strict=False)
    for site in model.surgery.sites:
        layer, other = layer_of(whole, site.mask), layer_of(model, site.mask)
        layer.masks.copy_(other.masks[member : member + 1])
        layer.kept = other.kept
    return whole


# --- masks that keep what matters ------------------------------------------------------------------------------------


def importance(model: ConvertedModel, batches: Iterable[tuple[Tensor, Tensor]], loss: Losses) -> dict[str, Tensor]:
    """How much the loss would change without each channel, to first order: |activation times gradient|, summed.

    Args:
        model: Of one member, whose masks are full, in eval; so it computes what its base model does.
        batches: Inputs and targets.
        loss: Of outputs and targets.
    Returns:
        By the name of the mask, float [c].
    Source:
        Molchanov et al. 2017, arXiv:1611.06440, section 2.2.
    """
    found = {site.mask: torch.zeros(site.channels) for site in model.surgery.sites}
    for x, y in batches:
        with _kept_inputs(model) as inputs:
            value = loss(single(model(x)), y)
        gradients = torch.autograd.grad(value, [*inputs.values()])
        for (name, activation), gradient in zip(inputs.items(), gradients, strict=True):
            dim = layer_of(model, name).channel_dim % activation.dim()
            change = (activation * gradient).detach().movedim(dim, 0)  # of a sample: summed over its positions
            found[name] += (change.flatten(2).sum(2) if change.dim() > 2 else change).abs().sum(1).cpu()
    return found


def single(p: Prediction | RegressionPrediction) -> Any:
    """What the base model returned, up to a constant of logits, of a prediction of one member."""
    return p.logits if isinstance(p, Prediction) else (p.mean, p.variance.log())


@contextmanager
def _kept_inputs(model: ConvertedModel) -> Iterator[dict[str, Tensor]]:
    """What the masks of a model read."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer_of(model, site.mask).register_forward_pre_hook(
            lambda _, args, name=site.mask: inputs.__setitem__(name, args[0])
        )
        for site in model.surgery.sites
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def put_core(model: ConvertedModel, scores: Mapping[str, Tensor], share: float, seed: int) -> None:
    """Give a converted model masks with a core, of as many channels as they had."""
    for k, site in enumerate(model.surgery.sites):
        masks = masks_with_core(scores[site.mask].numpy(), site.ones, model.surgery.n, share, [seed, k])
        layer_of(model, site.mask).masks.copy_(torch.from_numpy(masks))


def masks_with_core(scores: np.ndarray, ones: int, n: int, share: float, seed: Any) -> np.ndarray:
    """Masks that have the most important channels in common, and are drawn by the usual law from the others.

    Args:
        scores: Importance [c].
        ones: Of each mask.
        n: Number of masks.
        share: Of the ones that all masks have in common. It is lowered until the others can cover what is left.
        seed: For the others.
    Returns:
        Boolean [n, c], with `ones` ones in each row.
    """
    channels = len(scores)
    core = min(round(share * ones), (n * ones - channels) // (n - 1)) if n > 1 else ones
    order = np.argsort(-scores, kind="stable")
    masks = np.zeros((n, channels), bool)
    masks[:, order[:core]] = True
    rest, left = order[core:], ones - core
    if left:
        masks[:, rest] = _of_ones(len(rest), n, left, seed)
    return masks


def _of_ones(channels: int, n: int, ones: int, seed: Any) -> np.ndarray:
    """Masks with so many ones, by the scale that has them."""
    low, high = 1.0, 1e6
    for _ in range(200):  # the ones fall with the scale
        middle = (low * high) ** 0.5
        found = kept_channels(channels, n, middle)
        if found == ones:
            return generate_masks(channels, n, middle, seed=seed)
        low, high = (middle, high) if found > ones else (low, middle)
    raise ValueError(f"no scale gives {ones} of {channels} channels to {n} masks")

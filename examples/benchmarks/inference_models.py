"""The models that `inference.py` measures side by side, with the same weights and the same masks."""

from __future__ import annotations

import copy
import importlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

import masksurgery
from masksurgery.bench_folder import describe_packed
from masksurgery.input_repeat import repeat_inputs
from masksurgery.model import ConvertedModel
from masksurgery.prediction import Head, Prediction
from masksurgery.variants import Conditions, Variant, fill_weights

N, SCALE = 4, 2.0
HIDDEN = 1 - 1 / (SCALE * (1 - (1 - 1 / SCALE) ** N))
"""Share of the channels that a mask hides."""
TITLES = {
    "base": "base model",
    "folded": "base model, BatchNorm folded",
    "repeat": "inputs repeated",
    "reference": "inputs repeated, layers of masksembles",
    "late": "converted: repeated late",
    "packed": "packed",
    "tied": 'packed, `tie="stream"`',
    "heads": "packed, `heads=True`",
    "dropout": "MC dropout, 4 passes",
    "ensemble": "deep ensemble of 4",
}
PACKED: dict[str, dict[str, Any]] = {"packed": {}, "tied": {"tie": "stream"}, "heads": {"heads": True}}
"""The packed variants, and what they are converted with."""
AGREE = (("base", "folded"), ("repeat", "reference"), ("repeat", "late"), ("repeat", "packed"))
"""Variants that compute the same."""

logging.getLogger("masksurgery").setLevel(logging.ERROR)  # no conversion here is to be fine-tuned


def open_variants(architecture: str, names: Sequence[str], conditions: Conditions) -> Iterator[Variant]:
    """The variants that an architecture has, packed ones with what is fastest under these conditions."""
    base = make("base", architecture)
    images = partial(_images, base.pretrained_cfg["input_size"])
    for name in names:
        if not _applies(name, base):
            continue
        if name in PACKED:
            with conditions.hold():
                model, details = _pack(conditions.prepare(_convert(base, **PACKED[name])))
            again = partial(make, name, architecture, details["layout"], details["dense"])
        else:
            model, details, again = make(name, architecture), {}, partial(make, name, architecture)
        yield Variant(name, model, images, again, details)


def make(name: str, architecture: str, layout: Any = "auto", dense: bool | None = None) -> Any:
    """One variant of an architecture, in eval mode."""
    base = fill_weights(timm.create_model(architecture).eval())
    made: dict[str, Callable[[], nn.Module]] = {
        "base": lambda: base,
        "folded": lambda: fold(base, torch.zeros(1, *base.pretrained_cfg["input_size"])),
        "repeat": lambda: repeat_inputs(_convert(base)),
        "reference": lambda: with_reference_layers(_convert(base)),
        "late": lambda: _convert(base),
        "dropout": lambda: Passes([with_dropout(_convert(base, n=1))] * N),
        "ensemble": lambda: Passes([fill_weights(copy.deepcopy(base), seed) for seed in range(N)]),
    }
    if name in PACKED:
        return masksurgery.pack(_convert(base, **PACKED[name]), layout, dense=dense)
    return made[name]().eval()


def _convert(base: nn.Module, n: int = N, **options: Any) -> ConvertedModel:
    return masksurgery.convert(base, n=n, scale=SCALE, **options)


def _pack(model: ConvertedModel) -> tuple[nn.Module, dict[str, Any]]:
    chosen = masksurgery.pack(model)
    start = time.perf_counter()
    packed = masksurgery.pack(model, chosen.layout, dense=chosen.dense)
    return packed, {**describe_packed(packed), "packing_seconds": time.perf_counter() - start}


def _applies(name: str, base: nn.Module) -> bool:
    """Whether there is anything to fold, or a head to mask."""
    has = {"folded": lambda m: isinstance(m, _BatchNorm), "heads": lambda m: hasattr(m, "num_heads")}
    return name not in has or any(map(has[name], base.modules()))


def _images(size: Sequence[int], samples: int) -> dict[str, Any]:
    return {"args": [{"shape": [samples, *size], "dtype": "float32"}], "kwargs": {}}


# --- BatchNorm folded ------------------------------------------------------------------------------------------------


def fold(base: nn.Module, x: Tensor) -> nn.Module:
    """A copy with every BatchNorm in the weights of the convolution that it follows.

    Which one that is shows in a forward: torch's own `fuse` looks for nn.BatchNorm2d alone, and timm has others, with
    an activation in them.
    """
    model = copy.deepcopy(base)
    outputs: list[tuple[nn.Conv2d, Tensor]] = []
    pairs: list[tuple[nn.Conv2d, _BatchNorm]] = []

    def keep(conv: Any, _: Any, y: Tensor) -> None:
        outputs.append((conv, y))

    def find(norm: Any, args: Any) -> None:
        pairs.extend((conv, norm) for conv, y in outputs if y is args[0])

    kinds = ((nn.Conv2d, "register_forward_hook", keep), (_BatchNorm, "register_forward_pre_hook", find))
    hooks = [getattr(m, hook)(run) for m in model.modules() for kind, hook, run in kinds if isinstance(m, kind)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    new: dict[nn.Module, nn.Module] = {}
    for conv, norm in pairs:
        new[conv] = fuse_conv_bn_eval(conv, norm)  # type: ignore[type-var]
        new[norm] = nn.Sequential(*(norm.get_submodule(part) for part in ("drop", "act") if hasattr(norm, part)))
    for owner in list(model.modules()):
        for name, child in owner.named_children():
            if child in new:
                setattr(owner, name, new[child])
    return model


# --- the usual ways to an ensemble -----------------------------------------------------------------------------------


class ReferenceMask(nn.Module):
    """A layer of the reference package in the place of one of ours, which takes tokens as vectors.

    It cannot draw masks for every number of channels, and does not rescale: it gets ours, rescaled.
    """

    def __init__(self, ours: Any) -> None:
        super().__init__()
        layers = importlib.import_module("masksembles.torch")
        self.is_image = ours.rank == 4 and ours.channel_dim == 1
        self.layer = (layers.Masksembles2D if self.is_image else layers.Masksembles1D)(64, ours.n, SCALE)
        self.layer.masks = ours.masks * (ours.channels / ours.kept)

    def forward(self, x: Tensor, members: Any) -> Tensor:
        return self.layer(x) if self.is_image else self.layer(x.flatten(0, -2)).view_as(x)


class AlwaysDropout(nn.Module):
    """Dropout in eval, in the place of a mask, with as many zeros: of whole channels in images."""

    def __init__(self, ours: Any, share: float) -> None:
        super().__init__()
        self.drop = F.dropout2d if ours.rank == 4 and ours.channel_dim == 1 else F.dropout
        self.share = share

    def forward(self, x: Tensor, members: Any, expand: bool = False) -> Tensor:
        return self.drop(x, self.share, training=True)


class Passes(nn.Module):
    """Networks one after another, and what a converted model makes of its members' logits."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.head = Head(len(networks), [0], ["classification"])

    def forward(self, x: Tensor) -> Prediction:
        return self.head.aggregate(torch.cat([network(x) for network in self.networks]))


def with_reference_layers(model: ConvertedModel) -> nn.Module:
    """Inputs repeated, with the layers of the reference package."""
    repeated = repeat_inputs(model)
    for site in model.surgery.sites:
        setattr(repeated, site.mask, ReferenceMask(model.get_submodule(site.mask)))
    return repeated


def with_dropout(model: ConvertedModel, share: float = HIDDEN) -> ConvertedModel:
    """A model of one member, with dropout of this share in the place of its masks."""
    for site in model.surgery.sites:
        setattr(model, site.mask, AlwaysDropout(model.get_submodule(site.mask), share))
    model.output = "logits"
    return model


def largest_difference(one: Any, other: Any) -> float:
    """Of the logits of all members, relative to the largest of them."""
    a, b = (p.members if isinstance(p, Prediction) else p for p in (one, other))
    return float((a - b).abs().max() / a.abs().max())

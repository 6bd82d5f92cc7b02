"""pack(): a converted model in, its members as small networks of their own out."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from masksurgery.ensemble import Ensemble
from masksurgery.layers import Assignment
from masksurgery.model import ConvertedModel
from masksurgery.pack.families import Operations, classify
from masksurgery.pack.folding import fold
from masksurgery.pack.liveness import Member, find_known
from masksurgery.pack.moves import Labels
from masksurgery.pack.network import member_network
from masksurgery.pack.packed import PackedModel
from masksurgery.pack.parts import Collect
from masksurgery.pack.reuse import reuse_memory
from masksurgery.pack.slicing import Sliced, Slicer, build_shared
from masksurgery.types import ConfigError, check_choice

Layout = Literal["auto", "unrolled", "grouped"]


def pack(model: ConvertedModel, layout: Layout = "auto", *, dense: bool | None = None) -> PackedModel:
    """Write out the members of a converted model as the small networks that they are; its predictions stay the same.

    For each member, channels that its masks hide, and all that is made of them alone or for them alone, are cut out of
    the weights on both sides. BatchNorm, per-channel scales and the rescaling of the masks go into the weights. What no
    mask reaches is computed once for all members.

    Args:
        model: What `convert` or `load` returned, trained or not. It is not changed, and shares nothing with the result.
        layout: "unrolled": one member after another, for CPUs and for memory; "grouped": the members side by side as
            groups of convolutions and batches of matrix products, for GPUs; "auto": whichever is faster for the example
            inputs, on the device that the model is on.
        dense: Let weights have rows of zeros where a sum would need an index-add, or columns of zeros where an input
            would have to be cut: more multiply-adds, but fewer copies. None: with "auto" what is faster, else False.
    Returns:
        The packed model, for eval alone.
    Raises:
        ConfigError: The model is not a converted one, or the layout is not one that can be had.
    """
    _check(model, layout)
    members = analyse_members(model)
    return unrolled(model, members, bool(dense))


def _check(model: nn.Module, layout: str) -> None:
    if isinstance(model, PackedModel):
        raise ConfigError("The model is packed already. Pack the converted model that it was packed from.")
    if not isinstance(model, ConvertedModel):
        raise ConfigError(
            f"pack takes a converted model, not {type(model).__name__}. Pass what masksurgery.convert returned."
        )
    check_choice("layout", layout, get_args(Layout))


def analyse_members(model: ConvertedModel) -> list[Member]:
    """What is known of the tensors of each member."""
    net = member_network(model)
    operations: Operations = classify(net, fold(net))
    labels: Labels = {}
    return [find_known(operations, i, labels) for i in range(model.surgery.n)]


def unrolled(model: Ensemble, members: list[Member], dense: bool) -> PackedModel:
    """The members one after another, in one graph."""
    sliced = Sliced()
    shared = build_shared(members[0], sliced)
    outputs = [Slicer(member, sliced, shared, dense).run() for member in members]
    return finish(model, sliced, outputs, "unrolled", dense)


def finish(
    model: Ensemble, sliced: Sliced, outputs: list[object], layout: Literal["unrolled", "grouped"], dense: bool
) -> PackedModel:
    """Add the head to a graph that computes the members' outputs."""
    head = model.head_module
    collected = sliced.call("collect", Collect(head.batch_dims), outputs)  # type: ignore[arg-type]
    name = sliced.add(
        "prediction", type(head)(head.n, head.batch_dims, head.tasks, head.class_dim, head.heteroscedastic)
    )
    sliced.graph.output(sliced.graph.call_module(name, (collected, Assignment(1, None, True))))
    sliced.sweep()
    reuse_memory(sliced.graph, sliced.root, sliced.sums)
    if dense:
        _channels_last(sliced.root)
    sliced.graph.lint()
    return PackedModel(sliced.root, sliced.graph, model, layout, dense, list(sliced.barriers.values()), name)


def _channels_last(root: nn.Module) -> None:
    """Lay out the weights of convolutions so that their outputs have the channels last in memory."""
    for module in root.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)

"""pack(): a converted model in, its members as small networks of their own out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import fx, nn

from masksurgery.ensemble import Ensemble
from masksurgery.layers import Assignment
from masksurgery.model import ConvertedModel
from masksurgery.pack.choosing import check_runs, fastest
from masksurgery.pack.families import Operations, classify
from masksurgery.pack.folding import fold
from masksurgery.pack.grouped import build_grouped
from masksurgery.pack.liveness import find_known
from masksurgery.pack.member import Member
from masksurgery.pack.moves import Labels
from masksurgery.pack.network import member_network
from masksurgery.pack.packed import PackedModel
from masksurgery.pack.parts import Collect
from masksurgery.pack.reuse import reuse_memory
from masksurgery.pack.sliced import Sliced, build_shared
from masksurgery.pack.slicing import Slicer
from masksurgery.prediction import Head
from masksurgery.types import ConfigError, check_choice

logger = logging.getLogger(__name__)

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
    Example:
        >>> base = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3))
        >>> model = masksurgery.convert(base, example_inputs=(torch.ones(1, 8),)).eval()
        >>> packed = masksurgery.pack(model, "unrolled")
        >>> x = torch.randn(5, 8)
        >>> torch.allclose(packed(x).mean, model(x).mean, atol=1e-6)
        True
    """
    _check(model, layout, dense)
    members = analyse_members(model)
    if layout == "grouped":
        return grouped(model, members)
    if layout == "unrolled":
        return unrolled(model, members, bool(dense))
    return fastest([*_candidates(model, members, dense)])


def _candidates(model: ConvertedModel, members: list[Member], dense: bool | None) -> Iterator[PackedModel]:
    """What "auto" chooses from."""
    for choice in (False, True) if dense is None else (dense,):
        yield unrolled(model, members, choice)
    if dense is not False:
        try:
            yield grouped(model, members)
        except ConfigError as error:
            logger.info("%s", error)


def _check(model: nn.Module, layout: str, dense: bool | None) -> None:
    if isinstance(model, PackedModel):
        raise ConfigError("The model is packed already. Pack the converted model that it was packed from.")
    if not isinstance(model, ConvertedModel):
        raise ConfigError(
            f"pack takes a converted model, not {type(model).__name__}. Pass what masksurgery.convert returned."
        )
    check_choice("layout", layout, get_args(Layout))
    if layout == "grouped" and dense is False:
        raise ConfigError('layout="grouped" is dense: its members have weights of one shape. Leave out dense=False.')


def analyse_members(model: ConvertedModel) -> list[Member]:
    """What is known of the tensors of each member."""
    net = member_network(model)
    operations: Operations = classify(net, fold(net))
    labels: Labels = {}
    return [find_known(operations, i, labels) for i in range(model.surgery.n)]


def grouped(model: Ensemble, members: list[Member]) -> PackedModel:
    """The members side by side.

    Raises:
        ConfigError: They are not cut alike.
    """
    sliced = Sliced()
    shared = build_shared(members[0], sliced)
    output = build_grouped(members, sliced, shared, model.head_module.batch_dims)
    packed = _finish(model, sliced, output, "grouped", True)
    check_runs(packed)
    return packed


def unrolled(model: Ensemble, members: list[Member], dense: bool) -> PackedModel:
    """The members one after another, in one graph."""
    sliced = Sliced()
    shared = build_shared(members[0], sliced)
    outputs = [Slicer(member, sliced, shared, dense).run() for member in members]
    output = sliced.call("collect", Collect(model.head_module.batch_dims), *outputs)
    return _finish(model, sliced, output, "unrolled", dense)


def _finish(
    model: Ensemble, sliced: Sliced, output: fx.Node, layout: Literal["unrolled", "grouped"], dense: bool
) -> PackedModel:
    """Add the head to a graph that computes the members' outputs."""
    head = model.head_module
    own = Head(head.n, head.batch_dims, head.tasks, head.class_dim, head.heteroscedastic)
    name = sliced.add("prediction", own)
    sliced.graph.output(sliced.graph.call_module(name, (output, Assignment(1, None, True))))
    sliced.sweep()
    sliced.graph.lint()
    if layout == "unrolled":
        reuse_memory(sliced.graph, sliced.root, sliced.sums)
    if dense:
        _channels_last(sliced.root)
    digest = sliced.digest()
    return PackedModel(sliced.root, sliced.graph, model, layout, dense, list(sliced.barriers.values()), name, digest)


def _channels_last(root: nn.Module) -> None:
    """Lay out the weights of convolutions so that their outputs have the channels last in memory."""
    for module in root.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and module.weight.dim() == 4:  # 5 where they are stacked
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)

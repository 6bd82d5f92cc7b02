"""convert(): a pretrained model in, a Masksembles ensemble out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from masksurgery.candidates import resolve_types
from masksurgery.copying import copy_module
from masksurgery.drawing import draw_masks
from masksurgery.ensemble import Ensemble
from masksurgery.example import Example
from masksurgery.inputs import bind_inputs, describe_inputs, placeholder_values
from masksurgery.kinds import compiled_module
from masksurgery.layers import Members, _Masksembles, mask_type
from masksurgery.layout import Facts
from masksurgery.model import ConvertedModel
from masksurgery.opaque import Follow
from masksurgery.part import replace_by_part
from masksurgery.prediction import Head, check_outputs, leaf_tasks
from masksurgery.regions import Region, explore
from masksurgery.rewrite import Mask, Plan, output_shapes, plan, plan_part, rewrite, rewrite_part
from masksurgery.sites import find_output_layers, find_sites, match_sites, unused_name
from masksurgery.types import (
    ConfigError,
    ConvertConfig,
    Selector,
    Site,
    Skipped,
    Surgery,
    Task,
    Tie,
    TraceError,
    TrainMode,
    Where,
)

logger = logging.getLogger(__name__)

FINE_TUNE = "masks inside the network change what it computes: fine-tune it before you use its predictions"


def convert(
    model: nn.Module,
    n: int = 4,
    scale: float = 2.0,
    *,
    after: Sequence[type | str] | type | str | None = None,
    where: Where = "all",
    include: Sequence[Selector] | Selector | None = None,
    exclude: Sequence[Selector] | Selector = (),
    task: Task = "classification",
    class_dim: int = 1,
    train_mode: TrainMode = "split",
    rescale: bool = True,
    tie: Tie | None = None,
    multiple_of: int = 1,
    heads: bool = False,
    seed: int = 0,
    heteroscedastic: bool = False,
    example_inputs: Any = None,
    unbatched: Sequence[str] = (),
) -> ConvertedModel:
    """Turn a model into an ensemble of n overlapping subnetworks that share its weights.

    Args:
        model: Any module that torch.fx can trace. It is not changed.
        n: Number of members.
        scale: At least 1; larger means less overlap between the members' masks.
        after: Layer types to mask after, or their names; None for every convolution and Linear, subclasses included.
        where: "all", or "head" for only what the output layers read, which needs no fine-tuning.
        include: Globs on qualified module names, or callables (name, module) -> bool. A module named in full is masked
            even where the default rule would skip it.
        exclude: The same; beats `include`.
        task: "classification", "multilabel", "regression", or "probabilities" for a model that ends in a softmax.
        class_dim: Where the classes are in the model's output.
        train_mode: "split" sends each sample of a batch through one member, "repeat" through all.
        rescale: Divide the kept channels by the kept share, as dropout does.
        tie: "stream": the sites whose outputs are added into one residual stream share their masks.
        multiple_of: Every mask keeps a multiple of so many channels, where that leaves any out.
        heads: Mask whole attention heads too, on the path of their values.
        seed: For the masks; every site has a stream of its own.
        heteroscedastic: With `task="regression"`: the model returns a mean and a log-variance.
        example_inputs: One forward's args (a tuple) or kwargs (a dict); by default an image as
            timm's pretrained_cfg says.
        unbatched: Names of inputs without a batch dimension.
    Returns:
        The converted model, in the mode of the base model. In eval it returns a `Prediction`, in training what the
        base model returned. A number that the base model computes over the whole batch, such as the loss that
        transformers' models return if labels are among their inputs, is handed on: in eval it is the loss over the
        outputs of all members, which for a mean is the mean of the members' losses.
    Raises:
        MasksurgeryError: One of its kinds, before anything is changed.
    Source:
        Durasov et al. 2021, arXiv:2012.08334.
    Example:
        >>> base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> model = masksurgery.convert(base, n=4, scale=2.0, example_inputs=(torch.ones(1, 8),))
        >>> model.train()(torch.ones(5, 8)).shape  # what the base model returns
        torch.Size([5, 3])
        >>> p = model.eval()(torch.ones(5, 8))
        >>> p.mean.shape, p.entropy.shape, p.members.shape
        (torch.Size([5, 3]), torch.Size([5]), torch.Size([5, 4, 3]))
        >>> [(site.layer, site.channels, site.ones) for site in model.surgery.sites]
        [('0', 16, 8)]
        >>> model.surgery.skipped[0].layer, model.surgery.skipped[0].reason[:12]
        ('2', 'output layer')
    """
    config = ConvertConfig(
        n, scale, resolve_types(after, model), where, None if include is None else _several(include), _several(exclude),
        task, class_dim, train_mode, rescale, seed, heteroscedastic, tuple(unbatched), tie,
        multiple_of, heads,
    )  # fmt: skip
    draft = Draft.of(model, config, example_inputs)
    selection = find_sites(draft.region, config)
    masks = draw_masks(selection.sites, config)
    sites = [replace(site, ones=int(masks[site.mask][0].sum())) for site in selection.sites]
    converted = build(draft, sites, masks, selection.skipped)
    if FINE_TUNE in converted.surgery.notes:
        logger.warning("%s: %d sites; %s.", type(model).__name__, len(sites), FINE_TUNE)
    return converted


def _several(selectors: Sequence[Selector] | Selector) -> tuple[Selector, ...]:
    return (selectors,) if isinstance(selectors, str) or callable(selectors) else tuple(selectors)


@dataclass(frozen=True)
class Draft:
    """A copy of a model, traced, and what is known of it: all that a conversion reads."""

    base: nn.Module
    config: ConvertConfig
    inputs: dict[str, Any]
    region: Region

    @classmethod
    def of(
        cls,
        model: nn.Module,
        config: ConvertConfig,
        example_inputs: Any,
        parts: Mapping[str, Example] | None = None,
    ) -> Draft:
        """Trace a copy of the model.

        Args:
            parts: Where a conversion recorded them, the modules with a graph of their own and what they take.
        Raises:
            ConfigError: It is converted already, compiled, quantised, a detection model or has lazy layers, or
                `unbatched` names no input.
            TraceError, LayoutError: It can be neither traced nor run, or its inputs are not known.
        """
        held = [module for module in model.modules() if isinstance(module, (_Masksembles, Ensemble))]
        if held:
            is_packed = isinstance(held[0], Ensemble) and not isinstance(held[0], ConvertedModel)
            what = "members that are packed" if is_packed else "Masksembles layers already"
            raise ConfigError(f"{type(model).__name__} holds {what}: it is converted. Convert its base model instead.")
        _check_ready(model)
        _check_detection(model)
        bound = bind_inputs(model, default_inputs(model) if example_inputs is None else example_inputs)
        inputs = placeholder_values(bound)
        unknown = set(config.unbatched) - set(inputs)
        if unknown:
            raise ConfigError(f"unbatched={config.unbatched!r} names {sorted(unknown)}; the inputs are {list(inputs)}.")
        example = Example.of(bound, config.unbatched)
        region = explore(copy_module(model), example, config.after or (), parts)
        return cls(model, config, describe_inputs(bound), region)


def _check_ready(model: nn.Module) -> None:
    if compiled_module(model) is not None:
        raise ConfigError(
            "The model is compiled. Convert what torch.compile was given (model._orig_mod), and compile the result."
        )
    tensors = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name.rpartition(".")[0] for name, x in tensors if is_lazy(x)]
    if lazy:
        raise ConfigError(
            f"'{lazy[0]}' is a {type(model.get_submodule(lazy[0])).__name__} without a shape: it has not run yet. Run "
            f"the model once, model(*example_inputs), before you convert it."
        )
    for name, module in model.named_modules():
        if ".quantized." in type(module).__module__:
            raise ConfigError(
                f"'{name}' is a {type(module).__name__}: int8 layers hold no floating-point channels to mask. Convert "
                f"the model as it was before it was quantised."
            )


def _check_detection(model: nn.Module) -> None:
    """torchvision's detection models take lists of images, which their transform resizes, and return lists of boxes."""
    if {"backbone", "transform"} <= set(model._modules) and "images" in inspect.signature(model.forward).parameters:
        name = type(model).__name__
        raise ConfigError(
            f"{name} takes and returns lists, with as many boxes as it finds: these have no mean. Convert its "
            f"backbone: backbone = masksurgery.convert(model.backbone, example_inputs=(torch.zeros(1, 3, 320, 320),), "
            f'task="regression"), then backbone.output = "mean" and model.backbone = backbone.'
        )


def default_inputs(model: nn.Module) -> tuple[Tensor]:
    """An example image [1, c, h, w] of the size that the model's pretrained_cfg, or its patch embedding, says.

    Raises:
        TraceError: It says none.
    """
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not cfg or "input_size" not in cfg:
        raise TraceError(
            f"example_inputs is missing: {type(model).__name__} does not say what it takes (it has no timm "
            f"pretrained_cfg). Pass example_inputs=(torch.zeros(1, 3, 224, 224),), or whatever one forward takes."
        )
    channels, *size = cfg["input_size"]
    first = cfg.get("first_conv")
    if isinstance(first, (list, tuple)):
        first = first[0] if first else None
    stem = dict(model.named_modules()).get(first) if first else None
    seen = getattr(stem, "in_channels", channels)
    if seen != 16 * channels:  # TResNet folds blocks of 4 x 4 pixels into the channels before its first convolution
        channels = seen
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return (torch.zeros(1, channels, *size, dtype=like.dtype, device=like.device),)


def build(
    draft: Draft, sites: Sequence[Site], masks: Mapping[str, np.ndarray], skipped: Sequence[Skipped] = ()
) -> ConvertedModel:
    """Rewrite the traced graphs with these sites and masks."""
    config, region, traces = draft.config, draft.region, draft.region.traces
    output_layers = find_output_layers(region)
    plans = {part.name: _plan(part, sites) for part in region.walk()}
    root_plan = plans[""][0]
    outputs = region.facts[next(iter(reversed(traces.eval.nodes)))]
    tasks = leaf_tasks(outputs.value, config.task)
    check_outputs(output_shapes(outputs, root_plan.batch_dims), tasks, config.class_dim, config.heteroscedastic)
    taken = {*dir(traces.module), *masks}
    names = {kind: unused_name(kind, taken) for kind in ("members", "prediction")}
    source = root_plan.source
    members = Members(config.n, config.train_mode, source[1] if source else 0)
    modules: dict[str, nn.Module] = {names["members"]: members}
    modules.update(_mask_modules(region, sites, masks, config))
    for graph, graph_plan in zip((traces.eval, traces.train), plans[""], strict=False):
        modules.update(rewrite(graph, graph_plan, names))
    modules[names["prediction"]] = Head(config.n, root_plan.batch_dims, tasks, config.class_dim, config.heteroscedastic)
    for part in reversed([*region.walk()]):  # from the inside out
        if part.name and any(site.part == part.name for site in sites):
            _replace(part, traces.module, plans[part.name], _mask_modules(part, sites, masks, config), members)
    changes = config.where == "all" and not all(rows.all() for rows in masks.values())
    notes = (*_notes(region), FINE_TUNE) if changes else _notes(region)
    surgery = Surgery(
        config.n, config.scale, config.seed, tuple(sites), tuple(skipped), notes, dict(masks), output_layers
    )
    parts = {part.name: part.example.light() for part in region.walk() if part.name}
    return ConvertedModel(draft.base, traces, modules, surgery, config, names, draft.inputs, parts)


def _notes(region: Region) -> tuple[str, ...]:
    """What the record has to say beside the sites."""
    notes = list(region.traces.notes)
    for part in region.walk():
        for name, cause in part.traces.opaque.items():
            notes.append(
                f"opaque: {part.title(name)} is called as it is, on all members at once, and the modules that it calls "
                f"are converted on their own: torch.fx cannot trace its forward ({cause})"
            )
    return tuple(notes)


def _mask_modules(
    region: Region, sites: Sequence[Site], masks: Mapping[str, np.ndarray], config: ConvertConfig
) -> dict[str, nn.Module]:
    """The masks that stand in the graph of a region, by their names there."""
    nodes = {node.name: node for node in region.traces.eval.nodes}
    modules: dict[str, nn.Module] = {}
    for site in sites:
        if site.part != region.name:
            continue
        mask = mask_type(region.facts[nodes[site.node]].value.dim())(
            site.channels, config.n, config.scale, channel_dim=site.channel_dim, batch_dim=site.batch_dim,
            fold=site.fold, outer=site.outer, rescale=config.rescale, masks=masks[site.mask],
        )  # fmt: skip
        layer = "" if site.layer == region.name else site.layer.removeprefix(region.qualified(""))
        device = _device_of(region.traces.module.get_submodule(layer))
        modules[site.mask.removeprefix(region.qualified(""))] = mask if device is None else mask.to(device)
    return modules


def _device_of(module: nn.Module) -> torch.device | None:
    """Where the parameters of a module are; None on the meta device, where masks would lose their values."""
    device = next((p.device for p in module.parameters()), None)
    return None if device is None or device.type == "meta" else device


def _replace(part: Region, root: nn.Module, plans: list[Plan], modules: dict[str, nn.Module], members: Members) -> None:
    """Put masks into the graphs of a part, and a module that runs them in the place of the part's."""
    traces = part.traces
    follow = unused_name("members", {*dir(traces.module), *modules})
    for graph, graph_plan in zip((traces.eval, traces.train), plans, strict=False):
        rewrite_part(graph, graph_plan, follow)
    replace_by_part(
        root, traces.module, (traces.eval, traces.train), {follow: Follow(members), **modules}, part.example
    )


def _plan(region: Region, sites: Sequence[Site]) -> list[Plan]:
    """The plan of a region's eval graph, and of its training graph where that is another."""
    traces, prefix = region.traces, region.qualified("")
    own = [site for site in sites if site.part == region.name]
    by_name = {node.name: node for node in traces.eval.nodes}
    masks = [
        Mask(site.mask.removeprefix(prefix), by_name[site.node], tuple(by_name[name] for name in site.readers))
        for site in own
    ]
    plans = [_plan_graph(region, traces.eval, region.facts, masks, sites)]
    if traces.train is not traces.eval:
        twins = match_sites(own, traces)
        masks = [Mask(name.removeprefix(prefix), *nodes) for name, nodes in twins.items()]
        plans.append(_plan_graph(region, traces.train, region.train_facts, masks, sites))
    return plans


def _plan_graph(
    region: Region, graph: fx.Graph, facts: Mapping[fx.Node, Facts], masks: list[Mask], sites: Sequence[Site]
) -> Plan:
    if region.name:
        return plan_part(graph, facts, masks)
    with_masks = {
        str(node.target)
        for node, parts in region.parts.items()
        if any(site.part == inner.name for part in parts for inner in part.walk() for site in sites)
    }
    opaque = {node for node in graph.nodes if node.op == "call_module" and node.target in with_masks}
    return plan(graph, facts, masks, opaque)

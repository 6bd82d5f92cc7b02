"""convert(): a pretrained model in, a Masksembles ensemble out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from masksurgery.candidates import channel_dim_of, resolve_types
from masksurgery.copying import copy_module
from masksurgery.flow import Flow
from masksurgery.layers import Members, _Masksembles, mask_type
from masksurgery.layout import Facts, analyse
from masksurgery.masks import generate_masks, site_seed
from masksurgery.model import ConvertedModel
from masksurgery.prediction import Head, check_outputs, leaf_tasks
from masksurgery.rewrite import Mask, Plan, output_shapes, plan, rewrite
from masksurgery.sites import find_sites, match_sites, unused_name
from masksurgery.tracing import Traces, bind_inputs, compiled_module, describe_inputs, placeholder_values, trace
from masksurgery.types import (
    ConfigError,
    ConvertConfig,
    Selector,
    Site,
    Skipped,
    Surgery,
    Task,
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
    tie: str | None = None,
    multiple_of: int = 1,
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
        tie: Not yet available.
        multiple_of: Not yet available.
        seed: For the masks; every site has a stream of its own.
        heteroscedastic: With `task="regression"`: the model returns a mean and a log-variance.
        example_inputs: One forward's args (a tuple) or kwargs (a dict); by default an image as
            timm's pretrained_cfg says.
        unbatched: Names of inputs without a batch dimension.
    Returns:
        The converted model, in the mode of the base model. In eval it returns a `Prediction`, in training what the
        base model returned.
    Raises:
        MasksurgeryError: One of its kinds, before anything is changed.
    Source:
        Durasov et al. 2021, arXiv:2012.08334.
    """
    if tie is not None or multiple_of != 1:
        raise ConfigError(f"tie={tie!r}, multiple_of={multiple_of!r}: not yet available. Pass tie=None, multiple_of=1.")
    config = ConvertConfig(
        n, scale, resolve_types(after, model), where, None if include is None else _several(include), _several(exclude),
        task, class_dim, train_mode, rescale, seed, heteroscedastic, tuple(unbatched),
    )  # fmt: skip
    draft = Draft.of(model, config, example_inputs)
    selection = find_sites(draft.traces, Flow(draft.traces.eval, draft.facts, draft.traces.module), config)
    masks = {
        site.mask: generate_masks(site.channels, n, scale, seed=site_seed(seed, site.layer, site.call))
        for site in selection.sites
    }
    sites = [replace(site, ones=int(masks[site.mask][0].sum())) for site in selection.sites]
    converted = build(draft, sites, masks, selection.skipped)
    if FINE_TUNE in converted.surgery.notes:
        logger.warning("%s: %d sites; %s.", type(model).__name__, len(sites), FINE_TUNE)
    return converted


def _several(selectors: Sequence[Selector] | Selector) -> tuple[Selector, ...]:
    return (selectors,) if isinstance(selectors, str) or callable(selectors) else tuple(selectors)


@dataclass(frozen=True)
class Draft:
    """A copy of a model, its traces and what is known of them: all that a conversion reads."""

    base: nn.Module
    config: ConvertConfig
    inputs: dict[str, Any]
    traces: Traces
    facts: dict[fx.Node, Facts]
    train_facts: dict[fx.Node, Facts]

    @classmethod
    def of(cls, model: nn.Module, config: ConvertConfig, example_inputs: Any) -> Draft:
        """Trace a copy of the model.

        Raises:
            ConfigError: It is converted already, compiled or has lazy layers, or `unbatched` names no input.
            TraceError: It cannot be traced, or its inputs are not known.
        """
        if any(isinstance(module, (_Masksembles, ConvertedModel)) for module in model.modules()):
            raise ConfigError(
                f"{type(model).__name__} holds Masksembles layers already: it is converted. "
                f"Convert its base model instead."
            )
        _check_ready(model)
        bound = bind_inputs(model, default_inputs(model) if example_inputs is None else example_inputs)
        inputs = placeholder_values(bound)
        unknown = set(config.unbatched) - set(inputs)
        if unknown:
            raise ConfigError(f"unbatched={config.unbatched!r} names {sorted(unknown)}; the inputs are {list(inputs)}.")
        traces = trace(copy_module(model), bound, config.after or ())

        def facts(graph: fx.Graph, training: bool) -> dict[fx.Node, Facts]:
            root = traces.module
            return analyse(graph, root, inputs, lambda node: channel_dim_of(root, node), config.unbatched, training)

        eval_facts = facts(traces.eval, False)
        train_facts = eval_facts if traces.train is traces.eval else facts(traces.train, True)
        return cls(model, config, describe_inputs(bound), traces, eval_facts, train_facts)


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
    config, traces = draft.config, draft.traces
    plans = _plan(draft, sites)
    outputs = draft.facts[next(iter(reversed(traces.eval.nodes)))]
    batch_dims = plans[0].batch_dims
    tasks = leaf_tasks(outputs.value, config.task)
    check_outputs(output_shapes(outputs, batch_dims), tasks, config.class_dim, config.heteroscedastic)
    taken = {*dir(traces.module), *masks}
    names = {kind: unused_name(kind, taken) for kind in ("members", "prediction")}
    source = plans[0].source
    modules: dict[str, nn.Module] = {names["members"]: Members(config.n, config.train_mode, source[1] if source else 0)}
    by_name = {node.name: node for node in traces.eval.nodes}
    for site in sites:
        rank = draft.facts[by_name[site.node]].value.dim()
        modules[site.mask] = mask_type(rank)(
            site.channels, config.n, config.scale, channel_dim=site.channel_dim, batch_dim=site.batch_dim,
            fold=site.fold, rescale=config.rescale, masks=masks[site.mask],
        )  # fmt: skip
        device = _device_of(traces.module.get_submodule(site.layer))
        if device is not None:
            modules[site.mask].to(device)
    for graph, graph_plan in zip((traces.eval, traces.train), plans, strict=False):
        modules.update(rewrite(graph, graph_plan, names))
    modules[names["prediction"]] = Head(config.n, batch_dims, tasks, config.class_dim, config.heteroscedastic)
    changes = config.where == "all" and not all(rows.all() for rows in masks.values())
    notes = (*traces.notes, FINE_TUNE) if changes else traces.notes
    surgery = Surgery(config.n, config.scale, config.seed, tuple(sites), tuple(skipped), notes, dict(masks))
    return ConvertedModel(draft.base, traces, modules, surgery, config, names, draft.inputs)


def _device_of(module: nn.Module) -> torch.device | None:
    """Where the parameters of a module are; None on the meta device, where masks would lose their values."""
    device = next((p.device for p in module.parameters()), None)
    return None if device is None or device.type == "meta" else device


def _plan(draft: Draft, sites: Sequence[Site]) -> list[Plan]:
    """The plan of the eval graph, and of the training graph where it is another."""
    traces = draft.traces
    by_name = {node.name: node for node in traces.eval.nodes}
    masks = [Mask(site.mask, by_name[site.node], tuple(by_name[name] for name in site.readers)) for site in sites]
    plans = [plan(traces.eval, draft.facts, masks)]
    if traces.train is not traces.eval:
        twins = match_sites(sites, traces)
        plans.append(plan(traces.train, draft.train_facts, [Mask(name, *nodes) for name, nodes in twins.items()]))
    return plans

"""Which nodes are masked, and why the others are not."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from masksurgery.axes import Axis
from masksurgery.candidates import Candidate, select_candidates
from masksurgery.flow import Flow
from masksurgery.heads import find_heads
from masksurgery.kinds import is_layer, rank_of
from masksurgery.layout import layout_of
from masksurgery.regions import Region
from masksurgery.ties import tie_streams
from masksurgery.tracing import Traces
from masksurgery.types import ConvertConfig, Layout, Site, SiteError, Skipped

NOT_OUTPUT = 'not an output layer (where="head" masks only what those read)'


@dataclass(frozen=True)
class Selection:
    """The sites, without their masks (`ones` is 0), and the layers without a site."""

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]


def find_sites(region: Region, config: ConvertConfig) -> Selection:
    """Choose the sites in the eval graphs by the rule that the README states.

    Args:
        region: Of the model itself, with the regions in it.
        config: What is to be masked.
    Raises:
        SiteError: Nothing is selected; a layer that `include` names in full cannot be masked.
    """
    candidates, left_out = select_candidates(region, config)
    flow = Flow(region)
    if config.where == "head":
        sites, skipped = _find_head(flow, candidates)
    else:
        sites, skipped = _find_all(flow, candidates, find_heads(flow, candidates) if config.heads else {})
    skipped += left_out
    if not sites:
        reasons = "; ".join(f"{skip.layer}: {skip.reason}" for skip in skipped[:5])
        raise SiteError(
            f"No layer can be masked. {reasons}. A layer that include=[...] names in full is masked all the same."
        )
    named = list(_named(region, sites))
    return Selection(tuple(tie_streams(region, named) if config.tie else named), tuple(skipped))


def _named(region: Region, sites: Sequence[Site]) -> Iterator[Site]:
    """The sites with names for their masks, which are children of the module whose graph they stand in."""
    taken = {part.name: _names_in_use(part.traces.module) for part in region.walk()}
    for site in sites:
        layer = site.layer.removeprefix(f"{site.part}.") if site.part else site.layer
        name = layer.replace(".", "_") + "_mask" + (f"_{site.call}" if site.call else "")
        name = f"_{name}" if name[0].isdigit() else name  # children of a Sequential are called 0, 1 ...
        name = unused_name(name, taken[site.part])
        yield replace(site, mask=f"{site.part}.{name}" if site.part else name)


def _names_in_use(root: nn.Module) -> set[str]:
    return {
        name for module in (root,) for name in (*module._modules, *module._parameters, *module._buffers, *dir(module))
    }


def unused_name(name: str, taken: set[str]) -> str:
    """The name, with underscores until nothing in `taken` has it; then `taken` has it."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


# --- masks after the layers ------------------------------------------------------------------------------------------


def _find_all(
    flow: Flow, candidates: list[Candidate], heads: Mapping[fx.Node, Site | str]
) -> tuple[list[Site], list[Skipped]]:
    sites: list[Site] = []
    skipped: list[Skipped] = []
    masked: dict[Axis, str] = {}
    in_chain: dict[fx.Node, str] = {}
    by_node = {candidate.node: candidate for candidate in candidates}
    for here, node in flow.walk(masked):
        candidate = by_node.get(node)
        if candidate is None or (node in in_chain and not candidate.forced):
            continue
        if here.region.is_layer and not candidate.forced:
            reason = f"opaque: {here.region.caller}, which cannot be traced, calls it itself: what follows is not known"
            skipped.append(Skipped(candidate.layer, reason))
            continue
        of_heads = heads.get(node)
        if isinstance(of_heads, Site):
            sites.append(of_heads)
            continue
        chain = here.chain(node) if is_layer(candidate.module) else [node]
        site, region, reason = _judge(here, candidate, chain[-1], masked)
        if site is None:
            skipped.append(Skipped(candidate.layer, of_heads or reason))
            continue
        others = [other for other in chain[1:] if other in by_node and is_layer(by_node[other].module)]
        in_chain.update(dict.fromkeys(chain[1:], candidate.layer))
        sites.append(replace(site, chain=tuple(by_node[other].layer for other in others)))
        masked.update(dict.fromkeys(region, candidate.layer))
    return sites, skipped


def _judge(
    flow: Flow, candidate: Candidate, end: fx.Node, masked: dict[Axis, str]
) -> tuple[Site | None, frozenset[Axis], str]:
    """The site of a candidate, what its mask reaches, and otherwise the reason why it has none."""
    axis = flow.channel_axis(end)
    layout, reason = _layout(flow, end, candidate.layer)
    gated = flow.gated.get(candidate.node)
    region: frozenset[Axis] = frozenset()
    if reason is None and axis is None:
        reason = gated or "single: it has one channel, or none that stands alone in a dimension"
    if layout is None or layout.batch_dim is None or axis is None:
        if candidate.forced:
            raise SiteError(f"include names '{candidate.layer}', which cannot be masked: {reason}.")
        return None, region, str(reason)
    fate = flow.fate(end, axis, masked)
    if not candidate.forced and (fate.reason or gated):
        first = fate.reason if fate.reason and not fate.reason.startswith("masked") else None
        return None, region, str(first or gated or fate.reason)
    (channel_dim,) = [d for d, dim in enumerate(flow.facts[end].dims[0]) if dim == (axis,)]
    site = Site(
        candidate.layer, candidate.call, end.name, "", axis.size, 0, layout.batch_dim, channel_dim, layout.fold,
        part=flow.region.name, outer=layout.outer,
    )  # fmt: skip
    return site, fate.region, ""


def _layout(flow: Flow, node: fx.Node, layer: str) -> tuple[Layout | None, str | None]:
    fact = flow.facts[node]
    if len(fact.dims) != 1 or not isinstance(fact.value, torch.Tensor):
        return None, f"unknown: '{node.name}' does not return one tensor"
    layout = layout_of(fact.dims[0], node.name)
    if layout.batch_dim is None:
        return None, "no batch: its output has no batch dimension"
    return layout, None


# --- masks before the output layers ----------------------------------------------------------------------------------


def _find_head(flow: Flow, candidates: list[Candidate]) -> tuple[list[Site], list[Skipped]]:
    sites: dict[fx.Node, Site] = {}
    skipped: list[Skipped] = []
    by_node = {candidate.node: candidate for candidate in candidates}
    for here, node in flow.walk({}):
        candidate = by_node.get(node)
        if candidate is None:
            continue
        if not _is_output_layer(here, node):
            skipped.append(Skipped(candidate.layer, NOT_OUTPUT))
            continue
        source = _input_of(here, node)
        if source in sites:
            known = sites[source]
            sites[source] = replace(
                known,
                chain=(*known.chain, candidate.layer),
                readers=(*known.readers, *_path(here, source, node)),
            )
            continue
        site, reason = _before(here, candidate, source)
        if site is None:
            skipped.append(Skipped(candidate.layer, str(reason)))
        else:
            sites[source] = site
    return list(sites.values()), skipped


def _is_output_layer(flow: Flow, layer: fx.Node) -> bool:
    if flow.channel_axis(layer) is None:
        return any(reader.op == "output" for reader in _downstream(flow, layer))
    end = flow.chain(layer)[-1]
    axis = flow.channel_axis(end)
    reason = flow.fate(end, axis, {}).reason if axis is not None else None
    return (reason or "").startswith("output")


def _downstream(flow: Flow, node: fx.Node) -> list[fx.Node]:
    """The readers of a node, seen through what only moves or computes on one tensor."""
    found, stack = [], [node]
    while stack:
        for reader in flow.readers(stack.pop()):
            found.append(reader)
            if (
                reader.op != "output"
                and len(flow.data_inputs(reader)) == 1
                and "product" not in flow.facts[reader].kinds
            ):
                stack.append(reader)
    return found


def find_output_layers(region: Region) -> tuple[str, ...]:
    """The convolutions and Linear layers that make the model's output, by name: what `where="head"` puts masks before.

    Args:
        region: Of the model itself, with the regions in it.
    """
    modules = region.traces.module.named_modules(remove_duplicate=False)
    layers = {name for name, module in modules if is_layer(module)}
    names = {node: name for _, node, name in region.calls() if name in layers}
    found = (names[node] for flow, node in Flow(region).walk({}) if node in names and _is_output_layer(flow, node))
    return tuple(dict.fromkeys(found))


def _input_of(flow: Flow, layer: fx.Node) -> fx.Node:
    (source,) = flow.data_inputs(layer)[:1]
    while flow.passes(source) and len(flow.readers(source)) == 1 and source.op != "placeholder":
        source = flow.data_inputs(source)[0]
    return source


def _path(flow: Flow, source: fx.Node, layer: fx.Node) -> tuple[str, ...]:
    """The reader of `source` that leads to the layer."""
    node = layer
    while source not in node.all_input_nodes:
        node = flow.data_inputs(node)[0]
    return (node.name,)


def _before(flow: Flow, candidate: Candidate, source: fx.Node) -> tuple[Site | None, str | None]:
    layout, reason = _layout(flow, source, candidate.layer)
    if layout is None or layout.batch_dim is None:
        return None, reason
    shape = flow.facts[source].value.shape
    channel_dim = len(shape) - rank_of(candidate.module)
    site = Site(
        candidate.layer, candidate.call, source.name, "", shape[channel_dim], 0, layout.batch_dim, channel_dim,
        layout.fold, readers=_path(flow, source, candidate.node), part=flow.region.name, outer=layout.outer,
    )  # fmt: skip
    return site, None


# --- the same sites in the training graph ----------------------------------------------------------------------------


def match_sites(sites: Sequence[Site], traces: Traces) -> dict[str, tuple[fx.Node, tuple[fx.Node, ...]]]:
    """The node and the readers of every site in the training graph, by the name of its mask.

    A node is found again by what it calls and how often that was called before it on the way from its layer.

    Raises:
        SiteError: The graphs differ at a site.
    """
    twins = _twins(traces.eval, traces.train)
    by_name = {node.name: node for node in traces.eval.nodes}
    found = {}
    for site in sites:
        nodes = [twins.get(by_name[name]) for name in (site.node, *site.readers)]
        if any(node is None for node in nodes):
            raise SiteError(
                f"The node '{site.node}' of '{site.layer}' has no equal in the training graph of the model. "
                f"Leave the layer out with exclude=['{site.layer}']."
            )
        end, *readers = [node for node in nodes if node is not None]
        found[site.mask] = (end, tuple(readers))
    return found


def _twins(one: fx.Graph, other: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Pair the nodes of two graphs that call the same, in order, as a diff of two texts pairs lines."""

    def lines(graph: fx.Graph) -> list[tuple[str, Any]]:
        return [(node.op, node.target) for node in graph.nodes]

    a, b = list(one.nodes), list(other.nodes)
    twins = {}
    for block in difflib.SequenceMatcher(None, lines(one), lines(other), autojunk=False).get_matching_blocks():
        for i in range(block.size):
            twins[a[block.a + i]] = b[block.b + i]
    return twins

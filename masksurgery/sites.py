"""Which nodes are masked, and why the others are not."""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Iterable, Sequence

import torch
from torch import fx, nn

from masksurgery.axes import Axis
from masksurgery.flow import Flow
from masksurgery.layout import layout_of
from masksurgery.tracing import CONVOLUTIONS, LAYERS, Traces, is_layer
from masksurgery.types import ConvertConfig, Layout, LayoutError, Selector, Site, SiteError, Skipped


@dataclass(frozen=True)
class Candidate:
    """One call of a layer that may be masked."""

    node: fx.Node
    layer: str
    call: int
    module: nn.Module
    forced: bool = False


@dataclass(frozen=True)
class Selection:
    """The sites, without their masks (`ones` is 0), and the layers without a site."""

    sites: tuple[Site, ...]
    skipped: tuple[Skipped, ...]


def channel_dim_of(root: nn.Module, node: fx.Node) -> int | None:
    """Where the output of a layer has its channels, counted from the end; None if the node is not a layer."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    if module is None or not is_layer(module):
        return None
    return -(len(module.kernel_size) + 1) if isinstance(module, CONVOLUTIONS) else -1


def resolve_types(after: Any, model: nn.Module) -> tuple[type, ...] | None:
    """Layer types, given as types or as names of classes in torch.nn or in the model.

    Raises:
        SiteError: A name is of no such class, or nothing is given.
    """
    if after is None:
        return None
    given = [after] if isinstance(after, (str, type)) else list(after)
    if not given:
        raise SiteError("after=[] selects nothing. Leave it out for every convolution and Linear, or pass types.")
    own = {type(module).__name__: type(module) for module in model.modules()}
    found: list[type] = []
    for kind in given:
        if isinstance(kind, str):
            known = own.get(kind) or getattr(nn, kind, None)
            if not isinstance(known, type):
                close = difflib.get_close_matches(kind, own, n=3, cutoff=0.4)
                hint = f" Did you mean {', '.join(close)}?" if close else f" It has {', '.join(sorted(own))}."
                raise SiteError(f"after names '{kind}', which is no class of torch.nn nor of {type(model).__name__}.{hint}")
            kind = known
        if not isinstance(kind, type) or not issubclass(kind, nn.Module):
            raise SiteError(f"after holds {kind!r}, which is no type of module. Pass types such as nn.Conv2d.")
        found.append(kind)
    return tuple(found)


def find_sites(traces: Traces, flow: Flow, config: ConvertConfig) -> Selection:
    """Choose the sites in the eval graph by the rule that the README states.

    Raises:
        SiteError: Nothing is selected; a layer that `include` names in full cannot be masked.
    """
    candidates, left_out = select_candidates(traces, config)
    find = _find_head if config.where == "head" else _find_all
    sites, skipped = find(flow, candidates)
    if not sites:
        reasons = "; ".join(f"{skip.layer}: {skip.reason}" for skip in skipped[:5])
        raise SiteError(
            f"No layer can be masked. {reasons}. A layer that include=[...] names in full is masked all the same."
        )
    taken = _names_in_use(traces.module)
    named = []
    for site in sites:
        name = site.layer.replace(".", "_") + "_mask" + (f"_{site.call}" if site.call else "")
        named.append(replace(site, mask=unused_name(name, taken)))
    return Selection(tuple(named), (*skipped, *left_out))


# --- the candidates --------------------------------------------------------------------------------------------------


def select_candidates(traces: Traces, config: ConvertConfig) -> tuple[list[Candidate], list[Skipped]]:
    """Calls of the layers that `after`, `include` and `exclude` name, in the order of the graph, and the other layers.

    Raises:
        SiteError: They name nothing.
    """
    root, types = traces.module, config.after or LAYERS
    modules = {name: module for name, module in root.named_modules() if name and isinstance(module, types)}
    if not modules:
        raise _no_such_type(root, config)
    calls = _calls(traces.eval)
    skipped = [Skipped(name, _why_not_called(name, traces)) for name in modules if name not in calls]
    included = [name for name, module in modules.items() if _matches(name, module, config.include)]
    if not included:
        raise _no_such_name(modules, config)
    chosen = [name for name in included if not (config.exclude and _matches(name, modules[name], config.exclude))]
    if not chosen:
        raise SiteError(
            f"exclude={list(config.exclude)!r} leaves nothing of the {len(included)} layers selected "
            f"({', '.join(included[:3])}{', ...' if len(included) > 3 else ''}). Exclude less."
        )
    in_full = {name for name in chosen if name in (config.include or ())}
    for name in sorted(in_full):
        if name not in calls:
            raise SiteError(f"include names '{name}', which cannot be masked: {_why_not_called(name, traces)}.")
    candidates = [
        Candidate(node, name, call, modules[name], name in in_full)
        for node, name, call in _in_order(traces.eval)
        if name in modules and name in chosen
    ]
    why = {name: "not included" if name not in included else "excluded" for name in modules if name not in chosen}
    return candidates, skipped + [Skipped(name, reason) for name, reason in why.items() if name in calls]


def _in_order(graph: fx.Graph) -> Iterable[tuple[fx.Node, str, int]]:
    seen: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "call_module":
            name = str(node.target)
            yield node, name, seen[name]
            seen[name] += 1


def _calls(graph: fx.Graph) -> set[str]:
    return {name for _, name, _ in _in_order(graph)}


def _matches(name: str, module: nn.Module, selectors: Sequence[Selector] | None) -> bool:
    if selectors is None:
        return True
    return any(s(name, module) if callable(s) else fnmatch.fnmatchcase(name, s) for s in selectors)


def _why_not_called(name: str, traces: Traces) -> str:
    if any(node.op == "get_attr" and str(node.target).startswith(f"{name}.") for node in traces.eval.nodes):
        return "no call: the model reads its weights without a call of it"
    parents = [".".join(name.split(".")[:k]) for k in range(1, name.count(".") + 1)]
    called = _calls(traces.eval)
    for parent in parents:
        if parent in called:
            kind = type(traces.module.get_submodule(parent)).__name__
            return f"no call: it is inside {kind} '{parent}', which the trace does not enter"
    if name in _calls(traces.train):
        return "training: it runs in training only"
    return "unused: the model does not call it"


def _no_such_type(root: nn.Module, config: ConvertConfig) -> SiteError:
    counts = Counter(type(module).__name__ for module in root.modules() if not list(module.children()))
    has = ", ".join(f"{name} ({count})" for name, count in counts.most_common(8)) or "no layers"
    if config.after is None:
        return SiteError(f"{type(root).__name__} has no convolution and no Linear. It has {has}. Pass after=(...).")
    names = ", ".join(kind.__name__ for kind in config.after)
    return SiteError(f"after=({names}) selects nothing in {type(root).__name__}. It has {has}. Pass one of these types.")


def _no_such_name(modules: dict[str, nn.Module], config: ConvertConfig) -> SiteError:
    patterns = [s for s in config.include or () if isinstance(s, str)]
    close = [name for s in patterns for name in difflib.get_close_matches(s, modules, n=3, cutoff=0.3)]
    hint = f"Closest names: {', '.join(close)}" if close else f"Names are like {', '.join(list(modules)[:3])}"
    return SiteError(f"include={list(config.include or ())!r} matches none of the {len(modules)} candidate layers. {hint}.")


def _names_in_use(root: nn.Module) -> set[str]:
    return {name for module in (root,) for name in (*module._modules, *module._parameters, *module._buffers, *dir(module))}


def unused_name(name: str, taken: set[str]) -> str:
    """The name, with underscores until nothing in `taken` has it; then `taken` has it."""
    while name in taken:
        name += "_"
    taken.add(name)
    return name


# --- masks after the layers ------------------------------------------------------------------------------------------


def _find_all(flow: Flow, candidates: list[Candidate]) -> tuple[list[Site], list[Skipped]]:
    sites: list[Site] = []
    skipped: list[Skipped] = []
    masked: dict[Axis, str] = {}
    in_chain: dict[fx.Node, str] = {}
    by_node = {candidate.node: candidate for candidate in candidates}
    for candidate in candidates:
        if candidate.node in in_chain and not candidate.forced:
            continue
        chain = flow.chain(candidate.node) if is_layer(candidate.module) else [candidate.node]
        site, region, reason = _judge(flow, candidate, chain[-1], masked)
        if site is None:
            skipped.append(Skipped(candidate.layer, reason))
            continue
        others = [node for node in chain[1:] if node in by_node and is_layer(by_node[node].module)]
        in_chain.update(dict.fromkeys(chain[1:], candidate.layer))
        sites.append(replace(site, chain=tuple(by_node[node].layer for node in others)))
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
    site = Site(candidate.layer, candidate.call, end.name, "", axis.size, 0, layout.batch_dim, channel_dim, layout.fold)
    return site, fate.region, ""


def _layout(flow: Flow, node: fx.Node, layer: str) -> tuple[Layout | None, str | None]:
    fact = flow.facts[node]
    if len(fact.dims) != 1 or not isinstance(fact.value, torch.Tensor):
        return None, f"unknown: '{node.name}' does not return one tensor"
    layout = layout_of(fact.dims[0], node.name)
    if layout.batch_dim is None:
        return None, "no batch: its output has no batch dimension"
    if layout.outer != 1:
        raise LayoutError(
            f"node '{node.name}' after '{layer}' has the whole batch {layout.outer} times in dimension {layout.batch_dim}, "
            f"instead of the rows of each sample together: it cannot be masked. Pass exclude=['{layer}']."
        )
    return layout, None


# --- masks before the output layers ----------------------------------------------------------------------------------


def _find_head(flow: Flow, candidates: list[Candidate]) -> tuple[list[Site], list[Skipped]]:
    sites: dict[fx.Node, Site] = {}
    skipped: list[Skipped] = []
    for candidate in candidates:
        node, axis = flow.chain(candidate.node)[-1], flow.channel_axis(candidate.node)
        end_axis = flow.channel_axis(node)
        reason = flow.fate(node, end_axis, {}).reason if end_axis is not None else None
        single_output = axis is None and any(reader.op == "output" for reader in _downstream(flow, candidate.node))
        if not single_output and not (reason or "").startswith("output"):
            skipped.append(Skipped(candidate.layer, 'not an output layer (where="head" masks only what those read)'))
            continue
        source = _input_of(flow, candidate.node)
        if source in sites:
            known = sites[source]
            sites[source] = replace(
                known, chain=(*known.chain, candidate.layer), readers=(*known.readers, *_path(flow, source, candidate.node))
            )
            continue
        site, reason = _before(flow, candidate, source)
        if site is None:
            skipped.append(Skipped(candidate.layer, str(reason)))
        else:
            sites[source] = site
    return list(sites.values()), skipped


def _downstream(flow: Flow, node: fx.Node) -> list[fx.Node]:
    """The readers of a node, seen through what only moves or computes on one tensor."""
    found, stack = [], [node]
    while stack:
        for reader in flow.readers(stack.pop()):
            found.append(reader)
            if reader.op != "output" and len(flow.data_inputs(reader)) == 1 and "product" not in flow.facts[reader].kinds:
                stack.append(reader)
    return found


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
    channel_dim = len(shape) - (len(candidate.module.kernel_size) + 1 if isinstance(candidate.module, CONVOLUTIONS) else 1)
    readers = _path(flow, source, candidate.node)
    site = Site(
        candidate.layer, candidate.call, source.name, "", shape[channel_dim], 0, layout.batch_dim, channel_dim, layout.fold,
        readers=readers,
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

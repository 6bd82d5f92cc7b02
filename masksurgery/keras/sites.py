"""Which tensors are masked, and why the others are not: the rule of the README, on the graph of a Keras model."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from masksurgery.keras.flow import OUTPUT, Flow
from masksurgery.keras.graph import Graph, Node, Value
from masksurgery.keras.kinds import is_candidate
from masksurgery.types import ConvertConfig, SiteError, Skipped

NOT_OUTPUT = 'not an output layer (where="head" masks only what those read)'


@dataclass(frozen=True)
class Place:
    """Where a mask goes.

    Attributes:
        layer: The candidate that it belongs to (for `where="head"` the output layer that reads the masked tensor).
        value: What is masked.
        chain: Further candidates that the same mask serves.
        readers: What reads the masked tensor; empty for all that reads the value.
    """

    layer: Node
    value: Value
    chain: tuple[str, ...] = ()
    readers: tuple[Node, ...] = ()


def find_places(graph: Graph, config: ConvertConfig, mixed: dict[Node, str]) -> tuple[list[Place], list[Skipped]]:
    """Choose what is masked.

    Args:
        config: `where`, `include` and `exclude` are looked at.
        mixed: Nodes that no mask may reach, each with the reason.
    Raises:
        SiteError: Nothing is selected, or what `include` names in full cannot be masked.
    """
    candidates, skipped = _select(graph, config)
    unsafe = _before(graph, mixed)
    find = _find_head if config.where == "head" else _find_all
    places, more = find(graph, candidates, config, unsafe)
    skipped += more
    if not places:
        reasons = "; ".join(f"{skip.layer}: {skip.reason}" for skip in skipped[:5])
        raise SiteError(f"No layer of '{graph.name}' can be masked. {reasons}.")
    return places, skipped


def _before(graph: Graph, mixed: dict[Node, str]) -> dict[Node, str]:
    """The nodes that a path leads from to one that no mask may reach."""
    unsafe = dict(mixed)
    for node in reversed(graph.nodes):
        for value in node.outputs:
            for reader in value.readers:
                if reader in unsafe:
                    unsafe.setdefault(node, unsafe[reader])
    return unsafe


def _select(graph: Graph, config: ConvertConfig) -> tuple[list[Node], list[Skipped]]:
    names = list(dict.fromkeys(node.name for node in graph.nodes if node.is_layer))
    candidates = [node for node in graph.nodes if is_candidate(node)]
    if not candidates:
        raise SiteError(f"'{graph.name}' has no convolution and no Dense. Its layers are {', '.join(names[:8])}.")
    for argument, patterns in (("include", config.include or ()), ("exclude", config.exclude)):
        for pattern in patterns:
            if not fnmatch.filter(names, str(pattern)):
                close = ", ".join(difflib.get_close_matches(str(pattern), names, n=3, cutoff=0.3)) or names[0]
                raise SiteError(f"{argument}: '{pattern}' matches no layer of '{graph.name}'. Closest names: {close}.")
    included = [node for node in candidates if config.include is None or _matches(node, config.include)]
    if not included:
        listed = ", ".join(dict.fromkeys(node.name for node in candidates[:3]))
        raise SiteError(
            f"include={list(config.include or ())!r} matches none of the {len(candidates)} candidate layers of "
            f"'{graph.name}'. They are convolutions and Dense layers: {listed}, ..."
        )
    chosen = [node for node in included if not _matches(node, config.exclude)]
    if not chosen:
        raise SiteError(
            f"exclude={list(config.exclude)!r} leaves nothing of the {len(included)} layers selected. Exclude less."
        )
    left_out = [Skipped(node.name, "excluded" if node in included else "not included") for node in candidates]
    return chosen, [skip for node, skip in zip(candidates, left_out, strict=True) if node not in chosen]


def _matches(node: Node, patterns: Sequence[object]) -> bool:
    return any(fnmatch.fnmatchcase(node.name, str(pattern)) for pattern in patterns)


def _find_all(
    graph: Graph, candidates: list[Node], config: ConvertConfig, unsafe: dict[Node, str]
) -> tuple[list[Place], list[Skipped]]:
    flow, places, skipped = Flow(graph), [], []
    masked: dict[Value, str] = {}
    in_chain: set[Node] = set()
    for node in candidates:
        forced = node.name in (config.include or ())
        if node in in_chain and not forced:
            continue
        chain = flow.chain(node)
        end = chain[-1].outputs[0]
        fate = flow.fate(end, masked)
        wrong = _forbidden(node, end, unsafe)
        if wrong and forced:
            raise SiteError(f"include names '{node.name}', which cannot be masked: {wrong}.")
        reason = unsafe.get(node)
        if not reason and not forced and (fate.reason or node in flow.gated):
            first = fate.reason if fate.reason and not fate.reason.startswith("masked") else None
            reason = first or flow.gated.get(node) or fate.reason
        reason = reason or wrong
        if reason or (end in masked and masked[end] == node.name):
            skipped.append(Skipped(node.name, reason or "masked: at the same place"))
            continue
        in_chain.update(chain[1:])
        others = tuple(other.name for other in chain[1:] if is_candidate(other))
        places.append(Place(node, end, others))
        masked.update(dict.fromkeys(fate.region | {end}, node.name))
    return places, skipped


def _find_head(
    graph: Graph, candidates: list[Node], config: ConvertConfig, unsafe: dict[Node, str]
) -> tuple[list[Place], list[Skipped]]:
    flow, skipped = Flow(graph), []
    places: dict[Value, Place] = {}
    for node in candidates:
        reason = (flow.fate(flow.chain(node)[-1].outputs[0], {}).reason or "").startswith("output")
        if not reason:
            skipped.append(Skipped(node.name, NOT_OUTPUT))
            continue
        value, reader = node.inputs[0], node
        while value.node and flow.passes(value.node) and len(value.readers) == 1 and len(value.node.inputs) == 1:
            reader = value.node
            (value,) = value.node.inputs
        forbidden = _forbidden(node, value, unsafe)
        if forbidden:
            skipped.append(Skipped(node.name, forbidden))
        elif value in places:
            known = places[value]
            places[value] = Place(known.layer, value, (*known.chain, node.name), (*known.readers, reader))
        else:
            places[value] = Place(node, value, (), (reader,))
    return list(places.values()), skipped


def _forbidden(node: Node, value: Value, unsafe: dict[Node, str]) -> str | None:
    """Why a mask on a value would be wrong, and not only useless."""
    if node in unsafe:
        return unsafe[node]
    if len(value.shape) < 2 or value.shape[-1] is None or value.shape[-1] == 1:
        return "single: it has one channel, or a number of them that is not known"
    return None


def output_layers(graph: Graph) -> tuple[str, ...]:
    """The candidates that make the model's output, by name."""
    flow = Flow(graph)
    ends = ((node, flow.chain(node)[-1].outputs[0]) for node in graph.nodes if is_candidate(node))
    return tuple(dict.fromkeys(node.name for node, end in ends if flow.fate(end, {}).reason == OUTPUT))

"""What becomes of the channels of a call: its chain, where a mask on it would go, what only multiplies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from masksurgery.keras.graph import Graph, Node, Value
from masksurgery.keras.kinds import ATTENTION, activation_kind, base_name, kind_of, scales_channels

COMPUTING = ("depthwise", "norm", "pointwise", "gate", "softmax")
CARRYING = (*COMPUTING, "pass", "pool", "move")
"""What leaves each channel where it is, in the last dimension, and reads no other branch."""
GATE = "gate: it only scales another branch"
WEIGHTS = "gate: it only makes attention weights (query or key of an attention)"
OUTPUT = "output layer: its channels reach the model's output with no convolution or Dense in between"


@dataclass(frozen=True)
class Fate:
    """Where channels go. `reason` says why they cannot be masked; `region` is what a mask would reach."""

    reason: str | None
    region: frozenset[Value]


class Flow:
    """Questions about the graph of a model."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.kinds = {node: kind_of(node) for node in graph.nodes}
        self.gated = self._find_gated()

    def chain(self, layer: Node) -> list[Node]:
        """The layer, and what computes on its channels alone and follows it without another reader, in order."""
        computing, value = [layer], layer.outputs[0]
        while len(value.readers) == 1 and value is not self.graph.output:
            (node,) = value.readers
            if self.kinds[node] not in CARRYING or len(node.inputs) != 1 or len(node.outputs) != 1:
                break
            if self.kinds[node] == "pointwise" and not node.is_layer and not scales_channels(node):
                break
            if self.kinds[node] in COMPUTING:
                computing.append(node)
            (value,) = node.outputs
        return computing

    def passes(self, node: Node) -> bool:
        """It computes nothing where the model does not train."""
        return self.kinds[node] == "pass"

    # --- where a mask would go ---------------------------------------------------------------------------------------

    def fate(self, value: Value, masked: Mapping[Value, str]) -> Fate:
        """Follow the channels of a value until a layer mixes them or another branch is added.

        Args:
            masked: What earlier masks reach, and the layer of each.
        """
        if value in masked:
            return Fate(f"masked: it is channel-wise since the mask of '{masked[value]}'", frozenset())
        reasons = [OUTPUT] if self._only_reaches_output(value) else []
        region, stack = {value}, [value]
        while stack:
            part = stack.pop()
            if part is self.graph.output:
                reasons.append(OUTPUT)
            for reader in part.readers:
                kind = self.kinds[reader]
                if kind == "split":
                    reasons.append(f"reshaped: '{reader.name}' splits its channels before the next layer mixes them")
                elif kind == "unknown":
                    reasons.append(f"unknown: no rule follows channels through '{reader.name}' ({_type(reader)})")
                elif kind == "mul":
                    others = [masked[v] for v in reader.inputs if v in masked and v not in region]
                    reasons.extend(f"masked: it is multiplied by the masked output of '{layer}'" for layer in others)
                if kind not in ("split", "unknown", "mix", "add"):
                    for child in reader.outputs:
                        if child not in region:
                            region.add(child)
                            stack.append(child)
        return Fate(min(reasons, key=_rank) if reasons else None, frozenset(region))

    def _only_reaches_output(self, value: Value) -> bool:
        """All that becomes of the channels is output, by sums of heads alone: two whose logits are added.

        A residual branch is added to a stream of such sums instead, and what it leaves out is no constant.
        """
        stack, seen = [value], {value}
        while stack:
            part = stack.pop()
            for reader in part.readers:
                kind = self.kinds[reader]
                if kind in ("mix", "split", "unknown"):
                    return False
                if kind == "add" and any(self._is_stream(v) for v in reader.inputs if v not in seen):
                    return False
                for child in reader.outputs:
                    if child not in seen:
                        seen.add(child)
                        stack.append(child)
        return True

    def _is_stream(self, value: Value) -> bool:
        """A sum of branches, with nothing but norms and activations since: what residual blocks add to."""
        while value.node is not None and self.kinds[value.node] != "add":
            if self.kinds[value.node] not in CARRYING or len(value.node.inputs) != 1:
                return False
            (value,) = value.node.inputs
        return value.node is not None

    # --- gates and attention weights ---------------------------------------------------------------------------------

    def _find_gated(self) -> dict[Node, str]:
        """The nodes from which every path to the output crosses a gate or the query or key of an attention."""
        gated: dict[Node, str] = {}
        for node in reversed(self.graph.nodes):
            if self._own_gate(node) and self._only_multiplies(node):
                gated[node] = WEIGHTS if self._own_gate(node) == "softmax" else GATE
                continue
            readers = [(value, reader) for value in node.outputs for reader in value.readers]
            reasons = [self._crossing(value, reader) or gated.get(reader) for value, reader in readers]
            at_output = self.graph.output in node.outputs
            if reasons and all(reasons) and not at_output:
                gated[node] = next(reason for reason in reasons if reason)
        return gated

    def _own_gate(self, node: Node) -> str | None:
        """The gate that a call ends in: itself, or the activation that its layer applies."""
        kind = self.kinds[node]
        if kind in ("mix", "depthwise") and node.is_layer:
            kind = activation_kind(node.op)
        return kind if kind in ("gate", "softmax") else None

    def _crossing(self, value: Value, reader: Node) -> str | None:
        if base_name(reader.op) in ATTENTION and reader.is_layer:
            return None if value in _attended(reader) else WEIGHTS
        gate = self._own_gate(reader)
        if gate is None or not self._only_multiplies(reader):
            return None
        return WEIGHTS if gate == "softmax" else GATE

    def _only_multiplies(self, node: Node) -> bool:
        """All that a node becomes is multiplied with something else."""
        values = node.outputs
        readers = [reader for value in values for reader in value.readers]
        return bool(readers) and self.graph.output not in values and all(map(self._multiplies, readers))

    def _multiplies(self, node: Node) -> bool:
        if len(set(node.inputs)) > 1:
            return self.kinds[node] == "mul"
        through = ("pass", "pool", "move", "join", "split", "pointwise")
        return self.kinds[node] in through and self._only_multiplies(node)


def _attended(node: Node) -> list[Value]:
    """What an attention takes its values from, or takes in a role that is not known."""
    if base_name(node.op) in ("Attention", "AdditiveAttention"):
        inputs = node.args[0] if node.args else node.kwargs.get("inputs", ())
        return [inputs[1]] if isinstance(inputs, (list, tuple)) and len(inputs) > 1 else node.inputs
    roles = dict(zip(("query", "value", "key"), node.args, strict=False)) | dict(node.kwargs)
    weighing = [roles.get(role) for role in ("query", "key")]
    return [v for v in node.inputs if v is roles.get("value") or v not in weighing]


def _type(node: Node) -> str:
    return type(node.op).__name__


def _rank(reason: str) -> int:
    """Which of several reasons to give: the one that would make a mask wrong before the one that makes it useless."""
    order = ("output", "masked", "reshaped", "unknown")
    return next(i for i, word in enumerate(order) if reason.startswith(word))

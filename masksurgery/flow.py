"""What becomes of the channels of a node: its chain, where a mask on it would go, what it is multiplied with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import fx, nn

from masksurgery.axes import Axis
from masksurgery.layout import Facts
from masksurgery.regions import Region

COMPUTING = frozenset({"pointwise", "mul", "norm", "softmax", "gate", "mix"})
ATTENTION = "gate: it only makes attention weights (query or key of an attention product)"
GRID = "gate: it only says where another branch is read"
OUTPUT = "output layer: its channels reach the model's output with no convolution or Linear in between"


@dataclass(frozen=True)
class Fate:
    """Where the channels of a node go. `reason` says why they cannot be masked; `region` is what a mask would reach."""

    reason: str | None
    region: frozenset[Axis]


class Flow:
    """Questions about the dataflow of one traced graph (in eval mode, where dropout computes nothing)."""

    def __init__(self, region: Region, owner: tuple[Flow, fx.Node] | None = None) -> None:
        """Follow what flows in a region.

        Args:
            region: With the graph, and what is known of it.
            owner: The flow and the node of the opaque call that the region is a part of.
        """
        self.region, self.owner = region, owner
        self.graph, self.facts, self.root = region.traces.eval, region.facts, region.traces.module
        self.gated = self._find_gated()

    def walk(self, masked: dict[Axis, str]) -> Iterator[tuple[Flow, fx.Node]]:
        """The nodes of this region and of those in it, in the order in which they run, each with its flow.

        Args:
            masked: What masks reach. Where a part begins it learns which axes of its inputs are among that.
        """
        for node in self.graph.nodes:
            if node.op == "placeholder":
                self._enter(node, masked)
            yield self, node
            for part in self.region.parts.get(node, ()):
                yield from Flow(part, (self, node)).walk(masked)

    def _enter(self, placeholder: fx.Node, masked: dict[Axis, str]) -> None:
        """Note what the masks before this region reach in it."""
        for axis in [axis for dims in self.facts[placeholder].dims for dim in dims for axis in dim]:
            before = axis.parents & masked.keys()
            if before:
                layer = masked[next(iter(before))]
                masked.update(dict.fromkeys(self.fate(placeholder, axis, {}).region, layer))

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """The users of its values; reading a size is none."""
        return [user for user in node.users if user.op == "output" or self.facts[user].has_tensor]

    def data_inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that are computed from the model's inputs: no parameters, no sizes."""
        return [source for source in node.all_input_nodes if self.facts[source].data and self.facts[source].has_tensor]

    def channel_axis(self, node: fx.Node) -> Axis | None:
        """The channels of its only tensor, where one dimension is just them."""
        fact = self.facts[node]
        if len(fact.dims) != 1:
            return None
        found = [dim[0] for dim in fact.dims[0] if len(dim) == 1 and dim[0].channel]
        return found[-1] if found else None

    def passes(self, node: fx.Node) -> bool:
        """It computes nothing: Identity, or dropout in eval."""
        return not self.facts[node].kinds and not self.facts[node].unknown and len(self.data_inputs(node)) == 1

    # --- the chain ---------------------------------------------------------------------------------------------------

    def chain(self, layer: fx.Node) -> list[fx.Node]:
        """The layer, and what computes on its channels alone and follows it without another user, in order."""
        computing, node, axis = [layer], layer, self.channel_axis(layer)
        while axis is not None:
            readers = self.readers(node)
            if len(readers) != 1 or readers[0].op == "output":
                break
            node = readers[0]
            axis = self._carried(node, axis)
            if axis is not None and COMPUTING & set(self.facts[node].kinds):
                computing.append(node)
        return computing

    def _carried(self, node: fx.Node, axis: Axis) -> Axis | None:
        """The same axis in the output of a node that belongs to a chain; None if the chain ends before the node."""
        fact = self.facts[node]
        children = fact.children.get(axis, set())
        if len(self.data_inputs(node)) != 1 or len(fact.dims) != 1 or len(children) != 1:
            return None
        if fact.unknown or not fact.has_batch or {"product", "make"} & set(fact.kinds):
            return None
        (child,) = children
        alone = [d for d, dim in enumerate(fact.dims[0]) if dim == (child,)]
        widened = child.size != axis.size and "mix" not in fact.kinds  # a depthwise convolution may make more of them
        if not alone or widened or not self._scales_channels(node, alone[0]):
            return None
        return child

    def _scales_channels(self, node: fx.Node, channel_dim: int) -> bool:
        """Its parameters, if it is arithmetic, are one number or one number a channel (no position embedding)."""
        fact = self.facts[node]
        if not {"pointwise", "mul"} & set(fact.kinds) or "norm" in fact.kinds:
            return True
        rank = fact.value.dim() if hasattr(fact.value, "dim") else 0
        for source in node.all_input_nodes:
            if self.facts[source].data or not self.facts[source].has_tensor:
                continue
            shape = self.facts[source].value.shape
            if any(size != 1 and d + rank - len(shape) != channel_dim for d, size in enumerate(shape)):
                return False
        return True

    # --- where a mask would go ---------------------------------------------------------------------------------------

    def fate(self, node: fx.Node, axis: Axis, masked: Mapping[Axis, str]) -> Fate:
        """Follow the channels of a node until a layer mixes them or another branch is added.

        Args:
            node: The end of a chain.
            axis: Its channels.
            masked: What earlier masks reach, and the layer of each.
        """
        if axis in masked:
            return Fate(f"masked: it is channel-wise since the mask of '{masked[axis]}'", frozenset())
        reasons: list[str] = []
        region, stack = {axis}, [(self, node, axis)]
        products: list[Axis] = []
        if self._only_reaches_output(node, axis):
            reasons.append(OUTPUT)
        while stack:
            flow, source, part = stack.pop()
            for reader in flow.readers(source):
                if reader.op == "output":
                    if flow.owner is None:
                        reasons.append(OUTPUT)
                        continue
                    left, split = flow._leave(part)
                    region |= left
                    reasons.extend(split)
                    reader, (flow_after, children) = flow.owner[1], (flow.owner[0], flow._after(left))
                else:
                    flow_after, children = flow, flow.facts[reader].children.get(part, set())
                    reasons.extend(flow._faults(reader, part, children))
                    if flow._adds_branch(reader):
                        continue
                    if "mul" in flow.facts[reader].kinds and len(flow.data_inputs(reader)) > 1:
                        products.extend(children)
                for child in children - region:
                    region.add(child)
                    stack.append((flow_after, reader, child))
        for product in products:
            layers = sorted(masked[other] for other in product.parents - region if other in masked)
            reasons.extend(f"masked: it is multiplied by the masked output of '{layer}'" for layer in layers)
        return Fate(min(reasons, key=_rank) if reasons else None, frozenset(region))

    def _only_reaches_output(self, node: fx.Node, axis: Axis) -> bool:
        """All that becomes of the channels is output, by sums of heads alone: two whose logits are added.

        A residual branch is added to a stream of such sums instead, and what it leaves out is no constant.
        """
        if self.owner is not None:
            return False
        stack, seen = [(node, axis)], {axis}
        while stack:
            source, part = stack.pop()
            for reader in self.readers(source):
                if reader.op == "output":
                    continue
                fact = self.facts[reader]
                children = fact.children.get(part, set())
                if not children or "sum" in fact.kinds:  # an encoder layer adds to the channels what it has mixed
                    return False
                others = [other for other in self.data_inputs(reader) if other is not source]
                if self._adds_branch(reader) and any(map(self._is_stream, others)):
                    return False
                stack.extend((reader, child) for child in children - seen)
                seen |= children
        return True

    def _is_stream(self, node: fx.Node) -> bool:
        """A sum of branches, with nothing but norms and activations since: what residual blocks add to."""
        while not self._adds_branch(node):
            sources = self.data_inputs(node)
            if len(sources) != 1 or {"mix", "product"} & set(self.facts[node].kinds):
                return False
            (node,) = sources
        return True

    def _faults(self, reader: fx.Node, axis: Axis, children: set[Axis]) -> list[str]:
        """Why a reader forbids a mask on an axis that it reads."""
        fact, faults = self.facts[reader], []
        if axis in fact.split:
            faults.append(f"reshaped: '{reader.name}' splits its channels before the next layer mixes them")
        if fact.unknown and not children:
            faults.append(f"unknown: no rule for {', '.join(fact.unknown)} in '{reader.name}'")
        return faults

    def _leave(self, axis: Axis) -> tuple[set[Axis], list[str]]:
        """The axes that an axis of the output has in the region around this one, and why they cannot be masked."""
        assert self.owner is not None
        output = next(iter(reversed(self.graph.nodes)))
        ends = self.facts[output].children.get(axis, set())
        left: set[Axis] = set()
        for exits in self.region.exits:
            for inner, outer in zip(self.facts[output].dims, exits, strict=False):
                for dim, outside in zip(inner, outer, strict=False):
                    if ends & set(dim):
                        left.update(outside)
        flow, node = self.owner
        faults = [fault for axis in left for fault in flow._faults(node, axis, {axis})]
        return left, faults

    def _after(self, left: set[Axis]) -> set[Axis]:
        """What the opaque call around this region returns of axes that left it."""
        assert self.owner is not None
        flow, node = self.owner
        return set().union(*(flow.facts[node].children.get(axis, set()) for axis in left))

    def _adds_branch(self, node: fx.Node) -> bool:
        kinds = set(self.facts[node].kinds)
        return "sum" in kinds or ("pointwise" in kinds and "mul" not in kinds and len(self.data_inputs(node)) > 1)

    # --- gates and attention weights ---------------------------------------------------------------------------------

    def _find_gated(self) -> dict[fx.Node, str]:
        """The nodes from which every path to the output crosses a gate or the query or key of an attention product."""
        gated: dict[fx.Node, str] = {}
        for node in reversed(self.graph.nodes):
            if node.op == "output":
                continue
            reasons = [self._crossing(node, reader) or gated.get(reader) for reader in self.readers(node)]
            if not reasons:
                gated[node] = "unused: its output is not used"
            elif self._makes_weights(node):
                gated[node] = ATTENTION
            elif all(reasons):
                gated[node] = next(reason for reason in reasons if reason)
        return gated

    def _crossing(self, node: fx.Node, reader: fx.Node) -> str | None:
        if reader.op == "output":
            return None
        if self.is_attention(reader):
            names = ("query", "key", "value")
            roles = {**dict(zip(names, reader.args, strict=False)), **reader.kwargs}
            return ATTENTION if roles.get("value") is not node else None
        if reader.target is F.grid_sample:
            return GRID if node in (*reader.args[1:2], reader.kwargs.get("grid")) else None
        kind = self.gate_kind(self.facts[reader], reader)
        if kind is None or not self._only_multiplies(reader, kind == "softmax"):
            return None
        return "gate: it only scales another branch" if kind == "gate" else ATTENTION

    def _makes_weights(self, node: fx.Node) -> bool:
        """It mixes the weights that a softmax made, before they multiply anything (talking heads)."""
        if not {"mix", "product"} & set(self.facts[node].kinds) or not self._only_multiplies(node, True):
            return False
        source: fx.Node = node
        while len(self.data_inputs(source)) == 1:
            (source,) = self.data_inputs(source)
            if self.gate_kind(self.facts[source], source) == "softmax":
                return True
            if not set(self.facts[source].kinds) <= {"move", "pointwise", "mix", "product"}:
                return False
        return False

    def is_attention(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.root.get_submodule(str(node.target)), nn.MultiheadAttention)
        return node.op == "call_function" and node.target is F.scaled_dot_product_attention

    def gate_kind(self, fact: Facts, node: fx.Node) -> str | None:
        computing = [kind for kind in fact.kinds if kind in COMPUTING]
        if computing and computing[-1] in ("gate", "softmax"):
            return computing[-1]
        name = str(node.target)
        if node.op == "call_module":
            name = type(self.root.get_submodule(name)).__name__
        named = "sigmoid" in name.lower() and "logsigmoid" not in name.lower().replace("_", "")
        return "gate" if named and computing and len(self.data_inputs(node)) == 1 else None

    def _only_multiplies(self, node: fx.Node, through_layers: bool) -> bool:
        """All that a node becomes is multiplied with something else; talking heads mix a softmax by layers before."""
        readers = self.readers(node)
        return bool(readers) and all(self._multiplies(reader, through_layers) for reader in readers)

    def _multiplies(self, node: fx.Node, through_layers: bool) -> bool:
        if node.op == "output":
            return False
        kinds = set(self.facts[node].kinds)
        if len(self.data_inputs(node)) > 1:
            return bool(kinds & {"mul", "product"})
        through = kinds <= {"move", "pool", "pointwise", "mul"} or (
            through_layers and kinds <= {"move", "mix", "product"}
        )
        return through and not self.facts[node].unknown and self._only_multiplies(node, through_layers)


def _rank(reason: str) -> int:
    """Which of several reasons to give: the one that would make a mask wrong before the one that makes it useless."""
    order = ("output", "masked", "reshaped", "unknown")
    return next(i for i, word in enumerate(order) if reason.startswith(word))

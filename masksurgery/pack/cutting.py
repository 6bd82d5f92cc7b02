"""The tensors of one member in a packed graph, cut to the channels that an operation asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from masksurgery.pack.families import Operation, shape_of
from masksurgery.pack.families import Place as TensorPlace
from masksurgery.pack.liveness import find_keep, find_needed
from masksurgery.pack.member import Member
from masksurgery.pack.moves import Variant
from masksurgery.pack.network import Network
from masksurgery.pack.parts import Place, Select
from masksurgery.pack.patterns import Known
from masksurgery.pack.sliced import Sliced, shared_module
from masksurgery.pack.widening import Widening, widen

Keep = Mapping[int, Tensor]
"""For each dimension that is cut the indices that are kept, in the order that they stand in."""


class Cutter:
    """What is kept of the tensors of a member, and how they come to have other channels."""

    def __init__(
        self, member: Member, sliced: Sliced, shared: dict[fx.Node, Any], dense: bool, prefix: str | None = None
    ) -> None:
        self.member, self.sliced, self.shared = member, sliced, shared
        self.net: Network = member.net
        self.prefix = f"members.{member.index}." if prefix is None else prefix
        self.is_alone = prefix is not None
        """Its weights are not in one graph with those of other members."""
        self.needed = find_needed(member)
        self.keep = find_keep(member, self.needed)
        self.widening = widen(member, self.keep, every_sum=self.is_alone) if dense else Widening()
        self.keep.update({(node, 0): keep for node, keep in self.widening.keep.items()})
        self.env: dict[fx.Node, Any] = {}
        self.cut: dict[Any, fx.Node] = {}

    def kept(self, place: TensorPlace) -> Keep:
        return self.keep.get(place, {}) if place[0] in self.net.dependent else {}

    def value(self, node: fx.Node) -> Any:
        """A node as it is built."""
        return self.env[node] if node in self.net.dependent else self.shared[node]

    def whole(self, node: fx.Node) -> Any:
        """A node with all of its channels."""
        return self.get((node, 0), {}) if isinstance(self.net.facts[node].value, Tensor) else self.value(node)

    def get(self, place: TensorPlace, keep: Keep, have: Keep | None = None, value: Any = None) -> fx.Node:
        """A tensor cut to other channels than those that it has."""
        have = self.kept(place) if have is None else have
        found: fx.Node = self.value(place[0]) if value is None else value
        known, shape = self.member.of(place), shape_of(self.net, place)
        for d in sorted({*have, *keep}):
            one, other = have.get(d), keep.get(d)
            if same_index(one, other):
                continue
            own = torch.arange(shape[d]) if one is None else one
            wanted = torch.arange(shape[d]) if other is None else other
            found = self._recut(found, d, own, wanted, known, place)
        return found

    def _recut(self, x: fx.Node, d: int, own: Tensor, wanted: Tensor, known: Known, place: TensorPlace) -> fx.Node:
        key = (x, d, tuple(wanted.tolist()))
        if key in self.cut:
            return self.cut[key]
        name = f"{self.prefix}{place[0].name}"
        device = self._device()
        common = torch.isin(wanted, own)
        found = x
        inside = wanted[common]
        if not torch.equal(inside, own):
            found = self.sliced.call(f"{name}_select", Select(d, positions(own, inside).to(device)), found)
        if len(inside) != len(wanted):
            fill = self._fill(known, d, wanted, common)
            at = common.nonzero().reshape(-1).to(device)
            found = self.sliced.call(f"{name}_place", Place(d, at, fill.to(device)), found)
        self.cut[key] = found
        return found

    def _fill(self, known: Known, d: int, wanted: Tensor, common: Tensor) -> Tensor:
        """The constants of the channels that are put back."""
        if known.value.numel() != known.value.shape[d]:  # what is left out along this dimension is zero
            return torch.zeros(len(wanted), dtype=self._dtype())
        value = known.value.reshape(-1).expand(int(wanted.max()) + 1 if known.value.numel() == 1 else -1)
        return torch.where(common, 0.0, value[wanted]).to(self._dtype())

    def _device(self) -> torch.device:
        return next((p.device for p in self.net.root.parameters()), torch.device("cpu"))

    def _dtype(self) -> torch.dtype:
        found = (p.dtype for p in self.net.root.parameters() if p.is_floating_point())
        return next(found, torch.get_default_dtype())

    def constant(self, node: fx.Node, keep: Keep) -> fx.Node:
        """A parameter or buffer, cut."""
        if not keep:
            return cast(fx.Node, self.value(node))
        value = self.net.constant(node)
        assert value is not None
        for d, index in keep.items():
            value = value.index_select(d, index.to(value.device))
        return self.sliced.constant(f"{self.prefix}{node.target}", value.clone())

    def copy(self, operation: Operation, values: Mapping[fx.Node, Any], variant: Variant | None = None) -> fx.Node:
        """The node itself on other tensors; what another member has done to the same tensors is not done again."""
        node = operation.node

        def value(source: fx.Node) -> Any:
            return values[source] if source in values else self.value(source)

        run: Any = node if variant is None else variant
        args, kwargs = fx.map_arg((tuple(run.args), dict(run.kwargs)), value)
        module = operation.module if operation.module is not None else self.net.module(node)
        if operation.module is not None:
            args, kwargs = tuple(values[place[0]] for place in operation.inputs), {}
        target = run.target
        if module is None and run.op == "call_method" and target == "view" and not isinstance(args[1], torch.dtype):
            target = "reshape"  # what is cut may lie in memory otherwise
        key = (node, repr((args, kwargs)))
        if key not in self.sliced.done:
            target = target if module is None else self.module(node, module)
            op = run.op if module is None else "call_module"
            self.sliced.done[key] = self.sliced.graph.create_node(op, target, args, kwargs, node.name)
        return self.sliced.done[key]

    def module(self, node: fx.Node, module: nn.Module) -> str:
        """The name of a module that all members share."""
        return shared_module(self.sliced, node, module)

    def aligned(self, place: TensorPlace, keep: Keep, rank: int) -> dict[int, Tensor]:
        """What is kept of a tensor that is broadcast to one of `rank` dimensions."""
        shape = shape_of(self.net, place)
        missing = rank - len(shape)
        return {d - missing: index for d, index in keep.items() if d >= missing and shape[d - missing] > 1}


def same_index(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def positions(own: Tensor, wanted: Tensor) -> Tensor:
    """Where indices stand among others, which hold all of them."""
    order = own.argsort()
    return order[torch.searchsorted(own[order], wanted)]

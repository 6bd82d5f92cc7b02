"""Which sites stand in one residual stream, found on the graph: their channels are the same ones, index by index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from masksurgery.axes import Axis
from masksurgery.regions import Region
from masksurgery.types import Site


def tie_streams(region: Region, sites: Sequence[Site]) -> list[Site]:
    """Note for each site the stream that it shares with others.

    Two sites are in one stream if a sum brings their channels together, directly or over further sums, with only
    channel-wise operators (norms, activations, depthwise convolutions, gates) on the way. A concatenation makes other
    channels of them, so sites before it are left alone.

    Args:
        region: Of the model itself, with the regions in it.
        sites: With the names of their masks, in the order of the graph.
    Returns:
        The sites; of two and more in one stream `stream` is the name of the first one's mask.
    """
    channels = _SameChannels(region)
    streams: dict[Axis, list[Site]] = {}
    for site in sites:
        axis = channels.of(site)
        if axis is not None:
            streams.setdefault(axis, []).append(site)
    first = {site.mask: tied[0].mask for tied in streams.values() if len(tied) > 1 for site in tied}
    return [replace(site, stream=first.get(site.mask, "")) for site in sites]


class _SameChannels:
    """The axes of all nodes as disjoint sets: two are in one if an operator makes one of the other, index by index."""

    def __init__(self, region: Region) -> None:
        self._parent: dict[Axis, Axis] = {}
        self._parts = {part.name: part for part in region.walk()}
        for part in self._parts.values():
            for fact in part.facts.values():
                for axis, children in fact.children.items():
                    for child in children:
                        self._join(axis, child)
            self._join_exits(part)

    def of(self, site: Site) -> Axis | None:
        """What stands for the channels of a site; None if they share their dimension with other axes."""
        part = self._parts[site.part]
        (fact,) = (fact for node, fact in part.facts.items() if node.name == site.node)
        dim = fact.dims[0][site.channel_dim]
        return self._find(dim[0]) if len(dim) == 1 else None

    def _join_exits(self, part: Region) -> None:
        """What a part of an opaque module returns has axes of its own in the region around it."""
        output = part.facts[next(iter(reversed(part.traces.eval.nodes)))]
        for exits in part.exits:
            for inner, outer in zip(output.dims, exits, strict=False):
                for dim, outside in zip(inner, outer, strict=False):
                    for axis, other in zip(dim, outside, strict=False):
                        self._join(axis, other)

    def _find(self, axis: Axis) -> Axis:
        while axis in self._parent:
            axis = self._parent[axis]
        return axis

    def _join(self, one: Axis, other: Axis) -> None:
        one, other = self._find(one), self._find(other)
        if one is not other and one.size == other.size:  # a concatenation is longer than what it is made of
            self._parent[other] = one

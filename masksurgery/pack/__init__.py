"""Packing: the members of a converted model as the small networks that they are."""

from masksurgery.pack.packed import Barrier, PackedModel

__all__ = ["Barrier", "PackedModel"]

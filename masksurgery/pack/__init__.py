"""Packing: the members of a converted model as the small networks that they are."""

from masksurgery.pack.building import pack
from masksurgery.pack.packed import PackedModel
from masksurgery.pack.sliced import Barrier

__all__ = ["Barrier", "PackedModel", "pack"]

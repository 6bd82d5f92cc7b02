"""The hazard nets: small networks, each named after the hazard it holds, with the answers worked out by hand.

`NETS` maps a name to its network and the sites that conversion has to find there; `REFUSED` holds the networks that
it has to refuse. Seed torch before `build` and `inputs`, and `randomise` the network before a check of values.
"""

from __future__ import annotations

# Each of these registers its networks.
import nets_attention  # noqa: F401
import nets_conv  # noqa: F401
import nets_ends  # noqa: F401
import nets_gates  # noqa: F401
import nets_libraries  # noqa: F401
import nets_strange  # noqa: F401
import nets_tokens  # noqa: F401
import nets_zoo  # noqa: F401
from nets_base import NETS, REFUSED, Net, RefusedNet, randomise

__all__ = ["NETS", "REFUSED", "Net", "RefusedNet", "randomise"]

"""The four networks that must be right, and other routes to what a converted model computes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from masksurgery import VerificationError, verify
from masksurgery.model import ConvertedModel
from nets import randomise

# Name, arguments that make it small, and image size: float64 at 224 pixels takes seconds a forward.
FOUR = {
    "resnet50": ({}, 64),
    "mobilenetv3_small_100": ({}, 64),
    "vit_tiny_patch16_224": ({"img_size": 64}, 64),
    "swin_tiny_patch4_window7_224": ({"img_size": 56}, 56),
}


def small(name: str, *, drop: bool = False, seed: int = 0) -> nn.Module:
    """One of the four, in float64 and eval, parameters and BatchNorm statistics randomised.

    Args:
        name: A key of FOUR.
        drop: With dropout and stochastic depth.
        seed: For the parameters.
    """
    kwargs = FOUR[name][0] | ({"drop_rate": 0.3, "drop_path_rate": 0.3} if drop else {})
    return randomise(timm.create_model(name, num_classes=10, **kwargs), seed).double().eval()


def images(name: str, batch: int, seed: int = 0) -> Tensor:
    size = FOUR[name][1]
    return torch.randn(batch, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def input_repeat(model: ConvertedModel, inputs: tuple) -> Any:
    """The members' outputs [n*b, ...] with the inputs repeated at the very beginning, nothing later.

    The root assigns a member to each row, as in training; everything else stays in eval.
    """
    n, root = model.surgery.n, model.members_module
    root.train()
    root.fixed = torch.arange(n).repeat_interleave(inputs[0].shape[0])
    unbatched = model.settings.unbatched
    names = [node.target for node in model.graph.nodes if node.op == "placeholder"]
    try:
        repeated = [x if name in unbatched else torch.cat([x] * n) for name, x in zip(names, inputs, strict=True)]
        with torch.no_grad():
            return model(*repeated)
    finally:
        root.eval()
        root.fixed = None


def by_member(rows: Tensor, n: int, batch_dim: int = 0) -> Tensor:
    """[n*b, ...] to [b, n, ...]."""
    return rows.unflatten(batch_dim, (n, -1)).movedim((batch_dim + 1, batch_dim), (0, 1))


def flips_found(model: ConvertedModel, base: nn.Module, mask: str, inputs: tuple) -> bool:
    """Flip one bit of a mask: `verify` has to fail. Returns whether it failed by the outputs of the members.

    The channels with the largest activations are tried first: a ReLU leaves some dead, there or in a later sum, and
    their bits change no output.
    """
    masks = model.get_submodule(mask).masks
    for channel in _largest_channels(model, mask, inputs)[:8]:
        masks[1, channel] = ~masks[1, channel]
        with pytest.raises(
            VerificationError, match=f"these masks are not those the conversion decided: {mask}"
        ) as error:
            verify(model, base, *inputs)
        masks[1, channel] = ~masks[1, channel]
        if "more than the tolerance" in str(error.value):
            return True
    return False


def _largest_channels(model: ConvertedModel, mask: str, inputs: tuple) -> list[int]:
    seen: list[Tensor] = []
    module = model.get_submodule(mask)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(*inputs)
    handle.remove()
    others = [d for d in range(seen[0].dim()) if d != module.channel_dim % seen[0].dim()]
    return seen[0].abs().sum(others).argsort(descending=True).tolist()

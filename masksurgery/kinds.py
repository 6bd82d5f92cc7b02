"""Kinds of modules: layers, norms, and what reads the mode."""

from __future__ import annotations

from collections.abc import Sequence
from types import CodeType
from typing import cast

from torch import fx, nn

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.modules.conv._ConvNd,)
LAYERS: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear)
NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)


def is_layer(module: nn.Module) -> bool:
    """A convolution (transposed too) or Linear, subclasses included."""
    return isinstance(module, LAYERS)


def holds_layer(module: nn.Module) -> bool:
    """It is a layer, or one is in it."""
    return any(map(is_layer, module.modules()))


def rank_of(layer: nn.Module) -> int:
    """How many dimensions of a layer's input and output stand at its channels and after them."""
    return len(cast(Sequence[int], layer.kernel_size)) + 1 if isinstance(layer, CONVOLUTIONS) else 1


def channel_dim_of(root: nn.Module, node: fx.Node) -> int | None:
    """Where the output of a layer has its channels, counted from the end; None if the node is not a layer."""
    module = root.get_submodule(str(node.target)) if node.op == "call_module" else None
    return None if module is None or not is_layer(module) else -rank_of(module)


def compiled_module(module: nn.Module) -> nn.Module | None:
    """What torch.compile was given, if the module is what it returned."""
    return module._modules.get("_orig_mod")


def is_norm(module: nn.Module) -> bool:
    """A normalisation: torch.nn's, a subclass, or a module that is called one (RMSNorm, EvoNorm2dB0 ...)."""
    return isinstance(module, NORMS) or "norm" in type(module).__name__.lower()


def reads_training(module: nn.Module) -> bool:
    """Its forward looks at `training`."""

    def names(code: CodeType) -> set[str]:
        inner = [names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
        return set(code.co_names).union(*inner)

    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in names(code)

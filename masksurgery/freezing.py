"""Train a part of a model, and leave the rest as it is in evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from masksurgery.layers import Members


def freeze(model: nn.Module, trained: Sequence[str] | None) -> None:
    """Let gradients reach the parameters of these modules only; None lets them reach all."""
    if trained is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(_is_in(name, trained))


def keep_frozen(model: nn.Module, trained: Sequence[str] | None) -> None:
    """Put all other modules of a model in training mode back to eval: their statistics and their dropout stand still.

    The root of a converted model and what it asks for the mode stay in training: samples have one member each.
    """
    if trained is not None:
        for name, module in model.named_modules():
            if name and not isinstance(module, Members):
                module.train(_is_in(name, trained))  # containers come before what is in them


def _is_in(name: str, modules: Sequence[str]) -> bool:
    return any(name == own or name.startswith(f"{own}.") for own in modules)

"""Copies of modules: with their values, where copy.deepcopy refuses, and without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

ModuleType = TypeVar("ModuleType", bound=nn.Module)


def copy_module(module: ModuleType) -> ModuleType:
    """copy.deepcopy, also of modules that hold a tensor which autograd computed.

    The hooks of torch.nn.utils.weight_norm and spectral_norm leave such a weight in their layer, and make it anew
    before each forward.
    """
    return copy.deepcopy(module, copy_computed(module))


def copy_computed(module: nn.Module) -> dict[int, Any]:
    """Copies of the tensors in a module that autograd computed, by id: deepcopy refuses them, and takes this memo."""
    held = (value for child in module.modules() for value in vars(child).values())
    return {id(x): x.detach().clone() for x in held if isinstance(x, Tensor) and not x.is_leaf}


def share_tensors(module: ModuleType) -> ModuleType:
    """A copy that has the same tensors."""
    held = [x for child in module.modules() for x in tree_leaves(list(vars(child).values()))]
    return copy.deepcopy(module, {id(x): x for x in held if isinstance(x, Tensor)})


def copy_with(root: nn.Module, convert: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy without hooks, of converted tensors."""
    memo: dict[int, Any] = {}
    for module in root.modules():
        for x in tree_leaves((module._parameters, module._buffers, list(module.__dict__.values()))):
            if isinstance(x, Tensor) and id(x) not in memo:
                y = convert(x.detach())
                memo[id(x)] = nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
    duplicate = copy.deepcopy(root, memo)
    for module in duplicate.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
    return duplicate


def meta_copy(root: nn.Module) -> nn.Module:
    """A copy on the meta device, without hooks: shapes and no values."""
    return copy_with(root, lambda x: torch.empty_like(x, device="meta"))

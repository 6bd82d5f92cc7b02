"""Modules that torch.fx cannot follow: called as they are, and told the members by a side door."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from masksurgery.layers import Assignment, Members
from masksurgery.types import LayoutError

Self = TypeVar("Self", bound="Opaque")


class Opaque(nn.Module):
    """A model as a child of a module that has taken over its children, parameters and buffers.

    The model shares these with the module around it and is not registered, so that every key keeps its name.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["_model"] = model

    @classmethod
    def around(cls, model: nn.Module) -> tuple[nn.Module, str]:
        """A module that has everything the model has, and the name of its child that calls the model."""
        outer: nn.Module = object.__new__(type(type(model).__name__, (nn.Module,), {}))
        twin = object.__new__(type(model))
        for module in (outer, twin):
            module.__dict__.update(vars(model))
        outer.__dict__["_modules"] = dict(model._modules)  # the model's own forward may go through its children
        name = "opaque"
        while hasattr(model, name):
            name += "_"
        outer.add_module(name, cls(twin))
        return outer, name

    @property
    def model(self) -> nn.Module:
        """The model, whose own forward is called."""
        model: nn.Module = self.__dict__["_model"]
        return model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.forward(*args, **kwargs)

    def train(self: Self, mode: bool = True) -> Self:
        self.model.training = mode
        return super().train(mode)


class Follow(nn.Module):
    """The decision of a root node, for masks inside of an opaque module, whose call cannot carry it."""

    def __init__(self, members: Members) -> None:
        super().__init__()
        self.__dict__["members"] = members  # not registered: a frozen part must not freeze the decision
        members.followed = True

    def forward(self) -> Assignment:
        members: Members = self.__dict__["members"]
        if members.latest is None:
            raise LayoutError(
                "A part of a converted model runs inside of a forward of the whole, which assigns members."
            )
        return members.latest

"""PackedModel: a GraphModule of what all members share, the members one by one, and the head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar, cast

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from masksurgery.ensemble import Ensemble
from masksurgery.model import ConvertedModel
from masksurgery.pack.grouped import Grouped
from masksurgery.pack.single import MemberGraph, extract
from masksurgery.pack.sliced import Barrier
from masksurgery.rebuild import find_recipe
from masksurgery.types import ConfigError, Surgery

Self = TypeVar("Self", bound="PackedModel")


class PackedModel(Ensemble):
    """The members of a converted model with what their masks hide cut out of the weights: the same predictions.

    It is for eval alone, and returns what the converted model does in eval.

    Args:
        root: What the graph calls and reads: `shared` for what all members share, `members`, and a head of its own.
            Its children are taken over.
        graph: Takes what the base model takes, and ends in the head.
        source: The model that it was packed from. It is not changed.
        layout: "unrolled": the members one after another; "grouped": side by side.
        dense: Weights have rows of zeros where a sum would need an index-add.
        barriers: Where something could not be cut out.
        name_of_head: The name of the head in `root`.
        digest: Of which channels its weights belong to; weights go from one packed model to another of its digest.
    Attributes:
        layout, dense, barriers, digest: The same.
    """

    layout: Literal["unrolled", "grouped"]
    dense: bool
    barriers: tuple[Barrier, ...]
    digest: str

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        source: Ensemble,
        layout: Literal["unrolled", "grouped"],
        dense: bool,
        barriers: Sequence[Barrier],
        name_of_head: str,
        digest: str = "",
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), source._base_type.__name__)
        self._take_over(root)
        self._set_graphs(graph, graph)
        names, surgery = {"prediction": name_of_head}, _surgery_of(source)
        self._record(surgery, source.settings, source.inputs, source.parts, names, source._base_type)
        recipe = find_recipe(source)  # by the modules of the base model, which are seen here for the last time
        self.recipe = recipe.to_dict() if recipe else None
        self.layout, self.dense, self.barriers, self.digest = layout, dense, tuple(barriers), digest
        self._take_facts(source)
        self.head_module.output = source.head_module.output
        self.head_module.temperature, self._threshold = source.head_module.temperature, source._threshold
        self.eval()

    def _take_facts(self, source: nn.Module) -> None:
        """What a model says of itself, such as its pretrained_cfg and num_classes."""
        taken = {*dir(fx.GraphModule), *dir(type(self)), *vars(self), *self._modules}
        for name, value in vars(source).items():
            if not name.startswith("_") and name not in taken and all(map(_is_data, tree_leaves(value))):
                self.__dict__[name] = copy.deepcopy(value)

    def _bases(self) -> tuple[type, ...]:
        return (PackedModel,)

    def train(self: Self, mode: bool = True) -> Self:
        """Stay in eval.

        Raises:
            ConfigError: `mode` is True.
        """
        if mode:
            raise ConfigError(
                f"train: this {type(self).__name__} is packed, and has no masks that would hold its members together. "
                f"Train the converted model that it was packed from, and pack that again."
            )
        return super().train(False)

    def member(self, i: int) -> MemberGraph:
        """One member alone: a small network without masks, for a phone, which returns what the base model returned.

        Args:
            i: Which, from 0. Its outputs are not divided by the temperature.
        Returns:
            A GraphModule for eval with weights of its own.
        Raises:
            ConfigError: There is no such member.
        """
        if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < self.surgery.n:
            raise ConfigError(f"member({i!r}): there are members 0 to {self.surgery.n - 1}.")
        graph, name = self._graphs[False], f"{type(self).__name__}Member"
        (head,) = next(iter(reversed(graph.nodes))).all_input_nodes
        collected = cast(fx.Node, head.args[0])
        module = self.get_submodule(str(collected.target))
        if not isinstance(module, Grouped):
            return extract(self, graph, collected.args[i], name)
        inlined, root = fx.Graph(), nn.Module()
        root._modules = dict(self._modules)
        one = module.one(i)
        root.add_module("member", one)
        env: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            if node is collected:
                break
            env[node] = inlined.node_copy(node, lambda n: env[n])
        inputs = iter([fx.map_arg(argument, lambda n: env[n]) for argument in collected.args])
        inner: dict[fx.Node, Any] = {}
        for node in one._graphs[False].nodes:
            if node.op == "output":
                output = fx.map_arg(node.args[0], lambda n: inner[n])
            elif node.op == "placeholder":
                inner[node] = next(inputs)
            else:
                inner[node] = inlined.node_copy(node, lambda n: inner[n])
                if node.op in ("call_module", "get_attr"):
                    inner[node].target = f"member.{node.target}"
        return extract(root, inlined, output, name)


def _is_data(value: Any) -> bool:
    return not isinstance(value, (Tensor, nn.Module)) and not callable(value)


def _surgery_of(source: Ensemble) -> Surgery:
    """The record with the masks that the model has now, which may have been loaded after its conversion."""
    if not isinstance(source, ConvertedModel):
        return source.surgery
    modules = {site.mask: source.get_submodule(site.mask) for site in source.surgery.sites}
    masks = {name: cast(Tensor, module.masks) for name, module in modules.items()}
    known = {name: rows.cpu().numpy().copy() for name, rows in masks.items() if not rows.is_meta}
    return replace(source.surgery, masks={**source.surgery.masks, **known})

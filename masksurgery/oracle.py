"""The base model with masks multiplied in from outside: by hooks, or by an interpreter over a trace of it."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from masksurgery.layout import Example
from masksurgery.model import ConvertedModel
from masksurgery.tracing import bind, placeholder_values, trace
from masksurgery.types import Site

Route = Literal["hook", "pre-hook", "interpreter"]


class Oracle:
    """The base model with masks multiplied in from outside."""

    def __init__(self, base: nn.Module, model: ConvertedModel, example: Any) -> None:
        self.base, self.model = base, model
        surgery = model.surgery
        weights = {name: torch.from_numpy(masks) for name, masks in surgery.masks.items()}
        known = (*tree_leaves(example), *model.parameters(), torch.zeros(()))  # a model of texts takes integers
        like = next(x for x in known if isinstance(x, Tensor) and x.is_floating_point())
        self.masks = {}
        for site in surgery.sites:
            factor = site.channels / site.ones if model.config.rescale else 1.0
            self.masks[site.mask] = weights[site.mask].to(like.device, like.dtype) * factor
        bound = bind(base, *example)
        inputs = Example.of(placeholder_values(bound), model.config.unbatched)
        self.traces = trace(copy.deepcopy(base), bound, inputs, model.config.after or ())
        self.nodes = {node.name: node for node in self.traces.eval.nodes}
        self.hooks: list[tuple[nn.Module, int, Site, bool]] = []
        self.by_interpreter: dict[str, list[tuple[Site, tuple[str, ...]]]] = {}
        counts: Counter[str] = Counter()
        for site in surgery.sites:
            counts[self._choose_route(site)] += 1
        self.routes: dict[str, int] = dict(counts)

    def _choose_route(self, site: Site) -> Route:
        node = self.nodes[site.node]
        if node.op == "call_module" and not site.readers:
            self.hooks.append((self._module(node), self._call_of(node), site, False))
            return "hook"
        readers = [user for user in node.users if not site.readers or user.name in site.readers]
        tensors = [user for user in readers if not _reads_size(user)]
        if tensors and all(self._reads_first(user, node) for user in tensors):
            self.hooks.extend((self._module(user), self._call_of(user), site, True) for user in tensors)
            return "pre-hook"
        self.by_interpreter.setdefault(site.node, []).append((site, site.readers))
        return "interpreter"

    def _module(self, node: fx.Node) -> nn.Module:
        return self.base.get_submodule(str(node.target))

    def _call_of(self, node: fx.Node) -> int:
        """How often the same module was called before."""
        calls = [other for other in self.nodes.values() if other.op == "call_module"]
        return [c for c in calls if self._module(c) is self._module(node)].index(node)

    @staticmethod
    def _reads_first(user: fx.Node, node: fx.Node) -> bool:
        return user.op == "call_module" and list(user.args)[:1] == [node] and user.all_input_nodes == [node]

    def run(self, inputs: Any, masks: Mapping[str, Tensor]) -> Any:
        """One forward of the base model.

        Args:
            inputs: (args, kwargs).
            masks: By its name the mask [c] of a site, or one for each sample [b, c].
        """

        def apply(x: Tensor, site: Site) -> Tensor:
            mask = masks[site.mask]
            shape = [1] * x.dim()
            shape[site.channel_dim] = -1
            if mask.dim() == 1:
                return x * mask.view(shape)
            fold = x.shape[site.batch_dim] // len(mask)
            moved = x.movedim((site.batch_dim, site.channel_dim), (0, -1))
            rows = torch.stack([mask[row // fold] for row in range(len(moved))])
            masked = moved * rows.view(len(moved), *[1] * (moved.dim() - 2), -1)
            return masked.movedim((0, -1), (site.batch_dim, site.channel_dim))

        with self._hooked(apply):
            if not self.by_interpreter:
                return self.base(*inputs[0], **inputs[1])
            bound = bind(self.base, *inputs)
            graph = self.traces.train if self.base.training else self.traces.eval
            return _Masking(self.base, graph, self, apply).run(*placeholder_values(bound).values())

    @contextlib.contextmanager
    def _hooked(self, apply: Callable[[Tensor, Site], Tensor]) -> Iterator[None]:
        calls: Counter[tuple[nn.Module, bool]] = Counter()
        handles = []
        by_module: dict[tuple[nn.Module, bool], dict[int, list[Site]]] = {}
        for module, call, site, before in self.hooks:
            by_module.setdefault((module, before), {}).setdefault(call, []).append(site)

        def masked(x: Tensor, key: tuple[nn.Module, bool]) -> Tensor:
            for site in by_module[key].get(calls[key], ()):
                x = apply(x, site)
            calls[key] += 1
            return x

        for module, before in by_module:
            if before:
                handles.append(
                    module.register_forward_pre_hook(lambda m, args: (masked(args[0], (m, True)), *args[1:]))
                )
            else:
                handles.append(module.register_forward_hook(lambda m, args, out: masked(out, (m, False))))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Masking(fx.Interpreter):
    """Runs a trace of the base model and masks the sites that no hook can reach."""

    def __init__(
        self, base: nn.Module, graph: fx.Graph, oracle: Oracle, apply: Callable[[Tensor, Site], Tensor]
    ) -> None:
        super().__init__(base, graph=graph)
        self.oracle, self.apply = oracle, apply

    def fetch_attr(self, target: str) -> Any:
        try:
            return super().fetch_attr(target)
        except (AttributeError, RuntimeError):  # a constant that the trace made
            return getattr(self.oracle.traces.module, target)

    def run_node(self, n: fx.Node) -> Any:
        kept = {}
        for source in n.all_input_nodes:
            for site, readers in self.oracle.by_interpreter.get(source.name, ()):
                if not _reads_size(n) and (not readers or n.name in readers):
                    kept[source] = self.env[source]
                    self.env[source] = self.apply(self.env[source], site)
        try:
            return super().run_node(n)
        finally:
            self.env.update(kept)


def _reads_size(node: fx.Node) -> bool:
    if node.op == "call_function" and node.target is getattr:
        return True
    return node.op == "call_method" and node.target in ("size", "dim", "numel")

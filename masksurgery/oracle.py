"""The base model with masks multiplied in from outside: by hooks, or by an interpreter over a trace of it."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from masksurgery.copying import copy_module
from masksurgery.example import Example
from masksurgery.inputs import bind, placeholder_values
from masksurgery.model import ConvertedModel
from masksurgery.running import thaw
from masksurgery.tracing import Traces, trace
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
            factor = site.channels / site.ones if model.settings.rescale else 1.0
            self.masks[site.mask] = weights[site.mask].to(like.device, like.dtype) * factor
        regions = self._trace(example)
        self.regions = regions
        self.hooks: list[tuple[nn.Module, int, int, Site, bool]] = []
        self.by_interpreter: dict[tuple[str, str], list[tuple[Site, tuple[str, ...]]]] = {}
        counts: Counter[str] = Counter()
        for site in surgery.sites:
            counts[self._choose_route(site)] += 1
        self.routes: dict[str, int] = dict(counts)

    def _trace(self, example: Any) -> dict[str, Traces]:
        """Fresh traces of the base model, and of the modules in it that have a graph of their own, by name."""
        config, copied = self.model.settings, copy_module(self.base)
        traces = {
            name: trace(copied.get_submodule(name), part, config.after or ())
            for name, part in self.model.parts.items()
            if any(site.part == name for site in self.model.surgery.sites)
        }
        return {
            "": trace(copied, Example.of(bind(self.base, *example), config.unbatched), config.after or ()),
            **traces,
        }

    def _choose_route(self, site: Site) -> Route:
        node = self._node(site)
        if node.op == "call_module" and not site.readers:
            self._hook(node, site, False)
            return "hook"
        readers = [user for user in node.users if not site.readers or user.name in site.readers]
        tensors = [user for user in readers if not _reads_size(user)]
        if tensors and all(self._reads_first(user, node) for user in tensors):
            for user in tensors:
                self._hook(user, site, True)
            return "pre-hook"
        self.by_interpreter.setdefault((site.part, site.node), []).append((site, site.readers))
        return "interpreter"

    def _node(self, site: Site) -> fx.Node:
        return next(node for node in self.regions[site.part].eval.nodes if node.name == site.node)

    def _hook(self, node: fx.Node, site: Site, before: bool) -> None:
        """Note which of how many calls of a module, in one run of its graph, a hook is for."""
        part = self.base.get_submodule(site.part)
        calls = [other for other in node.graph.nodes if other.op == "call_module"]
        module = part.get_submodule(str(node.target))
        same = [call for call in calls if part.get_submodule(str(call.target)) is module]
        self.hooks.append((module, same.index(node), len(same), site, before))

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
            fold = x.shape[site.batch_dim] // (len(mask) * site.outer)
            moved = x.movedim((site.batch_dim, site.channel_dim), (0, -1))
            rows = torch.stack([mask[row // fold % len(mask)] for row in range(len(moved))])
            masked = moved * rows.view(len(moved), *[1] * (moved.dim() - 2), -1)
            return masked.movedim((0, -1), (site.batch_dim, site.channel_dim))

        with self._hooked(apply), self._interpreted(apply):
            return self.base(*inputs[0], **inputs[1])

    @contextlib.contextmanager
    def _interpreted(self, apply: Callable[[Tensor, Site], Tensor]) -> Iterator[None]:
        """Where no hook can reach a site, an interpreter runs in the place of the forward around it."""
        changed = []
        for name in {part for part, _ in self.by_interpreter}:
            module, traces = self.base.get_submodule(name), self.regions[name]

            def forward(
                *args: Any, module: nn.Module = module, traces: Traces = traces, name: str = name, **kwargs: Any
            ) -> Any:
                bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
                del bound.arguments[next(iter(bound.arguments))]
                given = placeholder_values(bound, integers=bool(name))
                graph = traces.train if module.training else traces.eval
                return _Masking(module, graph, traces, self.by_interpreter, name, apply).run(*given.values())

            module.forward = forward  # type: ignore[method-assign]
            changed.append(module)
        try:
            yield
        finally:
            for module in changed:
                del module.forward

    @contextlib.contextmanager
    def _hooked(self, apply: Callable[[Tensor, Site], Tensor]) -> Iterator[None]:
        calls: Counter[tuple[nn.Module, bool]] = Counter()
        handles = []
        by_module: dict[tuple[nn.Module, bool], dict[int, list[Site]]] = {}
        numbers: dict[tuple[nn.Module, bool], int] = {}
        for module, call, number, site, before in self.hooks:
            by_module.setdefault((module, before), {}).setdefault(call, []).append(site)
            numbers[module, before] = number

        def masked(x: Tensor, key: tuple[nn.Module, bool]) -> Tensor:
            for site in by_module[key].get(calls[key] % numbers[key], ()):
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
        self,
        module: nn.Module,
        graph: fx.Graph,
        traces: Traces,
        sites: Mapping[tuple[str, str], list[tuple[Site, tuple[str, ...]]]],
        part: str,
        apply: Callable[[Tensor, Site], Tensor],
    ) -> None:
        super().__init__(module, graph=graph)
        self.traces, self.sites, self.part, self.apply = traces, sites, part, apply

    def fetch_attr(self, target: str) -> Any:
        try:
            return super().fetch_attr(target)
        except (AttributeError, RuntimeError):  # a constant that the trace made
            return getattr(self.traces.module, target)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        return thaw(super().fetch_args_kwargs_from_env(n))

    def run_node(self, n: fx.Node) -> Any:
        kept = {}
        for source in n.all_input_nodes:
            for site, readers in self.sites.get((self.part, source.name), ()):
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

"""The proof of a conversion: each member against the base model with its masks multiplied in by another route."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Callable, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from masksurgery.model import ConvertedModel
from masksurgery.prediction import Prediction, RegressionPrediction
from masksurgery.tracing import bind, placeholder_values, trace
from masksurgery.types import ConfigError, Site, VerificationError

Route = Literal["hook", "pre-hook", "interpreter"]


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        error: Largest difference between a member and the base model with its masks, over all members and outputs.
        largest: Largest member output, which the tolerance is relative to.
        difference: Largest difference between two members.
        routes: How many masks were multiplied in by a forward hook, a pre-hook on the consumer, or an interpreter.
    """

    error: float
    largest: float
    difference: float
    routes: Mapping[str, int]

    @property
    def relative(self) -> float:
        return self.error / self.largest if self.largest else self.error


def verify(
    model: ConvertedModel,
    base: nn.Module,
    *args: Any,
    tolerance: float | None = None,
    mode: Literal["eval", "train"] = "eval",
    **kwargs: Any,
) -> Verification:
    """Compare every member of a converted model with the base model under that member's masks.

    The masks are those that the conversion decided (`model.surgery`), and are multiplied in by forward hooks on the
    base model; where no module ends a chain by pre-hooks on what reads it, else by an interpreter over a fresh trace.

    Args:
        model: Converted from `base`, with the same weights. Neither is changed.
        base: The base model.
        *args: The inputs of one forward, positional; keyword inputs follow as **kwargs.
        tolerance: Largest error relative to the largest member output; by default 1e-12 in float64, 1e-4 in float32,
            2e-2 below. Run both models in float64 for the proof.
        mode: "eval", or "train" to compare a training forward: in `split` mode each sample with its member, random
            parts (dropout, stochastic depth) drawn alike in both; in `repeat` mode all members, dropout modules
            switched off, since a part that is computed once for all members draws once.
    Raises:
        VerificationError: They differ by more than the tolerance; or the members do not differ although their masks do.
    Source:
        The oracle is the definition in Durasov et al. 2021, arXiv:2012.08334, section 3.
    """
    if not isinstance(model, ConvertedModel):
        raise ConfigError(f"verify takes a converted model first, not {type(model).__name__}.")
    if mode not in ("eval", "train"):
        raise ConfigError(f'mode={mode!r} is not "eval" or "train".')
    model, base = copy.deepcopy(model), _frozen_copy(base)
    example = (args, kwargs)
    with torch.no_grad():
        oracle = Oracle(base, model, example)
        causes = _causes(model, base)
        if mode == "eval":
            ours, theirs = _eval_outputs(model, oracle, example)
        else:
            ours, theirs = _train_outputs(model, oracle, example)
    return _compare(model, ours, theirs, oracle.routes, tolerance, mode == "eval", causes)


def _eval_outputs(model: ConvertedModel, oracle: Oracle, example: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The members of each output [b, n, ...], and the base model's outputs under their masks, likewise."""
    model.eval()
    model.output = "prediction"
    oracle.base.eval()
    ours = [p.members for p in _predictions(model(*example[0], **example[1]))]
    runs = [_float_tensors(oracle.run(example, lambda site, i=i: oracle.masks[site.mask][i])) for i in range(model.surgery.n)]
    batch_dims = [d for d in model.head_module.batch_dims if d is not None]
    if model.config.heteroscedastic:
        runs, batch_dims = [run[:1] for run in runs], batch_dims[:1]
    theirs = [torch.stack([x.movedim(d, 0) for x in leaf], 1) for leaf, d in zip(zip(*runs, strict=True), batch_dims)]
    if model.config.task == "probabilities":
        theirs = [x.clamp_min(torch.finfo(x.dtype).tiny).log() for x in theirs]
    return ours, theirs


def _train_outputs(model: ConvertedModel, oracle: Oracle, example: Any) -> tuple[list[Tensor], list[Tensor]]:
    """A training forward, and the base model in training with a mask for each row."""
    model.train()
    oracle.base.train()
    x = next(leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor))
    b, n = x.shape[0], model.surgery.n
    if model.members_module.train_mode == "split":
        index = model.members_module.fixed = torch.arange(b, device=x.device) % n
        inputs = example
    else:
        for module in (*model.modules(), *oracle.base.modules()):
            _switch_off_dropout(module)
        index = torch.arange(n, device=x.device).repeat_interleave(b)
        bound = bind(oracle.base, *example)
        for name, value in bound.arguments.items():
            if name not in model.config.unbatched:
                bound.arguments[name] = tree_map(lambda leaf: torch.cat([leaf] * n) if isinstance(leaf, Tensor) else leaf, value)
        inputs = bound.args, bound.kwargs
    runs = (lambda: model(*example[0], **example[1]), lambda: oracle.run(inputs, lambda site: oracle.masks[site.mask][index], True))
    outputs = []
    for run in runs:
        with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):  # each from the present state, which stays
            outputs.append(_float_tensors(run()))
    return outputs[0], outputs[1]


def _switch_off_dropout(module: nn.Module) -> None:
    """Random parts would draw differently in two models: their rates become zero, whatever the rate is called."""
    for name in ("p", "drop_prob", "drop_rate", "dropout"):
        if isinstance(getattr(module, name, None), float):
            setattr(module, name, 0.0)


class Oracle:
    """The base model with masks multiplied in from outside."""

    def __init__(self, base: nn.Module, model: ConvertedModel, example: Any) -> None:
        self.base, self.model = base, model
        surgery = model.surgery
        weights = {name: torch.from_numpy(masks) for name, masks in surgery.masks.items()}
        like = next((x for x in tree_leaves(example) if isinstance(x, Tensor) and x.is_floating_point()), torch.zeros(()))
        self.masks = {}
        for site in surgery.sites:
            factor = site.channels / site.ones if model.config.rescale else 1.0
            self.masks[site.mask] = weights[site.mask].to(like.device, like.dtype) * factor
        self.traces = trace(copy.deepcopy(base), bind(base, *example), model.config.after or ())
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

    def run(self, inputs: Any, mask_of: Callable[[Site], Tensor], site_rows: bool = False) -> Any:
        """One forward of the base model.

        Args:
            inputs: (args, kwargs).
            mask_of: The mask [c] of a site, or with `site_rows` one for each sample [b, c].
            site_rows: There is a mask for each sample.
        """

        def apply(x: Tensor, site: Site) -> Tensor:
            mask = mask_of(site)
            shape = [1] * x.dim()
            shape[site.channel_dim] = -1
            if not site_rows:
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

    def __init__(self, base: nn.Module, graph: fx.Graph, oracle: Oracle, apply: Callable[[Tensor, Site], Tensor]) -> None:
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


def _frozen_copy(base: nn.Module) -> nn.Module:
    duplicate = copy.deepcopy(base)
    for parameter in duplicate.parameters():
        parameter.requires_grad_(False)
    return duplicate


def _predictions(outputs: Any) -> list[Any]:
    kinds = (Prediction, RegressionPrediction)
    leaves = tree_leaves(outputs, is_leaf=lambda leaf: isinstance(leaf, kinds))
    return [leaf for leaf in leaves if isinstance(leaf, kinds)]


def _float_tensors(outputs: Any) -> list[Tensor]:
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


def _compare(
    model: ConvertedModel,
    ours: list[Tensor],
    theirs: list[Tensor],
    routes: Mapping[str, int],
    tolerance: float | None,
    members: bool,
    causes: str,
) -> Verification:
    dtype = ours[0].dtype if theirs[0].dtype not in (torch.float16, torch.bfloat16) else theirs[0].dtype
    limit = tolerance if tolerance is not None else {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 2e-2)
    error = max(float((a.double() - b.double()).abs().max()) for a, b in zip(ours, theirs, strict=True))
    largest = max(float(b.double().abs().max()) for b in theirs)
    spread = max(float((a - a[:, :1]).abs().max()) for a in ours) if members else float("nan")
    result = Verification(error, largest, spread, routes)
    if not error <= limit * largest:  # also if it is nan
        raise VerificationError(
            f"A member differs by {error:.3g} from the base model with its masks multiplied in: {result.relative:.3g} of the "
            f"largest member output {largest:.3g}, more than the tolerance {limit:.3g}.{causes}"
        )
    if members and spread == 0 and any(not masks.all() for masks in model.surgery.masks.values()):
        raise VerificationError(
            "All members are equal although their masks differ: the masked channels do not reach the output (a weight of "
            "zero behind them?), so nothing is proved. Randomise the parameters of both models and convert again."
        )
    return result


def _causes(model: ConvertedModel, base: nn.Module) -> str:
    """What is known to differ: masks that are not the decided ones, weights that are not the base model's."""
    changed = [
        name
        for name, masks in model.surgery.masks.items()
        if not torch.equal(model.get_submodule(name).masks.cpu(), torch.from_numpy(masks))  # type: ignore[arg-type]
    ]
    ours = model.state_dict()
    weights = [name for name, x in base.state_dict().items() if name in ours and not torch.equal(x, ours[name])]
    return (f" These masks are not those the conversion decided: {', '.join(changed)}." if changed else "") + (
        f" The models do not have the same weights: '{weights[0]}' is one of {len(weights)}." if weights else ""
    )

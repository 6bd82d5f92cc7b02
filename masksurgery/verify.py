"""The proof of a conversion: each member against the base model with its masks multiplied in by another route."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from masksurgery.copying import copy_module
from masksurgery.inputs import bind
from masksurgery.kinds import compiled_module
from masksurgery.model import ConvertedModel, refuse_packed
from masksurgery.oracle import Oracle
from masksurgery.prediction import Prediction, RegressionPrediction
from masksurgery.types import ConfigError, VerificationError


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
        """The error, as a share of the largest member output."""
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

    A fitted temperature is left out: what is compared is what the network computes.

    Args:
        model: Converted from `base`, with the same weights. Neither is changed.
        base: The base model.
        *args: The inputs of one forward by position.
        **kwargs: Those by name.
        tolerance: Largest error relative to the largest member output; by default 1e-12 in float64, 1e-4 in float32,
            2e-2 below. Run both models in float64 for the proof.
        mode: "eval", or "train" to compare a training forward: in `split` mode each sample with its member, random
            parts (dropout, stochastic depth) drawn alike in both; in `repeat` mode all members, dropout modules
            switched off, since a part that is computed once for all members draws once.
    Returns:
        By how much they differ, how large the outputs are, and how many sites were multiplied in by which route.
    Raises:
        VerificationError: They differ by more than the tolerance; the members do not differ although their masks do;
            or the masks are not those that the conversion decided.
    Source:
        The oracle is the definition in Durasov et al. 2021, arXiv:2012.08334, section 3.
    Example:
        >>> base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).double()
        >>> x = torch.ones(2, 8, dtype=torch.float64)
        >>> model = masksurgery.convert(base, example_inputs=(x,))
        >>> masksurgery.verify(model, base, x).relative < 1e-12
        True
    """
    refuse_packed(model, "verify")
    if not isinstance(model, ConvertedModel):
        raise ConfigError(f"verify takes a converted model first, not {type(model).__name__}.")
    if mode not in ("eval", "train"):
        raise ConfigError(f'mode={mode!r} is not "eval" or "train".')
    model, base = copy.deepcopy(model), _frozen_copy(base)
    example = (args, kwargs)
    with torch.no_grad():
        oracle = Oracle(base, model, example)
        changed, causes = _changed_masks(model), _other_weights(model, base)
        if mode == "eval":
            ours, theirs = _eval_outputs(model, oracle, example)
        else:
            ours, theirs = _train_outputs(model, oracle, example)
    return _compare(model, ours, theirs, oracle.routes, tolerance, mode == "eval", changed, causes)


def _eval_outputs(model: ConvertedModel, oracle: Oracle, example: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The members of each output [b, n, ...], and the base model's outputs under their masks, likewise."""
    model.eval()
    model.output, model.temperature = "prediction", 1.0
    oracle.base.eval()
    ours = [p.members for p in _predictions(model(*example[0], **example[1]))]
    runs = []
    for i in range(model.surgery.n):
        masks = {name: rows[i] for name, rows in oracle.masks.items()}
        runs.append(tree_leaves(oracle.run(example, masks)))
    theirs = []
    head = model.head_module
    for leaves, batch_dim, task in zip(zip(*runs, strict=True), head.batch_dims, head.tasks, strict=True):
        if batch_dim is None or not leaves[0].is_floating_point():
            continue
        members = torch.stack([x.movedim(batch_dim, 0) for x in leaves], 1)
        theirs.append(members.clamp_min(torch.finfo(members.dtype).tiny).log() if task == "probabilities" else members)
    return ours, theirs[:1] if model.settings.heteroscedastic else theirs


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
            if name not in model.settings.unbatched:
                bound.arguments[name] = tree_map(
                    lambda leaf: torch.cat([leaf] * n) if isinstance(leaf, Tensor) else leaf, value
                )
        inputs = bound.args, bound.kwargs
    runs: tuple[Callable[[], Any], ...] = (
        lambda: model(*example[0], **example[1]),
        lambda: oracle.run(inputs, {name: rows[index] for name, rows in oracle.masks.items()}),
    )
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


def _frozen_copy(base: nn.Module) -> nn.Module:
    duplicate = copy_module(base)
    for parameter in duplicate.parameters():
        parameter.requires_grad_(False)
    for module in duplicate.modules():
        original = compiled_module(module)
        if original is not None:  # compiled code would not see the hooks
            vars(module)["forward"] = original
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
    changed: str,
    causes: str,
) -> Verification:
    dtype = ours[0].dtype if theirs[0].dtype not in (torch.float16, torch.bfloat16) else theirs[0].dtype
    limit = tolerance if tolerance is not None else {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 2e-2)
    shapes = [[tuple(x.shape) for x in outputs] for outputs in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise VerificationError(f"The members' outputs have the shapes {shapes[0]}, the base model's {shapes[1]}.")
    error = _largest([a.double() - b.double() for a, b in zip(ours, theirs, strict=True)])
    largest = _largest(theirs)
    spread = _largest([a - a[:, :1] for a in ours]) if members else float("nan")
    result = Verification(error, largest, spread, routes)
    if not error <= limit * largest:  # also if it is nan
        raise VerificationError(
            f"A member differs by {error:.3g} from the base model with its masks multiplied in: {result.relative:.3g} "
            f"of the largest member output {largest:.3g}, more than the tolerance {limit:.3g}.{changed}{causes}"
        )
    if members and spread == 0 and any(not masks.all() for masks in model.surgery.masks.values()):
        raise VerificationError(
            "All members are equal although their masks differ: the masked channels do not reach the output (a weight "
            "of zero behind them?), so nothing is proved. Randomise the parameters of both models and convert again."
        )
    if changed:  # a bit of a channel that is zero anyway changes no output
        raise VerificationError(f"The outputs agree, but{changed}")
    return result


def _largest(tensors: list[Tensor]) -> float:
    """The largest absolute value; nan if there is one, which Python's max may lose."""
    return float(torch.stack([x.abs().max().double() for x in tensors]).max())


def _changed_masks(model: ConvertedModel) -> str:
    """What to say of masks that are not the decided ones."""
    changed = [
        name
        for name, masks in model.surgery.masks.items()
        if not torch.equal(cast(Tensor, model.get_submodule(name).masks).cpu(), torch.from_numpy(masks))
    ]
    return f" these masks are not those the conversion decided: {', '.join(changed)}." if changed else ""


def _other_weights(model: ConvertedModel, base: nn.Module) -> str:
    """What to say of weights that are not the base model's."""
    ours = model.state_dict()
    weights = [name for name, x in base.state_dict().items() if name in ours and not torch.equal(x, ours[name])]
    return f" The models do not have the same weights: '{weights[0]}' is one of {len(weights)}." if weights else ""

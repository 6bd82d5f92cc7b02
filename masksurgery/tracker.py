"""What happens inside of a node while it runs: the operators, and the calls of modules that a trace has not entered."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from masksurgery.axes import Axis, Call, Dims, get_dims, set_dims
from masksurgery.example import BATCH_SIZES, tensors_in
from masksurgery.rules import find_rule
from masksurgery.types import LayoutError


class Tracker(TorchDispatchMode):
    """Applies the rule of each operator that runs, and notes its family."""

    def start(self) -> None:
        self.kinds: list[str] = []
        self.unknown: list[str] = []
        self.split: set[Axis] = set()
        self.seen: set[int] = set()

    def treat_as_norm(self, given: Any, value: Any) -> None:
        """A norm keeps the channels of its input, whatever groups it has cut them into to find their statistics."""
        if self.split and isinstance(value, Tensor) and value.shape == getattr(given, "shape", None):
            set_dims(value, get_dims(given))
            self.kinds, self.split = ["norm"], set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names, arguments = _signature(func)
        arguments = {**arguments, **dict(zip(names, args, strict=False)), **kwargs}
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        kind, rule = find_rule(func)
        given = tensors_in((args, kwargs))
        before = [get_dims(x) for x in given]
        # What a layer makes of its parameters alone (a normalised weight) tells nothing of its input.
        reads_input = [dims for dims in before if any(axis.sources for dim in dims for axis in dim)]
        out = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if rule is None:
            self.seen.update(map(id, given))
            if reads_input and outputs:
                self.unknown.append(str(func))
            for x in outputs:
                set_dims(x, tuple((Axis(size),) if size != 1 else () for size in x.shape))
            return out
        call = Call(func.overloadpacket.__name__.rstrip("_"), arguments, outputs)
        dims = rule(call) if outputs and before else []
        for x, found in zip(outputs, dims, strict=True):
            set_dims(x, found)
        kind = "make" if call.constant else kind
        if kind != "make":  # zeros_like(x) reads no value of x, only its size
            self.seen.update(map(id, given))
        if reads_input:
            self.kinds.append(kind)
        if kind == "pointwise" and len(reads_input) > 1 and {"mix", "product"} & set(self.kinds):
            self.kinds.append("sum")
        self.split |= call.split
        return out


@cache
def _signature(func: Any) -> tuple[list[str], dict[str, Any]]:
    arguments = func._schema.arguments
    return [a.name for a in arguments], {a.name: a.default_value for a in arguments if a.has_default_value()}


@dataclass
class InnerCall:
    """A call of a module inside of one that the trace does not enter.

    Attributes:
        name: Qualified name of the module.
        given: Its (args, kwargs) at each of BATCH_SIZES.
        entry: The axes of the tensors in the first of them, in order.
        exits: The axes of the tensors that it returned.
    """

    name: str
    given: list[tuple[Any, Any]]
    entry: list[Dims]
    exits: list[Dims] = field(default_factory=list)


class Recorder:
    """Notes the calls of some modules, the outermost if they stand in each other, and gives their outputs new axes."""

    def __init__(self, module: nn.Module, watch: Collection[str]) -> None:
        self._calls: list[InnerCall] = []
        self._depth = 0
        for name in watch:
            watched = module.get_submodule(name)
            watched.register_forward_pre_hook(self._enter(name), with_kwargs=True)
            watched.register_forward_hook(self._leave)

    def take(self) -> list[InnerCall]:
        """The calls since the last time."""
        calls, self._calls = self._calls, []
        return calls

    def _enter(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._depth:
                entry = [get_dims(x) for x in tensors_in((args, kwargs))]
                self._calls.append(InnerCall(name, [(args, kwargs)], entry))
            self._depth += 1

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        for x in tensors_in(output):
            dims = tuple(tuple(Axis(axis.size, axis.batch) for axis in dim) for dim in get_dims(x))
            for new, old in zip(_axes(dims), _axes(get_dims(x)), strict=True):
                new.sources = old.sources | {new}
            set_dims(x, dims)
            self._calls[-1].exits.append(dims)


def _axes(dims: Dims) -> list[Axis]:
    return [axis for dim in dims for axis in dim]


def paired(calls: list[InnerCall], others: list[InnerCall]) -> list[InnerCall]:
    """The calls of both runs as one."""
    names = [[call.name for call in run] for run in (calls, others)]
    if names[0] != names[1]:
        raise LayoutError(
            f"The model calls other modules for {BATCH_SIZES[0]} samples than for {BATCH_SIZES[1]}: {names[0]} and "
            f"{names[1]}."
        )
    for call, other in zip(calls, others, strict=True):
        call.given.extend(other.given)
    return calls

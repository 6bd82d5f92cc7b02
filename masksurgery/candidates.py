"""Which calls of which layers may be masked: `after`, `include` and `exclude`, and what to say if they name nothing."""

from __future__ import annotations

import difflib
import fnmatch
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from masksurgery.kinds import LAYERS
from masksurgery.opaque import Opaque
from masksurgery.regions import Region
from masksurgery.tracing import Traces
from masksurgery.types import ConvertConfig, Selector, SiteError, Skipped


@dataclass(frozen=True)
class Candidate:
    """One call of a layer that may be masked."""

    node: fx.Node
    layer: str
    call: int
    module: nn.Module
    forced: bool = False


def resolve_types(after: Any, model: nn.Module) -> tuple[type, ...] | None:
    """Layer types, given as types or as names of classes in torch.nn or in the model.

    Raises:
        SiteError: A name is of no such class, or nothing is given.
    """
    if after is None:
        return None
    given = [after] if isinstance(after, (str, type)) else list(after)
    if not given:
        raise SiteError("after=[] selects nothing. Leave it out for every convolution and Linear, or pass types.")
    own = {type(module).__name__: type(module) for module in model.modules()}
    found: list[type] = []
    for kind in given:
        if isinstance(kind, str):
            known = own.get(kind) or getattr(nn, kind, None)
            if not isinstance(known, type):
                close = difflib.get_close_matches(kind, own, n=3, cutoff=0.4)
                hint = f" Did you mean {', '.join(close)}?" if close else f" It has {', '.join(sorted(own))}."
                raise SiteError(
                    f"after names '{kind}', which is no class of torch.nn nor of {type(model).__name__}.{hint}"
                )
            kind = known
        if not isinstance(kind, type) or not issubclass(kind, nn.Module):
            raise SiteError(f"after holds {kind!r}, which is no type of module. Pass types such as nn.Conv2d.")
        found.append(kind)
    return tuple(found)


def select_candidates(region: Region, config: ConvertConfig) -> tuple[list[Candidate], list[Skipped]]:
    """Calls of the layers that `after`, `include` and `exclude` name, in the order of the graphs, and the other layers.

    Args:
        region: Of the model itself; the regions in it are looked through too.
    Raises:
        SiteError: They name nothing.
    """
    root, types = region.traces.module, config.after or LAYERS
    modules = _of_types(root, types)
    if not modules:
        raise _no_such_type(root, config)
    calls = {name for _, _, name in region.calls()}
    skipped = [Skipped(name, _why_not_called(name, region)) for name in modules if name not in calls]
    included = [name for name, module in modules.items() if _matches(name, module, config.include)]
    if not included:
        raise _no_such_name(modules, config)
    _check_patterns(root, config)
    chosen = [name for name in included if not (config.exclude and _matches(name, modules[name], config.exclude))]
    if not chosen:
        raise SiteError(
            f"exclude={list(config.exclude)!r} leaves nothing of the {len(included)} layers selected "
            f"({', '.join(included[:3])}{', ...' if len(included) > 3 else ''}). Exclude less."
        )
    in_full = {name for name in chosen if name in (config.include or ())}
    for name in sorted(in_full):
        if name not in calls:
            raise SiteError(f"include names '{name}', which cannot be masked: {_why_not_called(name, region)}.")
    candidates = [
        Candidate(node, name, call, modules[name], name in in_full)
        for node, name, call in _in_order(region)
        if name in modules and name in chosen
    ]
    why = {name: "not included" if name not in included else "excluded" for name in modules if name not in chosen}
    return candidates, skipped + [Skipped(name, reason) for name, reason in why.items() if name in calls]


def _check_patterns(root: nn.Module, config: ConvertConfig) -> None:
    """A pattern with a typo would leave out, or mask, what was meant otherwise."""
    names = [name for name, _ in root.named_modules()]
    for argument, selectors in (("include", config.include or ()), ("exclude", config.exclude)):
        for pattern in selectors:
            if isinstance(pattern, str) and not fnmatch.filter(names, pattern):
                close = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.3))
                hint = f"Closest names: {close}." if close else "Leave it out."
                raise SiteError(f"{argument}: '{pattern}' matches no module of {type(root).__name__}. {hint}")


def _of_types(root: nn.Module, types: tuple[type, ...]) -> dict[str, nn.Module]:
    named: dict[str, nn.Module] = dict(root.named_modules())
    return {name: module for name, module in named.items() if name and isinstance(module, types)}


def _in_order(region: Region) -> Iterable[tuple[fx.Node, str, int]]:
    seen: Counter[str] = Counter()
    for _, node, name in region.calls():
        yield node, name, seen[name]
        seen[name] += 1


def _matches(name: str, module: nn.Module, selectors: Sequence[Selector] | None) -> bool:
    if selectors is None:
        return True
    return any(s(name, module) if callable(s) else fnmatch.fnmatchcase(name, s) for s in selectors)


def _why_not_called(name: str, region: Region) -> str:
    """Why no graph of the region, or of one in it, calls a layer."""
    for part in region.walk():
        for several, owner in part.irregular.items():
            if f"{name}.".startswith(f"{several}."):
                return f"opaque: {owner}, which cannot be traced, calls '{several}' in several ways"
    inner = next(part for part in reversed([*region.walk()]) if name.startswith(part.qualified("")))
    return _why_not_in(name.removeprefix(inner.qualified("")), inner.traces)


def _why_not_in(name: str, traces: Traces) -> str:
    if any(node.op == "get_attr" and str(node.target).startswith(f"{name}.") for node in traces.eval.nodes):
        return "no call: the model reads its weights without a call of it"
    called, in_training = (
        {str(node.target) for node in graph.nodes if node.op == "call_module"} for graph in (traces.eval, traces.train)
    )
    for parent in [".".join(name.split(".")[:k]) for k in range(1, name.count(".") + 1)]:
        if parent in called:
            if parent in traces.opaque:
                return f"opaque: '{parent}' cannot be traced, and does not call it for the example inputs"
            kind = type(traces.module.get_submodule(parent)).__name__
            return f"no call: it is inside {kind} '{parent}', which the trace does not enter"
    if name in in_training:
        return "training: it runs in training only"
    if any(isinstance(traces.module.get_submodule(target), Opaque) for target in traces.opaque):
        return "opaque: the model cannot be traced, and does not call it for the example inputs"
    return "unused: the model does not call it"


def _no_such_type(root: nn.Module, config: ConvertConfig) -> SiteError:
    counts = Counter(type(module).__name__ for module in root.modules() if not list(module.children()))
    has = ", ".join(f"{name} ({count})" for name, count in counts.most_common(8)) or "no layers"
    if config.after is None:
        return SiteError(f"{type(root).__name__} has no convolution and no Linear. It has {has}. Pass after=(...).")
    names = ", ".join(kind.__name__ for kind in config.after)
    return SiteError(
        f"after=({names}) selects nothing in {type(root).__name__}. It has {has}. Pass one of these types."
    )


def _no_such_name(modules: dict[str, nn.Module], config: ConvertConfig) -> SiteError:
    patterns = [s for s in config.include or () if isinstance(s, str)]
    close = [name for s in patterns for name in difflib.get_close_matches(s, modules, n=3, cutoff=0.3)]
    hint = f"Closest names: {', '.join(close)}" if close else f"Names are like {', '.join(list(modules)[:3])}"
    return SiteError(
        f"include={list(config.include or ())!r} matches none of the {len(modules)} candidate layers. {hint}."
    )

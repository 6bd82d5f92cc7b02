"""torch.fx traces that keep what a conversion needs: every layer a leaf, every buffer a buffer, both modes."""

from __future__ import annotations

import copy
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from types import CodeType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from masksurgery.branches import Evaluator, Value, assigned, common, reads_sizes, same_branch
from masksurgery.layout import Example
from masksurgery.types import TraceError

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.modules.conv._ConvNd,)
LAYERS: tuple[type[nn.Module], ...] = (*CONVOLUTIONS, nn.Linear)
NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)
# They make a tensor of sizes and take no tensor, so that older torch.fx does not notice a size that is a Proxy.
FACTORIES = (
    torch.arange,
    torch.empty,
    torch.eye,
    torch.full,
    torch.linspace,
    torch.ones,
    torch.rand,
    torch.randn,
    torch.tensor,
    torch.zeros,
)


@dataclass(frozen=True)
class Traces:
    """The graphs of one model; `train` is `eval` itself where the modes do not differ.

    `module` is what was traced: its parameters, buffers and submodules are those the graphs name.
    """

    module: nn.Module
    eval: fx.Graph
    train: fx.Graph
    notes: tuple[str, ...] = ()


def is_layer(module: nn.Module) -> bool:
    """A convolution (transposed too) or Linear, subclasses included."""
    return isinstance(module, LAYERS)


def bind_inputs(model: nn.Module, example_inputs: Any) -> inspect.BoundArguments:
    """Match example inputs, positional or by keyword, with the signature of the model's forward.

    Raises:
        TraceError: They do not fit.
    """
    if isinstance(example_inputs, Mapping):
        return bind(model, (), example_inputs)
    return bind(model, example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,), {})


def bind(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """Match args and kwargs with the signature of the model's forward; a TraceError if they do not fit."""
    signature = inspect.signature(model.forward)
    example_inputs = args or kwargs
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(f"example_inputs do not fit {type(model).__name__}.forward{signature}: {error}.") from error
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(dict(bound.arguments))):
        raise TraceError(f"example_inputs={example_inputs!r} hold no tensor. Pass a tuple of args or a dict of kwargs.")
    return bound


def placeholder_values(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Example values by the name of the placeholder that the trace gives them; no entry for constants."""
    values = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            parts = {f"{name}_{i}": part for i, part in enumerate(value)}
        else:
            parts = value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        values.update({key: part for key, part in parts.items() if _holds_tensor(part)})
    return values


def describe_inputs(bound: inspect.BoundArguments) -> dict[str, Any]:
    """The inputs as JSON: {"args": [...], "kwargs": {...}}, a tensor as {"shape": [...], "dtype": "float32"}."""

    def describe(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
        return leaf

    return {"args": tree_map(describe, list(bound.args)), "kwargs": tree_map(describe, dict(bound.kwargs))}


def make_inputs(description: Mapping[str, Any], device: torch.device | str = "cpu") -> tuple[list[Any], dict[str, Any]]:
    """Args and kwargs, all zeros, of a description."""

    def make(value: Any) -> Any:
        if isinstance(value, Mapping):
            if set(value) == {"shape", "dtype"}:
                return torch.zeros(value["shape"], dtype=getattr(torch, value["dtype"]), device=device)
            return {key: make(part) for key, part in value.items()}
        return [make(part) for part in value] if isinstance(value, list) else value

    return make(list(description["args"])), make(dict(description["kwargs"]))


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


class Tracer(fx.Tracer):
    """Traces a module whose inputs are exactly `bound`: a placeholder for each tensor, everything else a constant.

    Leaves are, in this order, instances of `leaf_types` and of LAYERS, torch.nn's own modules, and, if they hold no
    layer: what timm says cannot be traced, norms, and modules that read `self.training`. What timm says cannot be
    traced is entered if it holds a layer; where that fails, `failed` is its type.
    """

    proxy_buffer_attributes = True  # else buffers are baked into constants, which a later load_state_dict misses

    def __init__(
        self, root: nn.Module, bound: inspect.BoundArguments, example: Example, leaf_types: tuple[type, ...] = ()
    ) -> None:
        modules, functions = _timm_leaves()
        super().__init__(autowrap_functions=(*functions, *_einops_functions(), *FACTORIES))
        self._autowrap_search.append(torch)
        self.bound = bound
        self.leaf_types = leaf_types
        self.untraceable = modules
        self.failed: type | None = None
        self._make_evaluator = lambda: Evaluator(root, example)
        self._evaluator: Evaluator | None = None
        self._asked: list[fx.Node] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, self.leaf_types) or is_layer(m) or super().is_leaf_module(m, module_qualified_name):
            return True
        if any(is_layer(child) or isinstance(child, self.leaf_types) for child in m.modules()):
            return False
        if type(m).__module__.startswith("einops."):  # Rearrange and its kind
            return True
        return isinstance(m, self.untraceable) or is_norm(m) or reads_training(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._computes() or m not in (self.submodule_paths or ()):  # the forward makes it: nn.ReLU()(x)
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None and isinstance(m, self.untraceable):
                self.failed = type(m)
            raise

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Value(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.decide(obj.node, bool))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        values = self._compute(obj.node)
        if all(isinstance(value, Mapping) for value in values):
            return iter(list(values[0]))
        return iter([cast(Any, obj)[i] for i in range(self.length(obj))])

    def length(self, obj: fx.Proxy) -> int:
        values = self._compute(obj.node)
        if isinstance(values[0], Tensor):
            return int(self.decide(cast(Any, obj).shape[0].node, int))
        return common((len(values[0]), len(values[1])), obj.node)

    def decide(self, node: fx.Node, kind: type | None) -> Any:
        """The number that a node computes, for Python's control flow; a node that checks it stays in the graph.

        Args:
            node: It computes a number, or a tuple of numbers.
            kind: What the number is to be; None for what it is.
        Raises:
            TraceError: It depends on the values of tensors or on the batch size.
        """
        values = self._compute(node)
        kind = kind or (tuple if isinstance(values[0], tuple) else type(values[0]))
        if not any(isinstance(value, Tensor) for value in values):
            values = kind(values[0]), kind(values[1])
        value = common(values, node)
        if reads_sizes(node):
            checked = (
                node if type(self._compute(node)[0]) is kind else self.create_node("call_function", kind, (node,), {})
            )
            where = f"'{self.scope.module_path}'" if self.scope.module_path else type(self.root).__name__
            self.create_node("call_function", same_branch, (checked, value, where), {})
        else:
            self._asked.append(node)
        return value

    def assign(self, node: fx.Node, key: Any, value: Any) -> fx.Node:
        """The node that stands for `x[key] = value`, x being what a node computes.

        Raises:
            TraceError: x is a view, a parameter or a buffer: others would see the assignment, too.
        """
        if node.op == "get_attr" or self._compute(node)[0]._is_view():
            raise TraceError(f"'{node.name}', which is assigned to, is a part of another tensor, or of the module")
        return self.create_proxy("call_function", assigned, (self.proxy(node), key, value), {}).node

    def create_arg(self, a: Any) -> Any:
        """Mappings keep their type: torch.fx makes a dict of an OrderedDict, which a ModelOutput of transformers is."""
        if not isinstance(a, OrderedDict):
            return super().create_arg(a)
        entries = super().create_arg(dict(a))
        return self.create_node("call_function", type(a), *(((), entries) if is_dataclass(a) else ((entries,), {})))

    def _compute(self, node: fx.Node) -> tuple[Any, Any]:
        if self._evaluator is None:
            self._evaluator = self._make_evaluator()
        try:
            return self._evaluator.compute(node)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            raise TraceError(f"control flow depends on '{node.name}', which cannot be computed: {error}") from error

    def _computes(self) -> bool:
        return self._evaluator is not None and self._evaluator.active

    def erase_asked(self) -> None:
        """Erase what was computed for a decision alone that needs no check."""
        while self._asked:
            node = self._asked.pop()
            if not node.users and node.op in ("call_function", "call_method") and node in self.graph.nodes:
                self._asked.extend(node.all_input_nodes)
                self.graph.erase_node(node)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self._computes():
            return attr_val
        # Shapes of parameters are constants, so that a forward may branch on them; torch.fx allows it for no buffer.
        self.param_shapes_constant = isinstance(attr_val, nn.Parameter)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        def proxy(name: str, value: Any) -> Any:
            return self.create_proxy("placeholder", name, (), {}) if _holds_tensor(value) else value

        arguments: dict[str, Any] = {}
        for name, value in self.bound.arguments.items():
            kind = self.bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                arguments[name] = tuple(proxy(f"{name}_{i}", part) for i, part in enumerate(value))
            elif kind is inspect.Parameter.VAR_KEYWORD:
                arguments[name] = {key: proxy(key, part) for key, part in value.items()}
            else:
                arguments[name] = proxy(name, value)
        call = inspect.BoundArguments(self.bound.signature, arguments)  # type: ignore[arg-type]

        def forward(root: nn.Module) -> Any:
            return root_fn(root, *call.args, **call.kwargs)

        return forward, [self.root]


def _timm_leaves() -> tuple[tuple[type, ...], tuple[Callable[..., Any], ...]]:
    from timm.models import get_notrace_functions, get_notrace_modules

    return tuple(get_notrace_modules()), tuple(get_notrace_functions())


def _einops_functions() -> tuple[Callable[..., Any], ...]:
    """They ask for the type of a tensor, which a Proxy does not have."""
    einops = sys.modules.get("einops")
    return (einops.rearrange, einops.reduce, einops.repeat, einops.einsum) if einops else ()


def is_norm(module: nn.Module) -> bool:
    """A normalisation: torch.nn's, a subclass, or a module that is called one (RMSNorm, EvoNorm2dB0 ...)."""
    return isinstance(module, NORMS) or "norm" in type(module).__name__.lower()


def reads_training(module: nn.Module) -> bool:
    """Its forward looks at `training`."""

    def names(code: CodeType) -> set[str]:
        inner = [names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
        return set(code.co_names).union(*inner)

    code = getattr(type(module).forward, "__code__", None)
    return code is not None and "training" in names(code)


def trace(
    model: nn.Module, bound: inspect.BoundArguments, example: Example, leaf_types: tuple[type, ...] = ()
) -> Traces:
    """Trace a model in eval and in training mode.

    Args:
        model: Constants of the trace become its non-persistent buffers. Pass a copy.
        bound: The inputs of one forward.
        example: The same at two batch sizes.
        leaf_types: Modules of these types are not entered.
    Raises:
        TraceError: torch.fx cannot follow the model.
    """
    traced = _twin(model)  # a forward that keeps what it computes keeps proxies here, and not in the model
    with torch.random.fork_rng(devices=[]):
        graphs = {}
        for mode in (False, True):
            traced.train(mode)
            graphs[mode] = _trace(traced, bound, example, leaf_types)
    notes = [f"hooks of '{name}' are not called" for name in _hooked_containers(model, graphs[False])]
    if same_graph(graphs[False], graphs[True], traced):
        graphs[True] = graphs[False]
    used = {node.target for graph in graphs.values() for node in graph.nodes if node.op == "get_attr"}
    for name in used & (set(vars(traced)) - set(vars(model))):
        model.register_buffer(name, vars(traced)[name], persistent=False)
    return Traces(model, graphs[False], graphs[True], tuple(notes))


def _trace(model: nn.Module, bound: inspect.BoundArguments, example: Example, leaf_types: tuple[type, ...]) -> fx.Graph:
    tracer = Tracer(model, bound, example, leaf_types)  # outside of the try: it imports timm
    try:
        graph = tracer.trace(model)
    except Exception as error:  # a model's forward may raise whatever it likes when it meets a Proxy
        if tracer.failed is not None:
            return _trace(model, bound, example, (*leaf_types, tracer.failed))
        mode = "training" if model.training else "eval"
        cause = str(error).strip().partition("\n")[0].rstrip(".")
        raise TraceError(
            f"torch.fx cannot trace {type(model).__name__} in {mode} mode: {type(error).__name__}: {cause}. "
            f"Control flow on the values of tensors cannot be followed: convert the part without it, or rewrite it."
        ) from error
    tracer.erase_asked()
    for node in graph.nodes:
        node.meta.pop("is_wrapped", None)  # else the generated code wraps the function for every later trace as well
    graph.lint()
    return graph


def _twin(model: nn.Module) -> nn.Module:
    """A copy with the same tensors."""
    tensors = [x for module in model.modules() for x in tree_leaves(list(vars(module).values()))]
    return copy.deepcopy(model, {id(x): x for x in tensors if isinstance(x, Tensor)})


def _hooked_containers(model: nn.Module, graph: fx.Graph) -> list[str]:
    called = {node.target for node in graph.nodes if node.op == "call_module"}
    return [
        name or "the model itself"
        for name, module in model.named_modules()
        if (module._forward_hooks or module._forward_pre_hooks)
        and not any(name == leaf or name.startswith(f"{leaf}.") for leaf in called)
    ]


def same_graph(one: fx.Graph, other: fx.Graph, root: nn.Module) -> bool:
    """Both compute the same: node by node equal, constants equal by value."""
    if len(one.nodes) != len(other.nodes):
        return False
    twin: dict[fx.Node, fx.Node] = {}
    for a, b in zip(one.nodes, other.nodes, strict=True):
        twin[a] = b
        if a.op != b.op:
            return False
        if a.target != b.target and not (a.op == "get_attr" and _equal_constants(root, a, b)):
            return False
        args, kwargs = fx.map_arg((a.args, a.kwargs), lambda node: twin[node])
        if not _equal(args, b.args) or not _equal(kwargs, b.kwargs):
            return False
    return True


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _equal_constants(root: nn.Module, a: fx.Node, b: fx.Node) -> bool:
    x, y = (getattr(root, cast(str, node.target), None) for node in (a, b))
    return (
        isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and x.shape == y.shape
        and x.dtype == y.dtype
        and torch.equal(x, y)
    )

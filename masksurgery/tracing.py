"""torch.fx traces that keep what a conversion needs: every layer a leaf, every buffer a buffer, both modes."""

from __future__ import annotations

import contextlib
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from masksurgery.branches import Evaluator, Value, assigned, common, reads_sizes, same_branch
from masksurgery.copying import share_tensors
from masksurgery.example import Example
from masksurgery.inputs import as_call, replace_inputs
from masksurgery.kinds import compiled_module, holds_layer, is_layer, is_norm, reads_training
from masksurgery.opaque import Opaque
from masksurgery.types import TraceError

# Older torch.fx does not notice a size that is a Proxy in what takes no tensor, and in the groups of a convolution.
OF_SIZES = (
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
    F.conv1d,
    F.conv2d,
    F.conv3d,
)

EINOPS = ("rearrange", "reduce", "repeat", "einsum", "pack", "unpack", "parse_shape")


@dataclass(frozen=True)
class Traces:
    """The graphs of one model; `train` is `eval` itself where the modes do not differ.

    `module` is what was traced: its parameters, buffers and submodules are those the graphs name. `opaque` names the
    modules with layers that torch.fx could not follow, each with the cause: the graphs call them as they are.
    """

    module: nn.Module
    eval: fx.Graph
    train: fx.Graph
    notes: tuple[str, ...] = ()
    opaque: Mapping[str, str] = field(default_factory=dict)


class Tracer(fx.Tracer):
    """Traces a module whose inputs are exactly those of `example`: everything else is a constant.

    Leaves are, in this order, the modules in `opaque`, instances of `leaf_types` and of LAYERS, torch.nn's own modules,
    and, if they hold no layer: what timm says cannot be traced, layers of einops, norms, and modules that read
    `self.training`. Where a trace fails, `failed` is the innermost module that it was in, or None in the root's own
    forward.
    """

    proxy_buffer_attributes = True  # else buffers are baked into constants, which a later load_state_dict misses

    def __init__(
        self, root: nn.Module, example: Example, leaf_types: tuple[type, ...] = (), opaque: Collection[nn.Module] = ()
    ) -> None:
        modules, functions = _timm_leaves()
        layers, operations = _einops_leaves()
        super().__init__(autowrap_functions=(*functions, *operations, *OF_SIZES))
        self._autowrap_search += [torch, F, *_loaded("einops")]
        self.example = example
        self.leaf_types = leaf_types
        self.opaque = opaque
        self.untraceable = (*modules, *layers)
        self.failed: nn.Module | None = None
        self._make_evaluator = lambda: Evaluator(root, example)
        self._evaluator: Evaluator | None = None
        self._asked: list[fx.Node] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if (
            m in self.opaque
            or isinstance(m, self.leaf_types)
            or is_layer(m)
            or super().is_leaf_module(m, module_qualified_name)
        ):
            return True
        if any(is_layer(child) or isinstance(child, self.leaf_types) for child in m.modules()):
            return False
        return isinstance(m, self.untraceable) or is_norm(m) or reads_training(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._computes() or m not in (self.submodule_paths or ()):  # the forward makes it: nn.ReLU()(x)
            return forward(*args, **kwargs)
        original = compiled_module(m)
        if original is not None:
            return original(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = m
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
        self._compute(node)
        if node.op == "get_attr" or cast(Evaluator, self._evaluator).is_shared(node):
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
        bound = replace_inputs(
            self.example.bound, lambda name, _: self.create_proxy("placeholder", name, (), {}), self.example.integers
        )
        args, kwargs = as_call(bound)

        def forward(root: nn.Module) -> Any:
            return root_fn(root, *args, **kwargs)

        return forward, [self.root]


def _timm_leaves() -> tuple[tuple[type, ...], tuple[Callable[..., Any], ...]]:
    from timm.models import get_notrace_functions, get_notrace_modules

    return tuple(get_notrace_modules()), tuple(get_notrace_functions())


def _einops_leaves() -> tuple[tuple[type, ...], tuple[Callable[..., Any], ...]]:
    """The layers and functions of einops, which look at the type and the shape of what they get."""
    modules = tuple(kind for layers in _loaded("einops.layers.torch") for kind in (layers.Rearrange, layers.Reduce))
    return modules, tuple(f for einops in _loaded("einops") for name, f in vars(einops).items() if name in EINOPS)


def _loaded(name: str) -> list[Any]:
    """A package, if it has been imported: what has not is in no model."""
    return [sys.modules[name]] if name in sys.modules else []


def trace(model: nn.Module, example: Example, leaf_types: tuple[type, ...] = ()) -> Traces:
    """Trace a model in eval and in training mode.

    What torch.fx cannot follow is not entered: such a module, or if need be the model itself, is one opaque call.

    Args:
        model: Constants of the trace become its non-persistent buffers. Pass a copy.
        example: What one forward takes.
        leaf_types: Modules of these types are not entered.
    """
    traced = share_tensors(model)  # a forward that keeps what it computes keeps proxies here, and not in the model
    causes: dict[nn.Module, str] = {}
    with torch.random.fork_rng(devices=[]):
        graphs = _trace_both(traced, example, leaf_types, causes)
    used = {node.target for graph in graphs for node in graph.nodes if node.op == "get_attr"}
    for name in used & (set(vars(traced)) - set(vars(model))):
        model.register_buffer(name, vars(traced)[name], persistent=False)
    if not graphs:
        return opaque_traces(model, example, causes[traced])
    notes = [f"hooks of '{name}' are not called" for name in _hooked_containers(model, graphs[0])]
    compiled = [name for name, module in model.named_modules() if compiled_module(module) is not None]
    notes += [f"'{name}' is not compiled any more: compile the converted model" for name in compiled]
    if same_graph(graphs[0], graphs[1], traced):
        graphs[1] = graphs[0]
    called = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_module"}
    named = [(name, module) for name, module in traced.named_modules() if name in called and module in causes]
    opaque = {name: causes[module] for name, module in named if holds_layer(module)}
    return Traces(model, graphs[0], graphs[1], tuple(notes), opaque)


def _trace_both(
    model: nn.Module, example: Example, leaf_types: tuple[type, ...], causes: dict[nn.Module, str]
) -> list[fx.Graph]:
    """The graphs of eval and of training; none if the model's own forward cannot be followed.

    Args:
        causes: Filled with the modules that are not entered, and why.
    """
    graphs: list[fx.Graph] = []
    while len(graphs) < 2:
        model.train(len(graphs) == 1)
        tracer = Tracer(model, example, leaf_types, causes)
        try:
            with _symbols_forgotten(model):
                graphs.append(_trace(tracer, model))
        except Exception as error:  # a model's forward may raise whatever it likes when it meets a Proxy
            failed = tracer.failed if tracer.failed is not None and tracer.failed not in causes else model
            cause = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].rstrip('.')}"
            causes.update(dict.fromkeys(_alike(model, failed), cause))
            graphs = []
            if failed is model:
                break
    return graphs


@contextlib.contextmanager
def _symbols_forgotten(model: nn.Module) -> Iterator[None]:
    """A forward that keeps what it computes has kept symbols of this trace, which mean nothing to the next one."""
    places = [place for module in model.modules() for place in (vars(module), module._buffers)]
    before = [dict(place) for place in places]
    try:
        yield
    finally:
        for place, known in zip(places, before, strict=True):
            for name in [name for name, value in place.items() if isinstance(value, fx.Proxy)]:
                del place[name]
                place.update({name: known[name]} if name in known else {})


def _alike(model: nn.Module, failed: nn.Module) -> list[nn.Module]:
    """Modules that fail for the same reason: those of the same class, unless that is a container of torch.nn."""
    own = not type(failed).__module__.startswith("torch.nn")
    return [m for m in model.modules() if m is failed or (own and type(m) is type(failed))]


def opaque_traces(model: nn.Module, example: Example, cause: str) -> Traces:
    """The model as one call, in a module that has its children, parameters and buffers under the same names."""
    root, name = Opaque.around(model)
    graph = fx.Graph()
    bound = replace_inputs(example.bound, lambda placeholder, _: graph.placeholder(placeholder), example.integers)
    graph.output(graph.call_module(name, *as_call(bound)))
    graph.lint()
    return Traces(root, graph, graph, (), {name: cause})


def _trace(tracer: Tracer, model: nn.Module) -> fx.Graph:
    graph = tracer.trace(model)
    tracer.erase_asked()
    for node in graph.nodes:
        node.meta.pop("is_wrapped", None)  # else the generated code wraps the function for every later trace as well
    graph.lint()
    return graph


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

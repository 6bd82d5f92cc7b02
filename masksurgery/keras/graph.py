"""A functional or Sequential Keras model as a flat list of calls, with the models inside of it inlined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import tree
from keras.src.models.functional import Functional

from masksurgery.types import LayoutError, TraceError


@dataclass(eq=False)
class Value:
    """One tensor of the model. `node` is None for an input; the batch is dimension 0."""

    node: Node | None
    shape: tuple[int | None, ...]
    dtype: str
    name: str
    readers: list[Node] = field(default_factory=list, repr=False)


@dataclass(eq=False)
class Node:
    """One call of a layer or an operation.

    Attributes:
        op: The layer or operation of the base model.
        name: Its name in the converted model; inside of nested models theirs stand before it: `backbone_conv1`. (A dot
            in a name is what PyTorch, as a backend, does not take.)
        call: Which call of it, from 0.
        args: Positional arguments, with a Value for each tensor.
        kwargs: The same, by name.
        outputs: What it returns.
    """

    op: Any
    name: str
    call: int
    args: tuple[Any, ...] = field(repr=False)
    kwargs: Mapping[str, Any] = field(repr=False)
    outputs: list[Value] = field(default_factory=list, repr=False)

    @property
    def inputs(self) -> list[Value]:
        return [leaf for leaf in tree.flatten((self.args, dict(self.kwargs))) if isinstance(leaf, Value)]

    @property
    def is_layer(self) -> bool:
        return isinstance(self.op, keras.layers.Layer)


@dataclass(frozen=True)
class Graph:
    """The calls in the order in which they run, from the inputs to the one output.

    Attributes:
        structure: The model's inputs, as it takes them (a tensor, list or dict), with a Value for each.
    """

    name: str
    structure: Any
    inputs: list[Value]
    nodes: list[Node]
    output: Value


def read_graph(model: Any) -> Graph:
    """Read the graph of a built model, which is left unchanged.

    Raises:
        TraceError: It is neither functional nor Sequential, not built, or holds a model that is called in a way that
            cannot be inlined.
        LayoutError: It has several outputs, or channels first.
    """
    name, model = getattr(model, "name", ""), as_functional(model)
    if len(model.outputs) != 1 or isinstance(model.output, Mapping):
        raise LayoutError(
            f"The model '{model.name}' returns {tree.map_structure(lambda x: x.name, model.output)}, and only models "
            f"with one output tensor are converted. Convert keras.Model(model.inputs, model.outputs[0])."
        )
    inputs = {id(x): _value(None, x) for x in model.inputs}
    reader = _Reader()
    (output,) = reader.read(model, [inputs[id(x)] for x in model.inputs], "", {})
    # By identity: `inputs` has the keys of a dict in order, and on some backends map_structure goes as they were given.
    structure = tree.map_structure(lambda x: inputs[id(x)], model.input)
    graph = Graph(name, structure, list(inputs.values()), _needed(reader.nodes, output), output)
    for node in graph.nodes:
        if getattr(node.op, "data_format", None) == "channels_first":
            raise LayoutError(
                f"'{node.name}' ({type(node.op).__name__}) has data_format='channels_first', and only models with "
                f"channels last are converted. Build the model with data_format='channels_last'."
            )
        for value in node.inputs:
            value.readers.append(node)
    return graph


def as_functional(model: Any, where: str = "The model") -> Any:
    """The functional model that holds the graph.

    Raises:
        TraceError: The model is not built, or its graph does not say what it computes.
    """
    kind = type(model).__name__
    if not isinstance(model, (keras.Sequential, Functional)):
        raise TraceError(
            f"{where} is a {kind}, neither functional nor Sequential: what its call() does is not known. Build it "
            f"as keras.Model(inputs, outputs), or put masksurgery.keras.Masksembles1D/2D/3D into its call()."
        )
    if type(model).call not in (keras.Sequential.call, Functional.call):
        raise TraceError(
            f"{where} '{model.name}' is a {kind} with a call() of its own, which its graph does not show. "
            f"Convert keras.Model(model.inputs, model.outputs) if that is all it computes."
        )
    if not model.built or (isinstance(model, keras.Sequential) and not model._functional):
        raise TraceError(f"{where} '{model.name}' is not built: it has no shapes yet. Add keras.Input(shape) first.")
    return model._functional if isinstance(model, keras.Sequential) else model


class _Reader:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.calls: Counter[int] = Counter()
        self.names: dict[int, str] = {}

    def read(self, model: Any, inputs: Sequence[Value], prefix: str, given: Mapping[str, Any]) -> list[Value]:
        """The outputs of a model for given inputs; its calls are appended to `nodes`.

        Args:
            given: What a nested model is called with: `training`, which it hands on to its layers.
        """
        values = {id(x): value for x, value in zip(model.inputs, inputs, strict=True)}

        def read_value(leaf: Any) -> Any:
            return values[id(leaf)] if isinstance(leaf, keras.KerasTensor) else leaf

        for source in _in_order(model):
            args, kwargs = source.arguments.convert(read_value)
            op = source.operation
            taken = given if getattr(op, "_call_has_training_arg", False) else {}
            outputs = self._call(op, self._name(op, f"{prefix}{op.name}"), args, {**kwargs, **taken}, source.outputs)
            values.update({id(x): value for x, value in zip(source.outputs, outputs, strict=True)})
        return [values[id(x)] for x in model.outputs]

    def _name(self, op: Any, name: str) -> str:
        """The name of a layer or operation: that of its first call, which nothing else has."""
        if id(op) not in self.names:
            while name in self.names.values():
                name += "_"
            self.names[id(op)] = name
        return self.names[id(op)]

    def _call(self, op: Any, name: str, args: Any, kwargs: dict[str, Any], outputs: Sequence[Any]) -> list[Value]:
        if isinstance(op, (keras.Sequential, Functional)):
            return self._inline(op, name, args, kwargs)
        node = Node(op, name, self.calls[id(op)], args, kwargs)
        self.calls[id(op)] += 1
        node.outputs = [_value(node, x) for x in outputs]
        self.nodes.append(node)
        return node.outputs

    def _inline(self, model: Any, name: str, args: Any, kwargs: dict[str, Any]) -> list[Value]:
        model = as_functional(model, "The nested model")
        inputs = [leaf for leaf in tree.flatten((args, kwargs)) if isinstance(leaf, Value)]
        # Of several tensors Keras notes their masks of time steps even if none of them has one.
        given = {key: x for key, x in kwargs.items() if any(leaf is not None for leaf in tree.flatten(x))}
        if len(args) != 1 or set(given) - {"training"} or len(inputs) != len(model.inputs):
            raise TraceError(
                f"The nested model '{name}' is called with {len(inputs)} tensors and {sorted(given) or 'no'} keyword "
                f"arguments, and is inlined only if called with its {len(model.inputs)} inputs and `training`."
            )
        if isinstance(args[0], Mapping) != isinstance(model.input, Mapping):
            raise TraceError(f"The nested model '{name}' is called with another structure than its inputs have.")
        for value, x in zip(inputs, model.inputs, strict=True):
            floating = keras.backend.is_float_dtype
            if len(value.shape) != len(x.shape) or (
                value.dtype != x.dtype and not floating(value.dtype) & floating(x.dtype)
            ):
                raise TraceError(
                    f"The nested model '{name}' takes {x.dtype} {x.shape}, and is called with {value.dtype} "
                    f"{value.shape}: Keras would change it on the way in. Give it what it takes."
                )
        return self.read(model, inputs, f"{name}_", given)


def _in_order(model: Any) -> Iterator[Any]:
    """Keras' own nodes between the inputs and the outputs of a model, each after what it reads."""
    done: set[int] = {id(x) for x in model.inputs}
    stack = [(x, False) for x in reversed(model.outputs)]
    while stack:
        tensor, ready = stack.pop()
        if id(tensor) in done:
            continue
        operation, index, _ = tensor._keras_history
        node = operation._inbound_nodes[index]
        if ready:
            done |= {id(x) for x in node.outputs}
            yield node
        else:
            stack.append((tensor, True))
            stack.extend((x, False) for x in reversed(node.input_tensors))


def _needed(nodes: Sequence[Node], output: Value) -> list[Node]:
    """Those that the output needs: of a nested model not every part need be used."""
    needed, stack = set(), [output]
    while stack:
        node = stack.pop().node
        if node is not None and node not in needed:
            needed.add(node)
            stack.extend(node.inputs)
    return [node for node in nodes if node in needed]


def _value(node: Node | None, x: Any) -> Value:
    return Value(node, tuple(x.shape), str(x.dtype), x.name)

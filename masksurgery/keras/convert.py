"""`convert`: a functional or Sequential Keras model, made again with masks in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import keras
from keras import tree

from masksurgery.keras.cloning import clone, copy_weights
from masksurgery.keras.graph import Graph, Node, Value, read_graph
from masksurgery.keras.head import resolve_task
from masksurgery.keras.kinds import is_candidate
from masksurgery.keras.layers import Members, Repeat, mask_type
from masksurgery.keras.model import ConvertedModel
from masksurgery.keras.samples import find_mixed
from masksurgery.keras.sites import Place, find_places, output_layers
from masksurgery.masks import kept_channels, site_seed
from masksurgery.types import ConfigError, ConvertConfig, Site, Surgery, Where


def convert(
    base: Any,
    n: int = 4,
    scale: float = 2.0,
    *,
    where: Where = "all",
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str = (),
    task: Literal["classification", "multilabel", "regression"] | None = None,
    from_logits: bool | None = None,
    rescale: bool = True,
    seed: int = 0,
) -> ConvertedModel:
    """Make a Masksembles ensemble of a functional or Sequential Keras model, with its weights.

    The result is not compiled: compile it as you would the base model, fine-tune it with `fit`, and `predict`.

    Args:
        base: A built model with one output and channels last; left unchanged. Models in it are inlined: the layer
            `conv` of a nested model `backbone` becomes `backbone_conv`.
        n: Number of members.
        scale: At least 1; larger means less overlap between the masks.
        where: "all", or "head": only what the output layers read, which a pretrained model survives untrained.
        include: Globs on layer names. A layer named in full is masked even where the rule would skip it.
        exclude: The same; beats `include`.
        task: By default what the last activation says: softmax is "classification", sigmoid "multilabel" (or a yes or
            no). A model that ends without one needs it, for logits and numbers look alike; "regression" keeps numbers.
        from_logits: By default what the last activation says. Needed where a layer that is not known comes last.
        rescale: Divide the kept channels by the kept share, as dropout does.
        seed: For the masks: one stream of random numbers for each site, from the call and from the place of its layer
            among the base model's convolutions and Dense layers, whatever their names.
    Raises:
        ConfigError, MaskError: An argument has a value that it cannot have.
        TraceError: The model is subclassed, not built, or holds a layer that cannot be made again.
        LayoutError: It has several outputs, or channels first.
        SiteError: Nothing can be masked, or a name matches no layer.
    Source:
        Durasov et al. 2021, arXiv:2012.08334.
    Example:
        >>> layers = [keras.layers.Dense(16, "relu", name="hidden"), keras.layers.Dense(3, "softmax", name="out")]
        >>> model = mk.convert(keras.Sequential([keras.Input((6,)), *layers]))
        >>> print(model.describe())
        4 members, scale 2, seed 0: 1 mask
          hidden: 8 of 16 channels, after hidden
        not masked: 1
          out: output layer: its channels reach the model's output with no convolution or Dense in between
        >>> p = model.predict(np.ones((5, 6)), verbose=0)
        >>> p["mean"].shape, p["variance"].shape, p["members"].shape
        ((5, 3), (5, 3), (5, 4, 3))
    """
    config = ConvertConfig(
        n=n, scale=scale, where=where, include=None if include is None else _several("include", include),
        exclude=_several("exclude", exclude), rescale=rescale, seed=seed,
    )  # fmt: skip
    graph = read_graph(base)
    kind, logits = resolve_task(graph, task, from_logits)
    places, skipped = find_places(graph, config, find_mixed(graph))
    builder = _Builder(graph, config, places)
    inputs, outputs = builder.build()
    sites = tuple(_site(place, builder.masks[place.value].name, config) for place in places)
    surgery = Surgery(
        int(n), float(scale), int(seed), sites, tuple(skipped), _notes(base), output_layers=output_layers(graph)
    )
    model = ConvertedModel(inputs, outputs, name=graph.name, surgery=surgery, task=kind, from_logits=logits)
    builder.copy_weights()
    return model


def _several(argument: str, patterns: Sequence[str] | str) -> tuple[str, ...]:
    found = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in found:
        if not isinstance(pattern, str):
            raise ConfigError(f"{argument} holds {pattern!r}. Pass names of layers, with wildcards such as 'block4_*'.")
    return found


def _site(place: Place, mask: str, config: ConvertConfig) -> Site:
    channels = int(place.value.shape[-1] or 0)
    node = place.value.node.name if place.value.node else place.value.name
    return Site(
        place.layer.name, place.layer.call, node, mask, channels, kept_channels(channels, config.n, config.scale),
        0, len(place.value.shape) - 1, chain=place.chain, readers=tuple(reader.name for reader in place.readers),
    )  # fmt: skip


def _notes(base: Any) -> tuple[str, ...]:
    kind = type(base)
    if kind.__module__.split(".")[0] == "keras":
        return ()
    return (f"{kind.__name__} is a class of its own: its train_step and other methods are not taken over.",)


class _Builder:
    """Calls clones of the layers of a graph on new inputs, with masks and repeats between them."""

    def __init__(self, graph: Graph, config: ConvertConfig, places: Sequence[Place]) -> None:
        self.graph, self.config = graph, config
        self.places = {place.value: place for place in places}
        candidates = dict.fromkeys(id(node.op) for node in graph.nodes if is_candidate(node))
        # By place, for Keras makes up names as it goes: the same model, built a second time, has others.
        self.streams = {op: index for index, op in enumerate(candidates)}
        self.masks: dict[Value, Any] = {}
        self.clones: dict[int, tuple[Any, Any, str]] = {}  # by the base's: that, its clone and the name
        self.names = {node.name for node in graph.nodes} | {value.name for value in graph.inputs}
        self.shared: dict[Value, Any] = {}
        self.own: dict[Value, Any] = {}
        self.masked: dict[Value, Any] = {}
        self.repeated: dict[Value, Any] = {}

    def build(self) -> tuple[Any, Any]:
        """The symbolic inputs, in the base model's structure, and the output [rows, ...]."""
        for value in self.graph.inputs:
            self.shared[value] = keras.Input(value.shape[1:], dtype=value.dtype, name=value.name)
        first = self.shared[self.graph.inputs[0]]
        self.members, self.samples = Members(int(self.config.n), name=self._unused("members"))(first)
        for value in self.graph.inputs:
            self._mask(value)
        for node in self.graph.nodes:
            self._call(node)
        inputs = tree.map_structure(lambda value: self.shared[value], self.graph.structure)
        return inputs, self._read(self.graph.output, None)[0]

    def copy_weights(self) -> None:
        for source, target, name in self.clones.values():
            if isinstance(source, keras.layers.Layer):
                copy_weights(source, target, name)

    def _call(self, node: Node) -> None:
        read = {value: self._read(value, node) for value in node.inputs}
        differs = any(own for _, own in read.values())

        def fill(leaf: Any) -> Any:
            if not isinstance(leaf, Value):
                return leaf
            tensor, own = read[leaf]
            return tensor if own == differs else self._repeat(leaf)

        args, kwargs = tree.map_structure(fill, node.args), tree.map_structure(fill, dict(node.kwargs))
        outputs = tree.flatten(self._clone(node)(*args, **kwargs))
        for value, tensor in zip(node.outputs, outputs, strict=True):
            (self.own if differs else self.shared)[value] = tensor
            self._mask(value)

    def _read(self, value: Value, reader: Node | None) -> tuple[Any, bool]:
        """What a reader gets for a value, and whether the members differ in it."""
        place = self.places.get(value)
        if place is not None and (not place.readers or reader in place.readers):
            return self.masked[value], True
        return (self.own[value], True) if value in self.own else (self.shared[value], False)

    def _mask(self, value: Value) -> None:
        place = self.places.get(value)
        if place is None:
            return
        layer = place.layer
        name = self._unused(f"{layer.name}_mask" + (f"_{layer.call}" if layer.call else ""))
        seed = site_seed(self.config.seed, str(self.streams[id(layer.op)]), layer.call)
        self.masks[value] = mask_type(len(value.shape))(
            self.config.n,
            self.config.scale,
            rescale=self.config.rescale,
            seed=seed,
            data_format="channels_last",
            dtype=value.dtype,  # not of the global policy, which need not be the model's
            name=name,
        )
        x = self.own[value] if value in self.own else self._repeat(value)
        self.masked[value] = self.masks[value](x, members=self.members)

    def _repeat(self, value: Value) -> Any:
        """A value that the members share, once for each of them."""
        if value not in self.repeated:
            name = self._unused(f"{value.node.name if value.node else value.name}_repeat")
            self.repeated[value] = Repeat(name=name)([self.shared[value], self.samples])
        return self.repeated[value]

    def _clone(self, node: Node) -> Any:
        if id(node.op) not in self.clones:
            self.clones[id(node.op)] = node.op, clone(node.op, node.name), node.name
        return self.clones[id(node.op)][1]

    def _unused(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name

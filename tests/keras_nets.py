"""Small Keras models, each named by what it holds, with the sites worked out by hand; and the oracle for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers as L
from keras import ops, tree

Masks = Mapping[tuple[str, int], np.ndarray]


@dataclass(frozen=True)
class Net:
    """`sites`: (layer, call) and the node whose output is masked. `skipped`: layers and how their reasons begin."""

    model: keras.Model
    sites: dict[tuple[str, int], str]
    skipped: dict[str, str]
    settings: dict[str, Any]


OUT = {"out": "output layer"}


def conv(x: Any, channels: int, name: str, size: int = 3) -> Any:
    x = L.Conv2D(channels, size, padding="same", use_bias=False, name=name)(x)
    return L.BatchNormalization(name=f"{name}_bn")(x)


def lenet() -> Net:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)), L.Conv2D(6, 3, activation="elu", name="c1"), L.MaxPooling2D(),
            L.Conv2D(8, 3, name="c2"), L.BatchNormalization(), L.LeakyReLU(name="act2"), L.Dropout(0.2), L.Flatten(),
            L.Dense(12, name="hidden"), L.Activation("tanh", name="act3"), L.Dense(5, activation="softmax", name="out"),
        ]
    )  # fmt: skip
    return Net(model, {("c1", 0): "c1", ("c2", 0): "act2", ("hidden", 0): "act3"}, OUT, {})


def resnet_logits() -> Net:
    inputs = keras.Input((8, 8, 3))
    stem = L.ReLU(name="stem_act")(conv(inputs, 8, "stem"))
    x = L.ReLU(name="a_act")(conv(stem, 8, "a"))
    x = L.ReLU(name="sum_act")(L.Add()([conv(x, 8, "b"), stem]))
    y = L.Add()([conv(L.ReLU(name="d_act")(conv(x, 12, "d")), 12, "e"), conv(x, 12, "shortcut", 1)])
    out = L.Dense(5, name="out")(L.GlobalAveragePooling2D()(y))
    sites = {"stem": "stem_act", "a": "a_act", "b": "b_bn", "d": "d_act", "e": "e_bn", "shortcut": "shortcut_bn"}
    return Net(keras.Model(inputs, out), {(k, 0): v for k, v in sites.items()}, OUT, {"task": "classification"})


def squeeze_excite() -> Net:
    inputs = keras.Input((6, 6, 3))
    x = L.Activation("silu", name="a_act")(conv(inputs, 8, "a"))
    gate = L.Reshape((1, 1, 8))(L.GlobalAveragePooling2D()(x))
    gate = L.Conv2D(4, 1, activation="relu", name="reduce")(gate)
    gate = L.Conv2D(8, 1, activation="sigmoid", name="widen")(gate)
    x = L.Multiply()([x, gate])
    x = L.ReLU(name="b_act")(conv(x, 6, "b"))
    out = L.Dense(3, activation="sigmoid", name="out")(L.Flatten()(x))
    skipped = {"reduce": "gate", "widen": "gate", **OUT}
    return Net(keras.Model(inputs, out), {("a", 0): "a_act", ("b", 0): "b_act"}, skipped, {})


def hard_gate() -> Net:
    """A gate of ReLU6(x + 3) / 6, as MobileNetV3 of keras.applications has it."""
    inputs = keras.Input((6, 6, 3))
    x = L.ReLU(name="a_act")(conv(inputs, 8, "a"))
    gate = L.Conv2D(8, 1, name="gate")(L.GlobalAveragePooling2D(keepdims=True)(x))
    gate = L.ReLU(6.0)(gate + 3.0) * (1.0 / 6.0)
    x = L.ReLU(name="b_act")(conv(L.Multiply()([x, gate]), 6, "b"))
    x = L.Conv2D(4, 6, name="out")(x)
    out = L.Activation("softmax")(L.Flatten()(x))
    return Net(keras.Model(inputs, out), {("a", 0): "a_act", ("b", 0): "b_act"}, {"gate": "gate", **OUT}, {})


def depthwise() -> Net:
    inputs = keras.Input((6, 6, 4))
    x = L.ReLU(6.0)(conv(inputs, 8, "expand", 1))
    x = L.DepthwiseConv2D(3, padding="same", use_bias=False, name="dw")(x)
    x = L.ReLU(6.0, name="dw_act")(L.BatchNormalization()(x))
    x = L.Add()([conv(x, 4, "project", 1), inputs])
    x = L.DepthwiseConv2D(3, name="alone")(x)
    x = L.SeparableConv2D(6, 3, activation="relu", name="separable")(x)
    out = L.Dense(3, activation="softmax", name="out")(L.GlobalMaxPooling2D()(x))
    sites = {"expand": "dw_act", "project": "project_bn", "alone": "alone", "separable": "separable"}
    return Net(keras.Model(inputs, out), {(k, 0): v for k, v in sites.items()}, OUT, {})


def concatenated() -> Net:
    inputs = keras.Input((6, 6, 3))
    x = conv(inputs, 4, "stem")
    y = L.Conv2D(4, 3, padding="same", name="a")(L.ReLU()(x))
    x = L.Concatenate()([x, y])
    x = L.ReLU()(L.BatchNormalization()(x))
    x = L.DepthwiseConv2D(3, name="dw")(x)
    x = L.Conv2DTranspose(6, 2, activation="relu", name="up")(x)
    out = L.Dense(3, activation="softmax", name="out")(L.Flatten()(x))
    skipped = {"dw": "masked", **OUT}
    return Net(keras.Model(inputs, out), {("stem", 0): "stem_bn", ("a", 0): "a", ("up", 0): "up"}, skipped, {})


def nested() -> Net:
    image = keras.Input((6, 6, 3))
    features = L.GlobalAveragePooling2D()(L.ReLU(name="act")(conv(image, 8, "conv")))
    backbone = keras.Model(image, features, name="back")
    backbone.trainable = False
    inputs = keras.Input((6, 6, 3))
    x = backbone(L.Rescaling(0.5)(inputs), training=False)
    top = keras.Sequential([L.Dense(6, activation="relu", name="hidden"), L.Dropout(0.3)], name="top")
    out = L.Dense(4, activation="softmax", name="out")(top(x))
    sites = {("back_conv", 0): "back_act", ("top_hidden", 0): "top_hidden"}
    return Net(keras.Model(inputs, out), sites, OUT, {})


def siamese() -> Net:
    """A nested model that is called twice, and two inputs by name."""
    inner = keras.Sequential(
        [keras.Input((5,)), L.Dense(6, activation="relu", name="d"), L.Dense(4, name="e")], name="s"
    )
    a, b = keras.Input((5,), name="a"), keras.Input((5,), name="b")
    x = L.Concatenate()([inner(a), inner(b)])
    out = L.Dense(1, name="out")(x)
    model = keras.Model({"a": a, "b": b}, out)
    return Net(model, {(k, c): k for k in ("s_d", "s_e") for c in (0, 1)}, OUT, {"task": "regression"})


def called_twice() -> Net:
    inputs = keras.Input((6,))
    shared = L.Dense(6, activation="relu", name="shared")
    out = L.Dense(2, name="out")(shared(shared(inputs)))
    sites = {("shared", 0): "shared", ("shared", 1): "shared"}
    return Net(keras.Model(inputs, out), sites, OUT, {"task": "regression"})


def late_sum() -> Net:
    """What the members share meets what they do not, in a sum, a product and a concatenation."""
    inputs = keras.Input((6,))
    side = L.Rescaling(0.3)(inputs)
    x = L.Dense(6, activation="relu", name="d")(inputs)
    x = L.Concatenate()([L.Add()([x, side]), L.Multiply()([L.Dense(6, name="e")(x), side]), inputs])
    return Net(keras.Model(inputs, L.Dense(3, activation="sigmoid", name="out")(x)),
               {("d", 0): "d", ("e", 0): "e"}, OUT, {})  # fmt: skip


def tokens() -> Net:
    """Words, some of them padding: masks of time steps are repeated too."""
    inputs = keras.Input((5,), dtype="int32")
    x = L.Embedding(7, 6, mask_zero=True)(inputs)
    hidden = L.Dense(8, activation="gelu", name="hidden")(x)
    x = L.LayerNormalization(name="norm")(L.Add()([x, L.Dense(6, name="back")(hidden)]))
    query = L.Dense(6, name="query")(x)
    x = L.MultiHeadAttention(2, 3, name="mha")(query, x)
    x = L.LSTM(6, name="lstm")(x)
    out = L.Dense(3, activation="softmax", name="out")(x)
    sites = {("hidden", 0): "hidden", ("back", 0): "back"}
    return Net(keras.Model(inputs, out), sites, {"query": "gate", **OUT}, {})


def arithmetic() -> Net:
    """Operations that are no layers: known ones, and ones that are tried out."""
    inputs = keras.Input((6,))
    x = ops.relu(L.Dense(6, name="a")(inputs) * 0.5 + np.full((6,), 0.1, "float32"))
    x = L.Dense(8, name="b")(x)
    x = ops.matmul(ops.reshape(x, (-1, 4, 2)), np.ones((2, 3), "float32"))
    x = L.Dense(6, activation="relu", name="c")(L.Flatten()(x))
    out = L.Dense(1, name="out")(x)
    relu = next(op.name for op in keras.Model(inputs, out).operations if type(op).__name__ == "Relu")
    skipped = {"b": "reshaped", **OUT}
    return Net(keras.Model(inputs, out), {("a", 0): relu, ("c", 0): "c"}, skipped, {"task": "regression"})


def volumes() -> Net:
    inputs = keras.Input((4, 4, 4, 1))
    x = L.Conv3D(4, 3, activation="relu", name="c3")(inputs)
    x = L.Conv1D(5, 2, activation="relu", name="c1")(L.Reshape((8, 4))(x))
    out = L.Dense(1, activation="sigmoid", name="out")(L.Flatten()(x))
    return Net(keras.Model(inputs, out), {("c3", 0): "c3", ("c1", 0): "c1"}, OUT, {})


NETS: dict[str, Callable[[], Net]] = {
    net.__name__: net
    for net in (
        lenet, resnet_logits, squeeze_excite, hard_gate, depthwise, concatenated, nested, siamese, called_twice,
        late_sum, tokens, arithmetic, volumes,
    )
}  # fmt: skip


def randomise(model: keras.Model, seed: int = 0) -> None:
    """No weight is zero or one any more, so that every mask makes a difference."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        if not keras.backend.is_float_dtype(weight.dtype):
            continue
        name, shape = weight.name, tuple(weight.shape)
        if any(word in name for word in ("variance", "gamma", "scale")):
            weight.assign(rng.uniform(0.5, 1.5, shape))
        else:
            fan_in = max(np.prod(shape[:-1]), 1) if len(shape) > 1 else 4
            weight.assign(rng.normal(size=shape) * np.sqrt(2 / fan_in))


def inputs_of(model: keras.Model, rows: int, seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)

    def draw(x: Any) -> np.ndarray:
        shape = (rows, *x.shape[1:])
        return rng.integers(0, 7, shape) if "int" in str(x.dtype) else rng.normal(size=shape).astype("float32")

    return tree.map_structure(draw, model.inputs[0] if len(model.inputs) == 1 else dict(model.input))


def to_numpy(x: Any) -> Any:
    return tree.map_structure(lambda leaf: np.array(ops.convert_to_numpy(leaf)), x)


def weights_of(converted: Any, rescale: bool = True) -> dict[tuple[str, int], np.ndarray]:
    """What the rows are multiplied with [n, c], by the masked node."""
    found = {}
    for site in converted.surgery.sites:
        masks = to_numpy(converted.get_layer(site.mask).masks).astype("float64")
        found[site.node, site.call] = masks * (site.channels / site.ones if rescale else 1)
    return found


def run_masked(base: Any, x: Any, masks: Masks) -> np.ndarray:
    """The base model itself, layer by layer, with the output of some calls multiplied."""
    calls: Counter[str] = Counter()

    def run(model: Any, given: Sequence[Any], prefix: str) -> list[Any]:
        model = model._functional if isinstance(model, keras.Sequential) else model
        known = {id(symbol): value for symbol, value in zip(model.inputs, given, strict=True)}

        def value(leaf: Any) -> Any:
            return known[id(leaf)] if isinstance(leaf, keras.KerasTensor) else leaf

        by_depth = model._nodes_by_depth  # Keras' own order
        for node in (node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]):
            if node.is_input:
                continue
            op, name = node.operation, prefix + node.operation.name
            args, kwargs = node.arguments.convert(value)
            if "training" in kwargs:  # what the model is called with overrules it
                kwargs["training"] = False
            if isinstance(op, keras.Model):
                outputs = run(op, tree.flatten(args), f"{name}_")
            else:
                outputs = tree.flatten(op(*args, **kwargs))
                factor = masks.get((name, calls[name]))
                calls[name] += 1
                if factor is not None:
                    time_steps = getattr(outputs[0], "_keras_mask", None)
                    outputs[0] = outputs[0] * ops.convert_to_tensor(factor, dtype=outputs[0].dtype)
                    if time_steps is not None:
                        outputs[0]._keras_mask = time_steps
            known.update({id(symbol): out for symbol, out in zip(node.outputs, outputs, strict=True)})
        return [known[id(symbol)] for symbol in model.outputs]

    (out,) = run(base, [ops.convert_to_tensor(leaf) for leaf in tree.flatten(x)], "")
    return to_numpy(out)


def check_members(base: Any, converted: Any, x: Any, tolerance: float = 2e-5) -> float:
    """The largest difference between the members and the masked base model, to the largest output of a member."""
    members = to_numpy(converted(x)["members"])
    weights = weights_of(converted)
    n = converted.surgery.n
    wanted = np.stack([run_masked(base, x, {key: w[i] for key, w in weights.items()}) for i in range(n)], axis=1)
    assert members.shape == wanted.shape
    differences = np.abs(wanted - wanted.mean(1, keepdims=True)).max() / np.abs(wanted).max()
    assert differences > 1e-3, "the members do not differ"
    return float(np.abs(members - wanted).max() / np.abs(wanted).max())

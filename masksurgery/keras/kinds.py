"""What the layers and operations of Keras do with channels: one word for each family."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import tree

from masksurgery.keras.graph import Node, Value

Kind = str
"""mix, depthwise, norm, pointwise, gate, softmax, pass, pool, move (the channels stay last), join (they become part of
the last dimension), split (they do not stay together), add, mul, concat, unknown"""

_CANDIDATES = (
    "Dense Conv1D Conv2D Conv3D Conv1DTranspose Conv2DTranspose Conv3DTranspose SeparableConv1D SeparableConv2D "
    "DepthwiseConv1D DepthwiseConv2D"
)
CANDIDATES = frozenset(_CANDIDATES.split())
ATTENTION = ("MultiHeadAttention", "GroupedQueryAttention", "GroupQueryAttention", "Attention", "AdditiveAttention")

_LAYERS: dict[Kind, str] = {
    "mix": "Dense Conv1D Conv2D Conv3D Conv1DTranspose Conv2DTranspose Conv3DTranspose SeparableConv1D "
    "SeparableConv2D Embedding MultiHeadAttention GroupedQueryAttention LSTM GRU SimpleRNN Bidirectional ConvLSTM1D "
    "ConvLSTM2D ConvLSTM3D",
    "depthwise": "DepthwiseConv1D DepthwiseConv2D",
    "norm": "BatchNormalization LayerNormalization GroupNormalization RMSNormalization UnitNormalization",
    "pointwise": "Activation ReLU LeakyReLU PReLU ELU Rescaling Normalization LayerScale Masking",
    "pass": "Dropout SpatialDropout1D SpatialDropout2D SpatialDropout3D GaussianDropout GaussianNoise AlphaDropout "
    "ActivityRegularization Identity StochasticDepth",
    "softmax": "Softmax",
    "pool": "MaxPooling1D MaxPooling2D MaxPooling3D AveragePooling1D AveragePooling2D AveragePooling3D "
    "GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D GlobalAveragePooling1D GlobalAveragePooling2D "
    "GlobalAveragePooling3D AdaptiveAveragePooling1D AdaptiveAveragePooling2D AdaptiveAveragePooling3D "
    "AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D UpSampling1D UpSampling2D UpSampling3D "
    "ZeroPadding1D ZeroPadding2D ZeroPadding3D Cropping1D Cropping2D Cropping3D RepeatVector Resizing",
    "reshape": "Flatten Reshape",
    "permute": "Permute",
    "add": "Add Subtract Average Maximum Minimum CustomScaleLayer",
    "mul": "Multiply",
    "concat": "Concatenate",
}
_OPS: dict[Kind, str] = {
    "pointwise": "Relu Relu6 Silu HardSilu HardSwish Gelu Elu Selu Celu LeakyRelu Softplus Softsign Tanh HardTanh "
    "Absolute Abs Negative Square Sqrt Exp Log Clip Cast LogSigmoid TanhShrink HardShrink SoftShrink Threshold Mish "
    "SparsePlus Squareplus",
    "gate": "Sigmoid HardSigmoid SparseSigmoid",
    "softmax": "Softmax",
    "add": "Add Subtract Maximum Minimum",
    "mul": "Multiply",
    "divide": "Divide TrueDivide Power",
    "reshape": "Reshape",
    "concat": "Concatenate",
}
_ACTIVATIONS: dict[Kind, str] = {
    "gate": "sigmoid hard_sigmoid sparse_sigmoid",
    "softmax": "softmax",
    "pointwise": "relu leaky_relu relu6 selu elu celu softplus softsign silu hard_silu gelu tanh tanh_shrink hard_tanh "
    "hard_shrink soft_shrink threshold mish exponential linear squareplus sparse_plus log_sigmoid log_softmax",
}
_SEEN_THROUGH = ("Attention", "AdditiveAttention", "TimeDistributed", "SpectralNormalization")
"""No rule follows channels through them, and yet they keep the samples apart."""


def _by_name(table: dict[Kind, str]) -> dict[str, Kind]:
    return {name: kind for kind, names in table.items() for name in names.split()}


LAYERS, OPS, ACTIVATIONS = _by_name(_LAYERS), _by_name(_OPS), _by_name(_ACTIVATIONS)


def base_name(op: Any) -> str:
    """The name of the Keras class that an object is of, subclasses included; of another class its own name."""
    return _known_class(op) or type(op).__name__


def _known_class(op: Any) -> str | None:
    table = LAYERS if is_layer(op) else OPS
    names = (kind.__name__ for kind in type(op).__mro__ if kind.__module__.split(".")[0] == "keras")
    return next((name for name in names if name in table), None)


def is_layer(op: Any) -> bool:
    return isinstance(op, keras.layers.Layer)


def is_candidate(node: Node) -> bool:
    """A convolution (transposed, separable and depthwise too) or Dense, subclasses included."""
    return node.is_layer and is_keras(node.op, strictly=False) and base_name(node.op) in CANDIDATES


def is_keras(op: Any, strictly: bool = True) -> bool:
    """Its class is one of Keras' own; not strictly: or derived from one that the tables know."""
    if type(op).__module__.split(".")[0] == "keras":
        return True
    return not strictly and _known_class(op) is not None


def kind_of(node: Node) -> Kind:
    """What a call does with the channels of what it reads."""
    op, name = node.op, base_name(node.op)
    if isinstance(op, keras.layers.Wrapper):  # what is inside of it runs on parts of its input
        inner = base_name(op.layer) if is_keras(op.layer) else ""
        return "mix" if LAYERS.get(inner) == "mix" or name == "Bidirectional" else "unknown"
    kind = (LAYERS if node.is_layer else OPS).get(name, "unknown") if is_keras(op, strictly=False) else "unknown"
    if name == "Activation":
        return "pass" if op.activation is keras.activations.linear else activation_kind(op)
    if kind == "reshape":
        return _reshape_kind(node)
    if kind == "permute":
        return "move" if op.dims[-1] == len(op.dims) else "split"
    if kind == "concat":
        return "concat" if op.axis % len(node.outputs[0].shape) else "unknown"
    if kind in ("norm", "softmax"):
        return kind if _over_channels(node, kind) else "unknown"
    if kind == "divide" and (len(node.inputs) > 1 or not node.args or node.args[0] is not node.inputs[0]):
        return "unknown"  # a zero divides something
    if kind in ("add", "mul", "divide") and len(node.inputs) == 1:
        return "gate" if _is_hard_sigmoid(node) else "pointwise"
    if name in ("Conv1D", "Conv2D", "Conv3D") and op.groups == node.inputs[0].shape[-1] and op.groups > 1:
        return "depthwise"
    return kind


def activation_kind(op: Any) -> Kind:
    """pointwise, gate, softmax or, for a function that is not Keras' own, unknown; of a layer without one pointwise."""
    function = getattr(op, "activation", None)
    if function is None:
        return "pointwise"
    if function in (keras.activations.sigmoid, keras.activations.hard_sigmoid):
        return "gate"
    own = getattr(function, "__module__", "").split(".")[0] == "keras"
    name = getattr(function, "__name__", "")
    if is_layer(function) and is_keras(function):
        return {"ReLU": "pointwise", "LeakyReLU": "pointwise", "PReLU": "pointwise", "ELU": "pointwise"}.get(
            base_name(function), "unknown"
        )
    return ACTIVATIONS.get(name, "unknown") if own else "unknown"


def keeps_samples(node: Node) -> bool:
    """It is known to compute each sample by itself when it does not train; what is not known so is to be tried out."""
    op, kind = node.op, kind_of(node)
    if not node.is_layer or not is_keras(op) or (kind == "unknown" and base_name(op) not in _SEEN_THROUGH):
        return False
    if isinstance(op, keras.layers.Wrapper):
        return is_keras(op.layer) and LAYERS.get(base_name(op.layer)) is not None and not _stateful(op.layer)
    if node.kwargs.get("training") and kind != "pass":  # normalises by the batch whatever the mode
        return False
    return not _stateful(op) and activation_kind(op) != "unknown"


def scales_channels(node: Node) -> bool:
    """Its constants, if it is arithmetic, are one number or one a channel (no position embedding)."""
    rank = len(node.outputs[0].shape)
    for leaf in tree.flatten((node.args, dict(node.kwargs))):
        shape = () if isinstance(leaf, Value) else tuple(getattr(leaf, "shape", ()))
        if len(shape) > rank or any(size != 1 for size in shape[:-1]):
            return False
    return True


def _is_hard_sigmoid(node: Node) -> bool:
    """A ReLU up to some height, divided by it: how MobileNetV3 of keras.applications writes its gates."""
    source, name = node.inputs[0].node, base_name(node.op)
    height = getattr(source.op, "max_value", None) if source else None
    if source and base_name(source.op) == "Relu6":
        height = 6.0
    numbers = [leaf for leaf in node.args if isinstance(leaf, (int, float))]
    if not height or len(numbers) != 1 or not numbers[0] or name not in ("Multiply", "Divide", "TrueDivide"):
        return False
    return math.isclose(numbers[0] * float(height) if name == "Multiply" else numbers[0] / float(height), 1)


def _stateful(op: Any) -> bool:
    return bool(getattr(op, "stateful", False))


def _over_channels(node: Node, kind: Kind) -> bool:
    """The channels are the axis that a norm or a softmax works on."""
    rank, axis = len(node.outputs[0].shape), getattr(node.op, "axis", -1)
    axes = list(axis) if isinstance(axis, (list, tuple)) else [axis]
    return [a % rank for a in axes] == [rank - 1]


def _reshape_kind(node: Node) -> Kind:
    """Rows stay; the channels stay last, become a part of the last dimension, or do not stay together."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    channels, last = before[-1], after[-1]
    if channels is None or last is None or len(before) < 2:
        return "split"
    if not node.is_layer and after[0] is not None:
        return "unknown"
    if last == channels:
        return "move"
    return "join" if last % channels == 0 else "split"

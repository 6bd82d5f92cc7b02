"""Layers and operations made again, with the weights of the base model, which is never changed."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from masksurgery.types import TraceError


def clone(op: Any, name: str) -> Any:
    """The same layer or operation without its weights, under another name.

    Raises:
        TraceError: Its configuration does not make another one.
    """
    try:
        config = op.get_config()
        if isinstance(op, keras.layers.Layer) or "name" in config:  # operations of older versions take no name
            config = {**config, "name": name}
        if type(op) is keras.layers.Lambda:  # from_config refuses Python's lambdas, which here come from no file
            functions = {"function": op.function, "output_shape": op._output_shape, "mask": op.mask}
            return keras.layers.Lambda(**{**config, **functions})
        made = type(op).from_config(config)
    except Exception as error:  # whatever get_config and from_config of a class of somebody's own may raise
        raise TraceError(
            f"'{name}' ({type(op).__name__}) cannot be made again from its get_config(): {error}. Give the class a "
            f"get_config() that returns all arguments of its constructor."
        ) from error
    if made.name != name:
        made.name = name
    return made


def copy_weights(source: Any, target: Any, name: str) -> None:
    """Give a built clone the weights of the layer that it was made from, and what it computes of them.

    Raises:
        TraceError: The two do not have the same weights.
    """
    parts = list(zip(source._flatten_layers(), target._flatten_layers(), strict=False))
    for part, other in parts:
        if [w.shape for w in part.weights] == [w.shape for w in other.weights]:
            stored: dict[str, Any] = {}
            part.save_own_variables(stored)
            # Copies: JAX would share the arrays, and give those of the base model away in the first training step.
            # Unlike set_weights this lets a Normalization look at its statistics.
            other.load_own_variables({key: keras.ops.convert_to_numpy(x).copy() for key, x in stored.items()})
    one, two = ([keras.ops.convert_to_numpy(w) for w in layer.weights] for layer in (source, target))
    if len(one) != len(two) or not all(map(_equal, one, two)):
        raise TraceError(
            f"'{name}' ({type(source).__name__}), made again from its get_config(), does not take the weights of the "
            f"base model: {[w.shape for w in one]} there, {[w.shape for w in two]} here. Does its get_config() return "
            f"all arguments of its constructor?"
        )


def _equal(one: np.ndarray, two: np.ndarray) -> bool:
    return one.shape == two.shape and np.array_equal(one, two, equal_nan=one.dtype.kind == "f")

"""Masksembles for Keras 3, on any of its backends: the layers, and `convert` for functional and Sequential models."""

from __future__ import annotations

from masksurgery.types import ConfigError

try:
    import keras  # noqa: F401
except ImportError as error:
    if error.name == "keras":
        raise ConfigError('masksurgery.keras needs Keras 3. Install it: pip install "masksurgery[keras]".') from error
    raise ConfigError(
        f"Keras cannot load its backend ({error}). Install the backend, or set the environment variable KERAS_BACKEND "
        f"before Keras is imported, such as KERAS_BACKEND=torch."
    ) from error

from masksurgery.keras.convert import convert
from masksurgery.keras.layers import Masksembles1D, Masksembles2D, Masksembles3D
from masksurgery.keras.model import ConvertedModel

__all__ = ["ConvertedModel", "Masksembles1D", "Masksembles2D", "Masksembles3D", "convert"]

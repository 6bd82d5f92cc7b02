"""The Keras layers that mask, that decide for all masks, and that repeat what the members share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import keras
import numpy as np
from keras import ops

from masksurgery.masks import generate_masks, kept_channels
from masksurgery.types import ConfigError, MaskError, check_masks_arguments

PACKAGE = "masksurgery"
"""What the layers are registered under, for files that Keras saves."""


class _Masksembles(keras.layers.Layer):
    """Multiplies the channels, which are last, of each row by the mask of its member.

    The masks are a boolean weight `masks` [n, c] that is not trained, row i being member i's. They are drawn when the
    layer is built, saved with the model and restored from the file. A copy made of the configuration alone
    (`from_config`, `keras.models.clone_model`) draws them again: without a seed other ones, until it gets the weights.

    Shape:
        Rows [:b] of x (n*b, ..., c) belong to member 0, and so on. A number of rows that is no multiple of n is dealt
        out in near-equal groups, in the same order. The output is like x in shape, and in the dtype of the layer.
    Raises:
        MaskError: x does not suit the layer, or no such masks exist.
        ConfigError: The channels are not last.
    Source:
        Durasov et al. 2021, arXiv:2012.08334, section 3.
    """

    rank: int | None = None

    def __init__(
        self,
        n: int,
        scale: float,
        *,
        rescale: bool = False,
        seed: int | Sequence[int] | None = None,
        data_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Check the arguments; the masks are drawn once the channels are known.

        Args:
            n: Number of members.
            scale: At least 1; larger means less overlap between the masks.
            rescale: Divide what is kept by the kept share, as dropout does, so that the mean stays.
            seed: For the masks, the same ones as in PyTorch; None draws fresh ones, for each copy too. No global state
                is touched.
            data_format: "channels_last", or None if that is Keras' own setting.
            kwargs: What every Keras layer takes (`name`, `dtype`).
        """
        super().__init__(**kwargs)
        check_masks_arguments(n, scale)
        seen = data_format or (keras.config.image_data_format() if self.rank else "channels_last")
        if seen != "channels_last":
            raise ConfigError(
                f"{type(self).__name__}: data_format={seen!r}, and only 'channels_last' can be masked. "
                f"Pass data_format='channels_last' and permute the input, or use the layers of masksurgery itself."
            )
        self.n, self.scale, self.rescale = int(n), float(scale), bool(rescale)
        self.seed = self._plain(seed)
        self.supports_masking = True  # of time steps, as in Keras: each row keeps its own

    def build(self, input_shape: Sequence[int | None]) -> None:
        shape = tuple(input_shape)
        if len(shape) < 2 or self.rank not in (None, len(shape)):
            self._fail(shape, f"has {len(shape)} dimensions, not {self.rank or '2 or more'}")
        channels = shape[-1]
        if channels is None:
            self._fail(shape, "does not say how many channels there are in the last dimension")
        seed = list(self.seed) if isinstance(self.seed, Sequence) else self.seed  # Keras wraps lists
        drawn = generate_masks(channels, self.n, self.scale, seed=seed)
        self.channels = channels
        self.masks = self.add_weight(
            name="masks",
            shape=drawn.shape,
            initializer=lambda shape, dtype: ops.convert_to_tensor(drawn, dtype=dtype),
            dtype="bool",
            trainable=False,
            autocast=False,
        )

    def call(self, inputs: Any, members: Any = None) -> Any:
        """Mask the rows.

        Args:
            inputs: Activations [rows, ..., c].
            members: Member of each row [rows], as integers; None: the rows are the members' one after another.
        """
        if members is None:
            rows = ops.shape(inputs)[0]
            members = ops.floor_divide(ops.arange(rows, dtype="int32") * self.n, ops.maximum(rows, 1))
        weights = ops.cast(self.masks, inputs.dtype)
        if self.rescale:
            factor = self.channels / kept_channels(self.channels, self.n, self.scale)
            weights = weights * ops.convert_to_tensor(factor, dtype=inputs.dtype)  # a cast would go by way of float32
        picked = ops.take(weights, members, axis=0)
        return inputs * ops.reshape(picked, (-1, *(1,) * (len(inputs.shape) - 2), self.channels))

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        seed = list(self.seed) if isinstance(self.seed, Sequence) else self.seed
        own = {"n": self.n, "scale": self.scale, "rescale": self.rescale, "seed": seed}
        return {**super().get_config(), **own, "data_format": "channels_last"}

    def _plain(self, seed: Any) -> int | list[int] | None:
        """A seed as JSON can hold it."""
        if seed is None:
            return None
        try:
            return int(seed) if isinstance(seed, (int, np.integer)) else [int(part) for part in seed]
        except (TypeError, ValueError) as error:
            raise MaskError(
                f"{type(self).__name__}: seed={seed!r} cannot be saved with the layer. Pass a non-negative integer, a "
                f"sequence of them, or None for fresh entropy."
            ) from error

    def _fail(self, shape: tuple[int | None, ...], seen: str) -> NoReturn:
        raise MaskError(f"{type(self).__name__} '{self.name}': the input of shape {shape} {seen}.")


@keras.saving.register_keras_serializable(PACKAGE)
class Masksembles1D(_Masksembles):
    """Masks the channels of vectors [b, c] and tokens [b, t, c].

    Example:
        >>> layer = mk.Masksembles1D(4, 2.0)
        >>> rows = keras.ops.convert_to_numpy(layer(np.ones((4, 10))))  # row i shows member i's mask
        >>> [int(row.sum()) for row in rows]
        [5, 5, 5, 5]
    """


@keras.saving.register_keras_serializable(PACKAGE)
class Masksembles2D(_Masksembles):
    """Masks the channels of images [b, h, w, c].

    Example:
        >>> tuple(mk.Masksembles2D(4, 2.0)(np.ones((8, 3, 3, 16))).shape)
        (8, 3, 3, 16)
    """

    rank = 4


@keras.saving.register_keras_serializable(PACKAGE)
class Masksembles3D(_Masksembles):
    """Masks the channels of volumes [b, d, h, w, c].

    Example:
        >>> tuple(mk.Masksembles3D(4, 2.0)(np.ones((8, 2, 3, 3, 16))).shape)
        (8, 2, 3, 3, 16)
    """

    rank = 5


def mask_type(rank: int) -> type[_Masksembles]:
    """The layer for tensors of `rank` dimensions."""
    return {4: Masksembles2D, 5: Masksembles3D}.get(rank, Masksembles1D)


@keras.saving.register_keras_serializable(PACKAGE)
class Members(keras.layers.Layer):
    """Decides once per forward, for every mask and repeat: only this layer reads the mode.

    In training each sample goes through one member: near-equal groups of any batch, and over many batches the same
    share for every member. Otherwise all samples go through all members, which stand one after another.

    Shape:
        x (b, ...). Two tensors of integers: member and sample of each row; b rows in training, else n*b.
    Attributes:
        fixed: None, or the member of each sample [b]: used in training instead of a drawn one.
    """

    def __init__(self, n: int, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)
        self.n, self.fixed = n, None
        self.seed_generator = keras.random.SeedGenerator()

    def call(self, inputs: Any, training: bool | None = None) -> tuple[Any, Any]:
        batch = ops.shape(inputs)[0]
        if not training:
            rows, size = ops.arange(self.n * batch, dtype="int32"), ops.maximum(batch, 1)
            return ops.cast(ops.floor_divide(rows, size), "int32"), ops.cast(ops.mod(rows, size), "int32")
        samples = ops.arange(batch, dtype="int32")
        if self.fixed is not None:
            return ops.convert_to_tensor(self.fixed, dtype="int32"), samples
        order = ops.argsort(keras.random.uniform((self.n,), dtype="float32", seed=self.seed_generator))
        return ops.cast(ops.take(order, ops.mod(samples, self.n), axis=0), "int32"), samples

    def compute_output_spec(self, inputs: Any, training: bool | None = None) -> tuple[Any, Any]:
        return keras.KerasTensor((None,), dtype="int32"), keras.KerasTensor((None,), dtype="int32")

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "n": self.n}


@keras.saving.register_keras_serializable(PACKAGE)
class Repeat(keras.layers.Layer):
    """Gives every row what its sample has: what the members share, where it meets what they do not.

    Shape:
        [x (b, ...), samples (rows,)]; result (rows, ...). In training the rows are the samples.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(autocast=False, **kwargs)  # whatever the policy, what it gives has the dtype of x
        self.supports_masking = True

    def call(self, inputs: Sequence[Any]) -> Any:
        x, samples = inputs
        return self._pick(x, samples)

    def compute_mask(self, inputs: Sequence[Any], mask: Sequence[Any] | None = None) -> Any:
        """A mask of time steps is repeated with what it belongs to."""
        return None if mask is None or mask[0] is None else self._pick(mask[0], inputs[1])

    def compute_output_spec(self, inputs: Sequence[Any]) -> Any:
        x, _ = inputs
        return keras.KerasTensor((None, *x.shape[1:]), dtype=x.dtype)

    def _pick(self, x: Any, samples: Any) -> Any:
        same = x.shape[0] is not None and x.shape[0] == samples.shape[0]  # then there is one row for each sample
        return x if same else ops.take(x, samples, axis=0)

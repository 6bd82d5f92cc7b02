"""The modules that a conversion inserts: the masks, what decides for all of them, and what repeats their inputs."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from masksurgery.masks import generate_masks
from masksurgery.types import MaskError, TrainMode


class Assignment(NamedTuple):
    """Which members the samples of one forward go through.

    Attributes:
        repeats: n where every sample goes through all members, else 1.
        index: Member of each sample [b], where it goes through one only.
        aggregate: The outputs of the members are to become a Prediction.
    """

    repeats: int
    index: Tensor | None
    aggregate: bool


class Members(nn.Module):
    """Decides once per forward, for every mask, repeat and the head: nothing else reads the mode.

    `fixed` may hold the member of each sample [b], which is then used in training instead of a drawn one.
    """

    def __init__(self, n: int, train_mode: TrainMode = "split", leaf: int = 0) -> None:
        super().__init__()
        self.n, self.train_mode, self.leaf = n, train_mode, leaf
        self.fixed: Tensor | None = None

    def forward(self, inputs: Any) -> Assignment:
        if not self.training:
            return Assignment(self.n, None, True)
        if self.train_mode == "repeat":
            return Assignment(self.n, None, False)
        x = inputs if isinstance(inputs, Tensor) else tree_leaves(inputs)[self.leaf]
        index = draw_members(x.shape[0], self.n, x.device) if self.fixed is None else self.fixed.to(x.device)
        return Assignment(1, index, False)

    def extra_repr(self) -> str:
        return f"n={self.n}, train_mode={self.train_mode!r}"


def draw_members(batch: int, n: int, device: torch.device | None = None) -> Tensor:
    """A member for each of `batch` samples: near-equal groups, and over many batches the same share for every member.

    Returns:
        Member indices [batch]. The `batch % n` samples that are left over get different members, drawn from torch's
        default generator; a multiple of n draws nothing.
    """
    even = torch.arange(n, device=device).repeat_interleave(batch // n)
    left = batch % n
    return torch.cat([even, torch.randperm(n, device=device)[:left]]) if left else even


def repeat_targets(y: Any, n: int) -> Any:
    """Targets for `train_mode="repeat"`, whose outputs are [n*b, ...] with the members one after another.

    Args:
        y: A tensor [b, ...], or a tuple, list or dict of such tensors.
    """
    leaves, spec = tree_flatten(y)
    return tree_unflatten([torch.cat([leaf] * n) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


class Repeat(nn.Module):
    """Repeats a shared value for the members: tensors along their batch dimension, integers by multiplication.

    Args:
        plan: What to do with each leaf of the value: None to keep it, "scale" for an integer that is proportional to
            the batch size, (batch_dim, outer) for a tensor.
    """

    def __init__(self, plan: list[Literal["scale"] | tuple[int, int] | None]) -> None:
        super().__init__()
        self.plan = plan

    def forward(self, value: Any, members: Assignment) -> Any:
        if members.repeats == 1:
            return value
        leaves, spec = tree_flatten(tuple(value) if isinstance(value, torch.Size) else value)
        return tree_unflatten([self._repeat(*pair, members.repeats) for pair in zip(leaves, self.plan, strict=True)], spec)

    @staticmethod
    def _repeat(leaf: Any, what: Literal["scale"] | tuple[int, int] | None, n: int) -> Any:
        if what is None:
            return leaf
        if what == "scale":
            return leaf * n
        batch_dim, outer = what
        if outer == 1:
            return torch.cat([leaf] * n, batch_dim)
        parts = leaf.unflatten(batch_dim, (outer, -1))
        return torch.cat([parts] * n, batch_dim + 1).flatten(batch_dim, batch_dim + 1)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.plan))


class _Masksembles(nn.Module):
    """Multiplies the channels of each sample by the mask of its member: one multiplication that broadcasts.

    Args:
        channels: Length c of a mask.
        n: Number of members.
        scale: At least 1; larger means less overlap between the masks.
        channel_dim: Where the channels are; by default the last dimension (1D) or dimension 1 (2D, 3D).
        batch_dim: Where the samples are.
        fold: Rows of one sample, one after another, in the batch dimension.
        rescale: Divide what is kept by the kept share, as dropout does, so that the mean stays.
        seed: For the masks; None draws fresh ones.
        masks: Boolean [n, c], instead of generated ones.
    Shape:
        Rows [:b] of x (n*b, ...) belong to member 0, and so on; the output is like x in shape, dtype and memory format.
        A number of rows that is no multiple of n is dealt out in near-equal groups.
    Raises:
        MaskError: No such masks exist, or x has other channels.
    Source:
        Durasov et al. 2021, arXiv:2012.08334, section 3.
    """

    masks: Tensor
    dimensions: tuple[int, ...] | None = None
    default_channel_dim = 1

    def __init__(
        self,
        channels: int,
        n: int,
        scale: float,
        *,
        channel_dim: int | None = None,
        batch_dim: int = 0,
        fold: int = 1,
        rescale: bool = False,
        seed: int | None = None,
        masks: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        if masks is None:
            masks = generate_masks(channels, n, scale, seed=seed)
        if masks.shape != (n, channels):
            raise MaskError(f"masks have the shape {masks.shape}, not (n, channels) = ({n}, {channels}).")
        self.channels, self.n, self.scale = channels, n, scale
        self.channel_dim = self.default_channel_dim if channel_dim is None else channel_dim
        self.batch_dim, self.fold, self.rescale = batch_dim, fold, rescale
        self.kept = int(masks[0].sum())
        self.register_buffer("masks", torch.from_numpy(np.array(masks, dtype=bool)))

    def forward(self, x: Tensor, members: Assignment | None = None, expand: bool = False) -> Tensor:
        """Mask x.

        Args:
            x: Activations.
            members: The decision of the root node; None: the rows of x are the members' one after another.
            expand: x is shared by the members: it has b rows, the result n*b.
        """
        channel_dim = self._check(x)
        weights = self.masks.to(x.dtype)
        if self.rescale:
            weights = weights * (self.channels / self.kept)
        d, rows = self.batch_dim, x.shape[self.batch_dim]
        if members is None and rows % self.n:
            index = torch.arange(rows, device=x.device) * self.n // rows
            return x * self._broadcast(weights[index], x.dim(), d, channel_dim)
        if members is not None and members.index is not None:
            weights = weights[members.index]
            if self.fold > 1:
                weights = weights.repeat_interleave(self.fold, 0)
            return x * self._broadcast(weights, x.dim(), d, channel_dim)
        parts = x.unsqueeze(d) if expand else x.unflatten(d, (self.n, rows // self.n))
        later = channel_dim + 1 if channel_dim > d else channel_dim
        return (parts * self._broadcast(weights, x.dim() + 1, d, later)).flatten(d, d + 1)

    def _check(self, x: Tensor) -> int:
        name = type(self).__name__
        if self.dimensions is not None and x.dim() not in self.dimensions:
            raise MaskError(f"{name} takes {' or '.join(map(str, self.dimensions))} dimensions; x is {tuple(x.shape)}.")
        channel_dim = self.channel_dim % x.dim()
        if x.shape[channel_dim] != self.channels:
            raise MaskError(
                f"{name} masks {self.channels} channels in dimension {channel_dim}; x is {tuple(x.shape)} there "
                f"{x.shape[channel_dim]}. Pass channel_dim= if the channels stand elsewhere."
            )
        return channel_dim

    @staticmethod
    def _broadcast(weights: Tensor, rank: int, row_dim: int, channel_dim: int) -> Tensor:
        shape = [1] * rank
        shape[row_dim], shape[channel_dim] = weights.shape
        return weights.view(shape) if row_dim < channel_dim else weights.t().reshape(shape)

    def extra_repr(self) -> str:
        parts = [f"{self.channels}, n={self.n}, scale={self.scale}, ones={self.kept}"]
        if self.channel_dim != self.default_channel_dim:
            parts.append(f"channel_dim={self.channel_dim}")
        if self.batch_dim:
            parts.append(f"batch_dim={self.batch_dim}")
        if self.fold > 1:
            parts.append(f"fold={self.fold}")
        if self.rescale:
            parts.append("rescale=True")
        return ", ".join(parts)


class Masksembles1D(_Masksembles):
    __doc__ = f"Masks for vectors [b, c] and tokens [b, t, c].\n\n{_Masksembles.__doc__}"
    default_channel_dim = -1


class Masksembles2D(_Masksembles):
    __doc__ = f"Masks for images [b, c, h, w], or with `channel_dim=-1` [b, h, w, c].\n\n{_Masksembles.__doc__}"
    dimensions = (4,)


class Masksembles3D(_Masksembles):
    __doc__ = f"Masks for volumes [b, c, d, h, w], or with `channel_dim=-1` [b, d, h, w, c].\n\n{_Masksembles.__doc__}"
    dimensions = (5,)


def mask_type(rank: int) -> type[_Masksembles]:
    """The layer for tensors of `rank` dimensions."""
    return {4: Masksembles2D, 5: Masksembles3D}.get(rank, Masksembles1D)

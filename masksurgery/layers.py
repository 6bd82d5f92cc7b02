"""The modules that a conversion inserts: the masks, what decides for all of them, and what repeats their inputs."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from masksurgery.masks import Seed, generate_masks
from masksurgery.types import MaskError, TrainMode, check_masks_arguments

RepeatStep = Literal["scale"] | tuple[int, int] | None
"""What `Repeat` does with one leaf of a value."""


class Assignment(NamedTuple):
    """Which members the samples of one forward go through.

    Attributes:
        repeats: n where every sample goes through all members, else 1.
        index: Member of each sample [b], where it goes through one only.
        aggregate: The outputs of the members are to become a Prediction.
    """

    repeats: int
    index: Tensor | None  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    aggregate: bool


class Members(nn.Module):
    """Decides once per forward, for every mask, repeat and the head: nothing else reads the mode.

    Args:
        n: Number of members.
        train_mode: "split" sends each sample of a training batch through one member, "repeat" through all.
        leaf: Which leaf of the input tells the batch size, where the input is a tuple, a list or a dict.
    Attributes:
        fixed: None, or the member of each sample [b]: used in training with "split" instead of a drawn one.
        followed: Masks inside of an opaque module ask for the decision.
        latest: The last decision, if it is followed.
    """

    def __init__(self, n: int, train_mode: TrainMode = "split", leaf: int = 0) -> None:
        super().__init__()
        self.n, self.train_mode, self.leaf = n, train_mode, leaf
        self.fixed: Tensor | None = None
        self.followed = False
        self.latest: Assignment | None = None

    def forward(self, inputs: Any) -> Assignment:
        assignment = self._assign(inputs)
        if self.followed:
            self.latest = assignment
        return assignment

    def _assign(self, inputs: Any) -> Assignment:
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
        y: A tensor [b, ...], or a tuple, list or dict of such tensors. Tensors without dimensions, numbers, strings
            and None belong to no sample and stay as they are.
        n: Number of members.
    Returns:
        The same structure, with tensors [n*b, ...].
    Raises:
        MaskError: n is not a number of members, or something in y cannot be repeated.
    Example:
        >>> masksurgery.repeat_targets(torch.tensor([7, 8]), 3)
        tensor([7, 8, 7, 8, 7, 8])
    """
    check_masks_arguments(n, 1)

    def repeat(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return torch.cat([leaf] * n) if leaf.dim() else leaf
        if leaf is None or isinstance(leaf, (bool, int, float, str)):
            return leaf
        raise MaskError(
            f"repeat_targets takes tensors, and tuples, lists and dicts of them; it cannot repeat a "
            f"{type(leaf).__name__}. Pass the tensors in it."
        )

    return tree_map(repeat, y)


class Repeat(nn.Module):
    """Repeats a shared value for the members: tensors along their batch dimension, integers by multiplication.

    Args:
        plan: What to do with each leaf of the value: None to keep it, "scale" for an integer that is proportional to
            the batch size, (batch_dim, outer) for a tensor that holds the whole batch `outer` times.
    """

    def __init__(self, plan: list[RepeatStep]) -> None:
        super().__init__()
        self.plan = plan

    def forward(self, value: Any, members: Assignment) -> Any:
        if members.repeats == 1:
            return value
        leaves, spec = tree_flatten(value)
        repeated = [_repeat(leaf, step, members.repeats) for leaf, step in zip(leaves, self.plan, strict=True)]
        # As part of a tree a torch.Size would come back as a plain tuple, which has no numel().
        return torch.Size(repeated) if isinstance(value, torch.Size) else tree_unflatten(repeated, spec)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.plan))


def _repeat(leaf: Any, step: RepeatStep, n: int) -> Any:
    if step is None:
        return leaf
    if step == "scale":
        return leaf * n
    batch_dim, outer = step
    if outer == 1:
        return torch.cat([leaf] * n, batch_dim)
    parts = leaf.unflatten(batch_dim, (outer, -1))
    return torch.cat([parts] * n, batch_dim + 1).flatten(batch_dim, batch_dim + 1)


class _Masksembles(nn.Module):
    """Multiplies the channels of each sample by the mask of its member: one multiplication that broadcasts.

    The masks are a persistent boolean buffer `masks` [n, c], row i being member i's.

    Attributes:
        expands_single: A single row, with no decision of a root node, goes through all members and becomes n rows. So
            do the layers of masksembles 1.1.1, which `adopt` replaces.
    Shape:
        Rows [:b] of x (n*b, ...) belong to member 0, and so on. A number of samples that is no multiple of n is dealt
        out in near-equal groups, in the same order. The output is like x in shape, dtype and memory format.
    Raises:
        MaskError: x does not suit the masks.
    Source:
        Durasov et al. 2021, arXiv:2012.08334, section 3.
    """

    masks: Tensor
    rank: int | None = None
    default_channel_dim = 1
    expands_single = False

    def __init__(
        self,
        channels: int,
        n: int,
        scale: float,
        *,
        channel_dim: int | None = None,
        batch_dim: int = 0,
        fold: int = 1,
        outer: int = 1,
        rescale: bool = False,
        seed: Seed = None,
        masks: np.ndarray | None = None,
    ) -> None:
        """Draw the masks.

        Args:
            channels: Length c of a mask.
            n: Number of members.
            scale: At least 1; larger means less overlap between the masks.
            channel_dim: Where the channels are; by default the last dimension (1D) or dimension 1 (2D, 3D).
            batch_dim: Where the samples are, counted from 0.
            fold: Rows of one sample, one after another, in the batch dimension.
            outer: How many times the whole batch stands in the batch dimension.
            rescale: Divide what is kept by the kept share, as dropout does, so that the mean stays.
            seed: For the masks; None draws fresh ones. The global random state is never touched.
            masks: Boolean [n, c] with equally many ones in every row, instead of drawn ones.
        Raises:
            MaskError: No such masks exist, or `masks` are not of this kind.
        """
        super().__init__()
        if batch_dim < 0 or fold < 1 or outer < 1:
            raise MaskError(
                f"batch_dim={batch_dim}, fold={fold}, outer={outer}: count dimensions from 0, rows and batches from 1."
            )
        if masks is None:
            masks = generate_masks(channels, n, scale, seed=seed)
        else:
            check_masks_arguments(n, scale)
            masks = np.array(masks)
            _check_masks(masks, channels, n)
        self.channels, self.n, self.scale = channels, n, scale
        self.channel_dim = self.default_channel_dim if channel_dim is None else channel_dim
        self.batch_dim, self.fold, self.outer, self.rescale = batch_dim, fold, outer, rescale
        self.kept = int(masks[0].sum())
        self.register_buffer("masks", torch.from_numpy(masks))

    def forward(self, x: Tensor, members: Assignment | None = None, expand: bool = False) -> Tensor:
        """Mask x.

        Args:
            x: Activations.
            members: The decision of the root node; None: the rows of x are the members' one after another.
            expand: x is shared by the members: where all of them are asked for, its b rows become n*b.
        """
        d, channel_dim = self.batch_dim, self._find_channels(x)
        samples = self._count_samples(x)
        weights = self.masks.to(x.device, x.dtype)  # a model without data has masks with data
        if self.rescale:
            weights = weights * (self.channels / self.kept)
        index = None if members is None else members.index
        expand = expand or (self.expands_single and members is None and samples == 1)
        if members is None and not expand and samples % self.n:
            index = torch.arange(samples, device=x.device) * self.n // samples
        if index is not None and index.shape[0] != samples:  # len() would fix the size in an export
            self._fail(x, f"has {samples} samples in dimension {d}, and members were assigned to {index.shape[0]}")
        if index is None and not expand and samples % self.n:
            self._fail(x, f"has {samples} samples in dimension {d}, which is no multiple of n={self.n}")
        if self.outer > 1:  # the batches first, then the rows of one batch
            x, d, channel_dim = x.unflatten(d, (self.outer, -1)), d + 1, channel_dim + (channel_dim > d)
        if index is not None:
            weights = weights[index]
            if self.fold > 1:
                weights = weights.repeat_interleave(self.fold, 0)
            out = x * _broadcast(weights, x.dim(), d, channel_dim)
        else:
            parts = x.unsqueeze(d) if expand else x.unflatten(d, (self.n, x.shape[d] // self.n))
            later = channel_dim + 1 if channel_dim > d else channel_dim
            out = (parts * _broadcast(weights, x.dim() + 1, d, later)).flatten(d, d + 1)
        return out.flatten(d - 1, d) if self.outer > 1 else out

    def _find_channels(self, x: Tensor) -> int:
        """The channel dimension of x, counted from 0, once x is found to have the right ones."""
        rank, d = x.dim(), self.channel_dim
        if self.rank not in (None, rank):
            self._fail(x, f"has {rank} dimensions, not {self.rank}")
        if not -rank <= d < rank or d % rank == self.batch_dim or self.batch_dim >= rank:
            self._fail(x, f"has no dimensions batch_dim={self.batch_dim} and channel_dim={d} beside each other")
        if x.shape[d] != self.channels:
            self._fail(x, f"has {x.shape[d]} channels in dimension {d}. Pass channel_dim= if they are elsewhere")
        return d % rank

    def _count_samples(self, x: Tensor) -> int:
        rows, of_one = x.shape[self.batch_dim], self.fold * self.outer
        if rows % of_one:
            parts = f"fold={self.fold}" + (f" times outer={self.outer}" if self.outer > 1 else "")
            self._fail(x, f"has {rows} rows in dimension {self.batch_dim}, which is no multiple of {parts}")
        return rows // of_one

    def _fail(self, x: Tensor, seen: str) -> NoReturn:
        raise MaskError(f"{self}: x of shape {tuple(x.shape)} {seen}.")

    def extra_repr(self) -> str:
        parts = [f"{self.channels}, n={self.n}, scale={self.scale}, ones={self.kept}"]
        if self.channel_dim != self.default_channel_dim:
            parts.append(f"channel_dim={self.channel_dim}")
        if self.batch_dim:
            parts.append(f"batch_dim={self.batch_dim}")
        if self.fold > 1:
            parts.append(f"fold={self.fold}")
        if self.outer > 1:
            parts.append(f"outer={self.outer}")
        if self.rescale:
            parts.append("rescale=True")
        return ", ".join(parts)


def _check_masks(masks: np.ndarray, channels: int, n: int) -> None:
    if masks.shape != (n, channels):
        raise MaskError(f"masks have the shape {masks.shape}, not (n, channels) = ({n}, {channels}).")
    if masks.dtype != np.bool_:
        raise MaskError(f"masks are {masks.dtype}, not boolean. Pass masks.astype(bool) if they hold zeros and ones.")
    ones = masks.sum(1)
    if ones.min() != ones.max() or not ones.min():
        raise MaskError(f"masks have {ones.tolist()} ones. Every mask needs the same number of them, at least 1.")


def _broadcast(weights: Tensor, rank: int, row_dim: int, channel_dim: int) -> Tensor:
    """[rows, c] to `rank` dimensions, of length 1 but for these two."""
    shape = [1] * rank
    shape[row_dim], shape[channel_dim] = weights.shape
    return (weights if row_dim < channel_dim else weights.t()).reshape(shape)


class Masksembles1D(_Masksembles):
    """Masks the channels of vectors [b, c] and tokens [b, t, c].

    Example:
        >>> layer = masksurgery.Masksembles1D(10, 4, 2.0)
        >>> rows = layer(torch.ones(4, 10))  # one row for each member: row i shows member i's mask
        >>> rows.sum(1)
        tensor([5., 5., 5., 5.])
        >>> torch.equal(rows, layer.masks.float())
        True
    """

    default_channel_dim = -1


class Masksembles2D(_Masksembles):
    """Masks the channels of images [b, c, h, w], or with channel_dim=-1 [b, h, w, c].

    Example:
        >>> masksurgery.Masksembles2D(64, 4, 2.0)
        Masksembles2D(64, n=4, scale=2.0, ones=34)
    """

    rank = 4


class Masksembles3D(_Masksembles):
    """Masks the channels of volumes [b, c, d, h, w], or with channel_dim=-1 [b, d, h, w, c].

    Example:
        >>> masksurgery.Masksembles3D(16, 4, 2.0)(torch.ones(8, 16, 2, 3, 3)).shape
        torch.Size([8, 16, 2, 3, 3])
    """

    rank = 5


def mask_type(rank: int) -> type[_Masksembles]:
    """The layer for tensors of `rank` dimensions."""
    return {4: Masksembles2D, 5: Masksembles3D}.get(rank, Masksembles1D)

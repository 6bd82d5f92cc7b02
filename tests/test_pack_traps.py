"""Networks in which packing can go wrong without an error: what is called twice, changed in place, mixed or moved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masksurgery
from masksurgery import ConfigError, MasksurgeryError
from nets import randomise
from packing import assert_packed


class Trap(nn.Module):
    """A network of named parts whose forward is a function of them and of x."""

    def __init__(self, forward: Callable[[Trap, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def shared_layer(self: Trap, x: Tensor) -> Tensor:
    """One convolution with a norm for each of its calls, as detectors have for each size."""
    x = F.relu(self.stem(x))
    one, other = F.relu(self.bn1(self.conv(x))), F.relu(self.bn2(self.conv(F.max_pool2d(x, 2))))
    return self.head(torch.cat([one.mean((2, 3)), other.mean((2, 3))], 1))


def shared_layer_before_masks(self: Trap, x: Tensor) -> Tensor:
    x = self.bn1(self.conv(x)) + self.bn2(self.conv(F.avg_pool2d(x, 3, 1, 1)))
    return self.head(F.relu(self.last(F.relu(x))).mean((2, 3)))


def output_size(self: Trap, x: Tensor) -> Tensor:
    x = F.relu(self.stem(x))
    up = self.up(F.relu(self.down(F.max_pool2d(x, 2))), output_size=x.shape[2:])
    return self.head(F.relu(self.last(torch.cat([x, up], 1))).mean((2, 3)))


def linear_over_time(self: Trap, x: Tensor) -> Tensor:
    """A layer mixes what the mask does not stand along; the mask cannot be left to it."""
    x = F.relu(self.stem(x))
    return self.head(torch.cat([F.relu(self.time(x)).mean(2), F.relu(self.last(x)).mean(2)], 1))


def groups_behind_the_stem(self: Trap, x: Tensor) -> Tensor:
    return self.head(F.relu(self.last(self.grouped(F.relu(self.stem(x))))).mean((2, 3)))


def torch_relu_(self: Trap, x: Tensor) -> Tensor:
    x = self.stem(x)
    torch.relu_(x)
    return self.head(F.relu(self.last(x)).mean((2, 3)))


def identity_before_in_place(self: Trap, x: Tensor) -> Tensor:
    """The shortcut is the tensor that the activation changes."""
    x = self.stem(x)
    shortcut = self.identity(x)
    return self.head((self.last(self.act(x)) + shortcut).mean((2, 3)))


def pool_over_features(self: Trap, x: Tensor) -> Tensor:
    x = F.relu(self.last(F.relu(self.stem(x.mean((2, 3))))))
    return self.head(F.avg_pool1d(x[:, None], 3, 1, 1)[:, 0])


def norm_after_roll(self: Trap, x: Tensor) -> Tensor:
    x = F.relu(self.bn1(torch.roll(self.last(F.relu(self.stem(x))), 3, 1)))
    return self.head(x.mean((2, 3)))


def norm_after_flip(self: Trap, x: Tensor) -> Tensor:
    x = F.relu(self.bn1(self.last(F.relu(self.stem(x))).flip(1)))
    return self.head(x.mean((2, 3)))


def pad_with_infinity(self: Trap, x: Tensor) -> Tensor:
    x = F.pad(F.relu(self.stem(x)), (0, 1, 0, 1), value=-torch.inf)
    return self.head(F.relu(self.last(F.max_pool2d(x, 2))).mean((2, 3)))


def view_after_convolution(self: Trap, x: Tensor) -> Tensor:
    x = F.relu(self.last(F.relu(self.stem(x))))
    return self.head(x.view(x.size(0), -1))


def cast_as_another(self: Trap, x: Tensor) -> Tensor:
    x = F.relu(self.stem(x))
    return self.head(F.relu(self.last(x)).mean((2, 3)).type_as(x))


def channel_attention(self: Trap, x: Tensor) -> Tensor:
    """A convolution over the channels, as in ECA-Net: it mixes each with its neighbours."""
    x = F.relu(self.last(F.relu(self.stem(x))))
    gate = self.over(x.mean((2, 3))[:, None])[:, 0].sigmoid()
    return self.head((x * gate[..., None, None]).mean((2, 3)))


def channel_attention_transposed(self: Trap, x: Tensor) -> Tensor:
    return channel_attention(self, x)


def pixel_attention(self: Trap, x: Tensor) -> Tensor:
    x = F.relu(self.last(F.relu(self.stem(x))))
    rows = x.flatten(2).transpose(1, 2)[:, None]  # [b, 1, h*w, c]
    return self.head((x.flatten(2).transpose(1, 2) * self.over(rows)[:, 0].sigmoid()).mean(1))


class CentreNorm(nn.Module):
    """Has no parameters, and reads all channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class LayerNorm(nn.Module):
    """Over channels that do not stand last, as ConvNeXt's authors wrote it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.normalized_shape = (channels,)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / ((x - mean).pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


def norm_of_few_channels(self: Trap, x: Tensor) -> Tensor:
    x = self.norm(F.relu(self.stem(x)) + F.relu(self.aside(x)))
    return self.head(F.relu(self.last(x)).mean((2, 3)))


def norm_of_the_name(self: Trap, x: Tensor) -> Tensor:
    return self.head(self.norm(self.last(F.relu(self.stem(x)))).mean((2, 3)))


def dropped_out_and_changed(self: Trap, x: Tensor) -> Tensor:
    """In eval, dropout returns what it is given."""
    x = self.last(F.relu(self.stem(x)))
    y = F.relu(F.dropout2d(x, 0.5, self.training), inplace=True)
    return self.head((self.more(y) + x).mean((2, 3)))


def cast_and_changed(self: Trap, x: Tensor) -> Tensor:
    x = self.last(F.relu(self.stem(x)))
    y = x.to(x.dtype)
    x.relu_()
    return self.head((self.more(y) - y).mean((2, 3)))


def laid_out_and_changed(self: Trap, x: Tensor) -> Tensor:
    """A copy, which may be changed."""
    x = self.last(F.relu(self.stem(x)))
    y = F.relu(x.contiguous(memory_format=torch.channels_last), inplace=True)
    return self.head((self.more(y) + x).mean((2, 3)))


def permuted_and_changed(self: Trap, x: Tensor) -> Tensor:
    x = self.last(F.relu(self.stem(x)))
    y = F.relu(x.permute(0, 2, 3, 1).contiguous(), inplace=True).permute(0, 3, 1, 2)
    return self.head((self.more(y) + x).mean((2, 3)))


def half_of_a_chunk(self: Trap, x: Tensor) -> Tensor:
    return self.head(self.more(F.relu(self.stem(x))).chunk(2, 1)[0].mean((2, 3)))


def last_of_a_split(self: Trap, x: Tensor) -> Tensor:
    return self.head(self.more(F.relu(self.stem(x))).split(12, 1)[1].mean((2, 3)))


def one_of_many(self: Trap, x: Tensor) -> Tensor:
    return self.head(F.relu(self.last(F.relu(self.stem(x)))).unbind(2)[3].topk(2, 2)[0].mean(2))


def interpolated_features(self: Trap, x: Tensor) -> Tensor:
    x = F.relu(self.stem(x.mean((2, 3))))
    up = F.interpolate(x[:, None], size=12, mode="linear")[:, 0]
    return self.head(F.relu(self.last(x * up)))


def norm_of_pixels(self: Trap, x: Tensor) -> Tensor:
    """A BatchNorm whose channels are no channels."""
    x = F.relu(self.stem(x)).flatten(2).transpose(1, 2)  # [b, h*w, c]
    x = x + self.dense(x)
    return self.head(F.relu(self.norm(x)).mean(1))


def mixed_after_a_norm_of_pixels(self: Trap, x: Tensor) -> Tensor:
    x = self.stem(x).flatten(2).transpose(1, 2)
    return self.head(F.relu(self.dense(self.norm(x + self.more(x)))).mean(1))


def conv(inputs: int, outputs: int, size: int = 1, **kwargs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **kwargs)


STEM = {"stem": lambda: conv(3, 12, 3), "last": lambda: conv(12, 12)}
NORMS = {"bn1": lambda: nn.BatchNorm2d(12), "bn2": lambda: nn.BatchNorm2d(12)}
HEAD = {"head": lambda: nn.Linear(12, 4)}
TRAPS: dict[Callable[[Trap, Tensor], Tensor], dict[str, Callable[[], nn.Module]]] = {
    shared_layer: {
        "stem": lambda: conv(3, 8),
        "conv": lambda: conv(8, 12, 3),
        **NORMS,
        "head": lambda: nn.Linear(24, 4),
    },
    shared_layer_before_masks: {"conv": lambda: conv(3, 12, 3), "last": STEM["last"], **NORMS, **HEAD},
    output_size: {
        "stem": lambda: conv(3, 8, 3),
        "down": lambda: conv(8, 8),
        "up": lambda: nn.ConvTranspose2d(8, 8, 2, stride=2),
        "last": lambda: conv(16, 12),
        **HEAD,
    },
    groups_behind_the_stem: {**STEM, "grouped": lambda: conv(12, 12, groups=4), **HEAD},
    torch_relu_: {**STEM, **HEAD},
    identity_before_in_place: {**STEM, **HEAD, "identity": nn.Identity, "act": lambda: nn.ReLU(inplace=True)},
    pool_over_features: {"stem": lambda: nn.Linear(3, 12), "last": lambda: nn.Linear(12, 12), **HEAD},
    norm_after_roll: {**STEM, **NORMS, **HEAD},
    norm_after_flip: {**STEM, **NORMS, **HEAD},
    pad_with_infinity: {**STEM, **HEAD},
    view_after_convolution: {**STEM, "head": lambda: nn.Linear(12 * 81, 4)},
    cast_as_another: {**STEM, **HEAD},
    channel_attention: {**STEM, "over": lambda: nn.Conv1d(1, 1, 3, padding=1), **HEAD},
    channel_attention_transposed: {**STEM, "over": lambda: nn.ConvTranspose1d(1, 1, 3, padding=1), **HEAD},
    pixel_attention: {**STEM, "over": lambda: conv(1, 1, 3), **HEAD},
    norm_of_few_channels: {
        "stem": lambda: conv(3, 2),
        "aside": lambda: conv(3, 2),
        "norm": CentreNorm,
        "last": lambda: conv(2, 12),
        **HEAD,
    },
    norm_of_the_name: {**STEM, "norm": lambda: LayerNorm(12), **HEAD},
    dropped_out_and_changed: {**STEM, "more": lambda: conv(12, 12), **HEAD},
    cast_and_changed: {**STEM, "more": lambda: conv(12, 12), **HEAD},
    laid_out_and_changed: {**STEM, "more": lambda: conv(12, 12), **HEAD},
    permuted_and_changed: {**STEM, "more": lambda: conv(12, 12), **HEAD},
    half_of_a_chunk: {"stem": STEM["stem"], "more": lambda: conv(12, 24), **HEAD},
    last_of_a_split: {"stem": STEM["stem"], "more": lambda: conv(12, 24), **HEAD},
    one_of_many: {**STEM, **HEAD},
    interpolated_features: {"stem": lambda: nn.Linear(3, 12), "last": lambda: nn.Linear(12, 12), **HEAD},
    norm_of_pixels: {
        "stem": STEM["stem"],
        "dense": lambda: nn.Linear(12, 12),
        "norm": lambda: nn.BatchNorm1d(81),
        **HEAD,
    },
    mixed_after_a_norm_of_pixels: {
        "stem": STEM["stem"],
        "more": lambda: nn.Linear(12, 12),
        "dense": lambda: nn.Linear(12, 12),
        "norm": lambda: nn.BatchNorm1d(81),
        **HEAD,
    },
}


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 9, 9, generator=torch.Generator().manual_seed(batch)).double()


def check(base: nn.Module, x: Tensor, **options: object) -> None:
    model = masksurgery.convert(base, example_inputs=(x,), **options)  # type: ignore[arg-type]
    for dense in (False, True):
        packed = masksurgery.pack(model, "unrolled", dense=dense)
        for batch in (x, x[:1]):
            assert_packed(packed, model, (batch,))
    try:
        packed = masksurgery.pack(model, "grouped")
    except ConfigError as error:
        assert 'layout="grouped" is not possible' in str(error)  # noqa: PT017  # it may be possible too
    else:
        assert_packed(packed, model, (x,))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_packed_is_converted(trap: Callable[[Trap, Tensor], Tensor], seed: int) -> None:
    base = Trap(trap, **{name: make() for name, make in TRAPS[trap].items()})
    base = randomise(base, seed).double().eval()
    exclude = ["grouped"] if trap is groups_behind_the_stem else ()
    check(base, images(), exclude=exclude, seed=seed)
    if trap in (norm_of_few_channels, mixed_after_a_norm_of_pixels):  # where the sum leaves out channels
        check(base, images(), seed=seed, n=2, tie="stream")


def test_a_mask_along_another_dimension() -> None:
    parts = {"stem": nn.Conv1d(3, 8, 3), "time": nn.Linear(10, 6), "last": nn.Conv1d(8, 8, 3), "head": nn.Linear(16, 4)}
    check(randomise(Trap(linear_over_time, **parts)).double().eval(), torch.randn(3, 3, 12).double())


def test_a_view_of_what_is_changed_in_place() -> None:
    def forward(self: Trap, x: Tensor) -> Tensor:
        x = self.stem(x)
        x.chunk(2, 1)[0].relu_()
        return self.head(F.relu(self.last(x)).mean((2, 3)))

    base = Trap(forward, **{name: make() for name, make in {**STEM, **HEAD}.items()}).double().eval()
    model = masksurgery.convert(base, example_inputs=(images(),))
    with pytest.raises(
        MasksurgeryError, match="changes 'getitem' in place, which shares memory with 'stem', and 'last'"
    ):
        masksurgery.pack(model)


def test_autocast() -> None:
    """Where branches and streams have different types."""

    def forward(self: Trap, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x)).float()
        return self.head((x + self.last(F.relu(self.hidden(x)))).mean((2, 3)))

    parts = {**STEM, "hidden": lambda: conv(12, 12), **HEAD}
    base = randomise(Trap(forward, **{name: make() for name, make in parts.items()})).eval()
    model = masksurgery.convert(base, example_inputs=(images().float(),))
    for dense in (False, True):
        packed = masksurgery.pack(model, "unrolled", dense=dense)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            torch.testing.assert_close(
                packed(images().float()).mean.float(), model(images().float()).mean.float(), rtol=0.05, atol=0.05
            )

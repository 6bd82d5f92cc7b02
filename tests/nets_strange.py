"""Hazard nets with unusual parts: recurrent networks, einops, and parametrised, lazy and compiled modules."""

from __future__ import annotations

import warnings

import einops
import torch
import torch.nn.functional as F
from einops.layers.torch import Rearrange, Reduce
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from nets_base import hazard, shaped
from nets_conv import Classifier, conv3

IMAGE = shaped((3, 8, 8))
TOKENS = shaped((6, 5))
VECTOR = shaped((5,))
OUTPUT = {"head": "output"}


# A recurrent network mixes channels, as a Linear does, and is no candidate itself.
@hazard("lstm", TOKENS, "stem->fn:gelu fc->fn:gelu", skipped=OUTPUT, dims={"stem": (0, 2), "fc": (0, 2)})
class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rnn = nn.Linear(5, 8), nn.LSTM(8, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.fc, self.head = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.rnn(F.gelu(self.stem(x)))
        return self.head(F.gelu(self.fc(x)).mean(1))


# The last states [layers, b, c] have the batch at dimension 1, and lose the layers before fc.
@hazard("lstm_sequence_first", TOKENS, "stem->stem fc->fn:gelu", skipped=OUTPUT, dims={"stem": (1, 2), "fc": (0, 1)})
class LstmSequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rnn = nn.Linear(5, 8), nn.LSTM(8, 6, num_layers=2)
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, cell) = self.rnn(self.stem(x.transpose(0, 1)))
        return self.head(F.gelu(self.fc(hidden[-1] + cell[0])))


# The first state is made from the batch size, and so is it for the members.
@hazard("gru", TOKENS, "stem->fn:gelu fc->fn:gelu", skipped=OUTPUT, dims={"stem": (0, 2), "fc": (0, 1)})
class Gru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rnn = nn.Linear(5, 8), nn.GRU(8, 6, batch_first=True)
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(1, x.shape[0], 6, dtype=x.dtype, device=x.device)
        x, _ = self.rnn(F.gelu(self.stem(x)), state)
        return self.head(F.gelu(self.fc(x[:, -1])))


@hazard("gru_sequence_first", TOKENS, "stem->stem fc->fn:gelu", skipped=OUTPUT, dims={"stem": (1, 2), "fc": (1, 2)})
class GruSequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.rnn = nn.Linear(5, 8), nn.GRU(8, 6, bidirectional=True)
        self.fc, self.head = nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.rnn(self.stem(x.transpose(0, 1)))
        return self.head(F.gelu(self.fc(x)).mean(0))


# The steps of a sequence by hand: the same cell six times, from a state made of the batch size.
@hazard("gru_cell", TOKENS, "stem->fn:gelu fc->fn:gelu", skipped=OUTPUT)
class GruCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cell = nn.Linear(5, 8), nn.GRUCell(8, 6)
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        state = x.new_zeros(x.shape[0], 6)
        for step in range(6):
            state = self.cell(x[:, step], state)
        return self.head(F.gelu(self.fc(state)))


# torch.nn's own layers are not entered. stem's chain ends at stem: what follows is no norm or activation.
class EncoderLayer(nn.Module):
    batch_first = True

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=self.batch_first)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.stem(x if self.batch_first else x.transpose(0, 1)))
        return self.head(F.gelu(self.fc(x)).mean(1 if self.batch_first else 0))


INSIDE = {"layer.self_attn.out_proj": "inside", "layer.linear1": "inside", "layer.linear2": "inside"}
ENCODER = "stem->stem fc->fn:gelu"
hazard("encoder_layer", TOKENS, ENCODER, skipped=INSIDE | OUTPUT, dims={"stem": (0, 2), "fc": (0, 2)})(EncoderLayer)


@hazard("encoder_layer_sequence_first", TOKENS, ENCODER, skipped=INSIDE | OUTPUT, dims={"stem": (1, 2), "fc": (1, 2)})
class EncoderLayerSequenceFirst(EncoderLayer):
    batch_first = False


# The layer adds a branch to stem's channels and mixes them: they do not reach the output as constants.
@hazard("encoder_layer_as_output", TOKENS, "stem->stem", skipped=INSIDE, class_dim=2)
class EncoderLayerAsOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Linear(5, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.stem(x))


# conv's chain goes through the rearranging to the norm. Windows are folded into the batch, and unfolded by its size.
@hazard(
    "einops_functions",
    IMAGE,
    "conv->norm fc->fn:gelu conv2->fn:relu",
    skipped=OUTPUT,
    dims={"conv": (0, 2), "fc": (0, 2), "conv2": (0, 1)},
    folded=("conv", "fc"),
)
class EinopsFunctions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc, self.conv2 = conv3(3, 8), nn.LayerNorm(8), nn.Linear(8, 6), conv3(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        x = einops.rearrange(F.relu(self.conv(x)), "b c (h p) (w q) -> (b h w) (p q) c", p=4, q=4)
        x = F.gelu(self.fc(self.norm(x)))
        x = einops.rearrange(x, "(b h w) (p q) c -> b c (h p) (w q)", b=b, h=2, p=4)
        return self.head(einops.reduce(F.relu(self.conv2(x)), "b c h w -> b c", "mean"))


# The class token is made from the batch size; qkv's channels are split into three and into heads.
@hazard("einops_attention", TOKENS, "stem->stem proj->proj fc->fn:gelu", skipped={"qkv": "reshape"} | OUTPUT)
class EinopsAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cls, self.qkv = nn.Linear(5, 8), nn.Parameter(torch.randn(8)), nn.Linear(8, 24)
        self.proj, self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        cls = einops.repeat(self.cls, "c -> b c", b=x.shape[0])
        x, shapes = einops.pack([cls, self.stem(x)], "b * c")
        q, k, v = einops.rearrange(self.qkv(x), "b t (k h c) -> k b h t c", k=3, h=2)
        weights = einops.einsum(q, k, "b h i c, b h j c -> b h i j").softmax(-1)
        y = einops.einsum(weights, v, "b h i j, b h j c -> b h i c")
        x = x + self.proj(einops.rearrange(y, "b h t c -> b t (h c)"))
        cls, _ = einops.unpack(x, shapes, "b * c")
        return self.head(F.gelu(self.fc(cls)))


# Four pixels become one token of four times the channels: merged, as by a flattening, not split.
@hazard("einops_layers", IMAGE, "conv->act fc->fn:gelu", skipped=OUTPUT, dims={"conv": (0, 1), "fc": (0, 2)})
class EinopsLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = conv3(3, 8), nn.ReLU()
        self.patches = Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
        self.fc, self.mean, self.head = nn.Linear(32, 8), Reduce("b t c -> b c", "mean"), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mean(F.gelu(self.fc(self.patches(self.act(self.conv(x)))))))


# Unshuffling merges pixels into channels, as a flattening does; shuffling splits conv2's channels.
@hazard(
    "functional_pixel_shuffle",
    IMAGE,
    "conv1->fn:relu conv3->fn:relu",
    skipped={"conv2": "reshape", "head.fc": "output"},
)
class FunctionalPixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.head = conv3(3, 8), conv3(32, 16), conv3(4, 8), Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(F.relu(self.conv1(x)), 2)
        return self.head(F.relu(self.conv3(F.pixel_shuffle(self.conv2(x), 2))))


@hazard("tied_convolutions", IMAGE, "stem->fn:relu conv1->fn:relu conv2->bn", skipped={"head.fc": "output"})
class TiedConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2, self.bn = conv3(3, 8), conv3(8, 8), conv3(8, 8), nn.BatchNorm2d(8)
        self.conv2.weight = self.conv1.weight
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(F.relu(self.stem(x))))
        return self.head(x + self.bn(self.conv2(x)))


# What a layer makes of its parameters before it uses them is no part of the flow of channels.
class Parametrised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = self.norm1(conv3(3, 8)), nn.BatchNorm2d(8), nn.ReLU()
        self.depthwise, self.fc, self.head = (
            self.norm2(conv3(8, 8, groups=8)),
            self.norm1(nn.Linear(8, 8)),
            nn.Linear(8, 4),
        )

    def norm1(self, layer: nn.Module) -> nn.Module:
        return parametrizations.weight_norm(layer)

    def norm2(self, layer: nn.Module) -> nn.Module:
        return parametrizations.spectral_norm(layer)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.depthwise(self.act(self.bn(self.conv(x)))))
        return self.head(F.gelu(self.fc(x.mean((2, 3)))))


PARAMETRISED = "conv->fn:gelu fc->fn:gelu"
hazard("parametrised", IMAGE, PARAMETRISED, skipped=OUTPUT, chained={"depthwise": "conv"})(Parametrised)


# The older way: a hook makes the weight before each forward, and leaves it in the layer as a plain tensor.
@hazard("weights_by_hook", IMAGE, PARAMETRISED, skipped=OUTPUT, chained={"depthwise": "conv"})
class WeightsByHook(Parametrised):
    def norm1(self, layer: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return nn.utils.weight_norm(layer)

    def norm2(self, layer: nn.Module) -> nn.Module:
        return nn.utils.spectral_norm(layer)


class Lazy(nn.Module):
    """Layers that take their shapes from the first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU()
        self.fc, self.head = nn.LazyLinear(8), nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.fc(self.act(self.bn(self.conv(x))).flatten(1))))


# After the first forward they are ordinary layers.
@hazard("lazy_after_first_run", IMAGE, "conv->act fc->fn:gelu", skipped=OUTPUT)
class LazyAfterFirstRun(Lazy):
    def __init__(self) -> None:
        super().__init__()
        self(torch.zeros(2, 3, 8, 8))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)))


class CompiledBlock(nn.Module):
    backend: object = "eager"

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(5, 8), torch.compile(Block(), backend=self.backend)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(F.gelu(self.stem(x))))


# The compiled module is entered, under the names that its weights have.
hazard(
    "compiled_block",
    VECTOR,
    "stem->fn:gelu block._orig_mod.fc1->fn:gelu block._orig_mod.fc2->block._orig_mod.fc2",
    skipped=OUTPUT,
)(CompiledBlock)


# None stays None in the tuple, and belongs to no member.
@hazard("none_in_tuple", VECTOR, "fc->fn:gelu", skipped=OUTPUT)
class NoneInTuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.head(F.gelu(self.fc(x))), state

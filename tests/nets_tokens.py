"""Hazard nets made of Linear layers: shared weights, sizes, folded batches and layouts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets_base import hazard, shaped

TOKENS = shaped((6, 5))
VECTOR = shaped((5,))
IMAGE = shaped((3, 8, 8))
OUTPUT = {"head": "output"}


# One object under two names: the first name stands in the graph, twice, and the second name's keys survive.
@hazard("shared_module", VECTOR, "stem->fn:gelu fc1->fn:gelu fc1->fn:gelu", skipped=OUTPUT)
class SharedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc1, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.fc2 = self.fc1

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.fc2(F.gelu(self.fc1(F.gelu(self.stem(x)))))))


@hazard("tied_weights", VECTOR, "stem->fn:gelu fc1->fn:gelu fc2->fn:gelu", skipped=OUTPUT)
class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc1, self.fc2, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.fc2.weight = self.fc1.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.fc2(F.gelu(self.fc1(F.gelu(self.stem(x)))))))


# The first call is a hidden layer, the second makes the output: the layer has a site and is skipped too.
@hazard("repeated_call_as_output", VECTOR, "fc->fn:gelu", skipped={"fc": "output"})
class RepeatedCallAsOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.gelu(self.fc(x)))


@hazard("unused_module", VECTOR, "fc->act", skipped={"spare": "unused", "extra.0": "unused"} | OUTPUT)
class UnusedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.spare, self.head = nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 4)
        self.extra = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.fc(x)))


# fc2 takes part, but by its weights: there is no call of it to put a mask after.
@hazard("functional_linear", VECTOR, "fc1->fn:gelu fc3->fn:gelu", skipped={"fc2": "call"} | OUTPUT)
class FunctionalLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(F.linear(F.gelu(self.fc1(x)), self.fc2.weight, self.fc2.bias))
        return self.head(F.gelu(self.fc3(x)))


# The sigmoid feeds the next layer, it multiplies nothing: no gate.
@hazard("sigmoid_hidden_layer", VECTOR, "fc1->act fc2->fn:sigmoid", skipped=OUTPUT)
class SigmoidHiddenLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.head = nn.Linear(5, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.fc2(self.act(self.fc1(x)))))


# `last` comes from the shared input and is repeated; the arange is made again from n times the size.
@hazard("arange_index", TOKENS, "fc1->fn:gelu", skipped=OUTPUT, dims={"fc1": (0, 2)})
class ArangeIndex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        last = x.sum(-1).argmax(-1)
        return self.head(F.gelu(self.fc1(x))[torch.arange(x.shape[0], device=x.device), last])


# The token is expanded by the size of the input, before any mask, ...
@hazard("class_token_before_masks", TOKENS, "stem->stem fc1->fn:gelu", skipped=OUTPUT)
class ClassTokenBeforeMasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 5))
        self.stem, self.norm, self.fc1, self.head = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, _ = x.shape
        x = self.stem(torch.cat([self.cls_token.expand(batch, -1, -1), x], dim=1))
        x = x + F.gelu(self.fc1(self.norm(x)))
        return self.head(x[:, 0] + x.mean(1))


# ... and here by the size of a masked tensor. The size is no second user of it.
@hazard("class_token_after_masks", TOKENS, "stem->norm0 fc1->fn:gelu", skipped=OUTPUT)
class ClassTokenAfterMasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.stem, self.norm0 = nn.Linear(5, 8), nn.LayerNorm(8)
        self.norm, self.fc1, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        tokens = self.cls_token.expand(x.shape[0], -1, -1)
        x = torch.cat([tokens, self.norm0(x)], dim=1)
        x = x + F.gelu(self.fc1(self.norm(x)))
        return self.head(x[:, 0] + x.mean(1))


@hazard("view_by_batch_size", TOKENS, "fc1->fn:gelu fc2->fn:gelu", skipped=OUTPUT, dims={"fc1": (0, 2)})
class ViewByBatchSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(5, 8), nn.Linear(48, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.head(F.gelu(self.fc2(x.view(x.size(0), -1))))


# The sizes are those of the shared input, the tensor that they shape has n times the rows.
@hazard("size_of_shared_tensor", TOKENS, "fc1->fn:gelu fc2->fn:gelu", skipped=OUTPUT)
class SizeOfSharedTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        y = F.gelu(self.fc1(x)).reshape(batch, tokens // 2, 2, 8).mean(2)
        y = F.gelu(self.fc2(y)).reshape(batch * (tokens // 2), 8)
        return self.head(y.reshape(batch, tokens // 2, 8).mean(1))


# Norm and sum read the stem, so its chain is the stem; the permutes compute nothing.
@hazard(
    "channels_last",
    IMAGE,
    "stem->stem fc1->act fc2->fc2",
    skipped=OUTPUT,
    dims={"stem": (0, 1), "fc1": (0, 3), "fc2": (0, 3)},
)
class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm(8), nn.GELU()
        self.fc1, self.fc2, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.fc2(self.act(self.fc1(self.norm(x.permute(0, 2, 3, 1)))))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class ConvNextBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm, self.act = nn.LayerNorm(channels), nn.GELU()
        self.fc1, self.fc2 = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.gamma = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.fc2(self.act(self.fc1(y))).permute(0, 3, 1, 2)
        return x + y.mul(self.gamma.reshape(1, -1, 1, 1))


# `dw` of block1 is channel-wise since the mask of the stem. That of block2 reads a sum of two branches, whose channels
# no single mask decides, so its own chain is masked. fc2's chain goes through the permute to the scale, where the
# channels are dimension 1.
@hazard(
    "depthwise_on_residual_stream",
    IMAGE,
    "stem->norm block1.fc1->block1.act block1.fc2->fn:mul block2.dw->block2.norm block2.fc1->block2.act "
    "block2.fc2->fn:mul",
    skipped={"block1.dw": "masked"} | OUTPUT,
    dims={"stem": (0, 3), "block1.fc1": (0, 3), "block1.fc2": (0, 1), "block2.fc2": (0, 1)},
)
class DepthwiseOnResidualStream(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 2, stride=2), nn.LayerNorm(8)
        self.block1, self.block2, self.head = ConvNextBlock(8), ConvNextBlock(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(self.block2(self.block1(x)).mean((2, 3)))


# Each of the 4 windows of an image is a row: b*4 rows, b outermost. The count is taken back from the folded tensor.
@hazard(
    "windows",
    IMAGE,
    "stem->stem fc1->act fc2->fc2",
    skipped=OUTPUT,
    folded=("fc1", "fc2"),
    dims={"stem": (0, 1), "fc1": (0, 2), "fc2": (0, 2)},
)
class Windows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm(8), nn.GELU()
        self.fc1, self.fc2, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = self.norm(x).view(b, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        y = self.fc2(self.act(self.fc1(y)))
        y = y.view(y.shape[0] // 4, h // 4, w // 4, 4, 4, -1).permute(0, 1, 3, 2, 4, 5).reshape(-1, h, w, c)
        return self.head((x + y).mean((1, 2)))


@hazard(
    "frames_folded",
    shaped((3, 2, 6, 6)),
    "conv->act fc->fn:gelu",
    skipped=OUTPUT,
    folded=("conv",),
    dims={"conv": (0, 1), "fc": (0, 2)},
)
class FramesFolded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _, _, _ = x.shape
        y = self.act(self.norm(self.conv(x.flatten(0, 1)))).mean((2, 3))
        return self.head(F.gelu(self.fc(y.view(b, t, -1))).mean(1))


# A Linear over tokens: what it masks are token features, its last dimension, before they are transposed back.
@hazard(
    "token_mixer",
    TOKENS,
    "stem->stem tokens1->act1 tokens2->tokens2 fc1->act2 fc2->fc2",
    skipped=OUTPUT,
    dims={"stem": (0, 2), "tokens1": (0, 2), "tokens2": (0, 2), "fc1": (0, 2)},
)
class TokenMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1, self.act1 = nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU()
        self.tokens1, self.tokens2 = nn.Linear(6, 12), nn.Linear(12, 6)
        self.norm2, self.act2 = nn.LayerNorm(8), nn.GELU()
        self.fc1, self.fc2, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.tokens2(self.act1(self.tokens1(self.norm1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.fc2(self.act2(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


@hazard(
    "sequence_first",
    TOKENS,
    "stem->stem fc1->fn:gelu fc2->tanh",
    skipped=OUTPUT,
    dims={"stem": (1, 2), "fc1": (1, 2), "fc2": (1, 2)},
)
class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.fc1, self.fc2, self.tanh, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.transpose(0, 1))
        x = x + self.tanh(self.fc2(F.gelu(self.fc1(self.norm(x)))))
        return self.head(x.mean(0))


# Rolling and dropping compute nothing that a mask has to follow: fc1 ends its chain. fc2's goes on to the GELU.
@hazard("roll_in_chain", TOKENS, "fc1->fc1 fc2->act", skipped=OUTPUT, stochastic=True)
class RollInChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.drop, self.fc2, self.act = nn.Linear(5, 8), nn.Dropout(0.2), nn.Linear(8, 8), nn.GELU()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.roll(self.fc1(x), 2, dims=1))
        return self.head(self.act(torch.roll(self.fc2(x), -2, dims=1)).mean(1))

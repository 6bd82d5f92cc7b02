"""Hazard nets about the two ends and the mode: outputs, inputs, training flags, precision, and what is refused."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets_base import hazard, refused, shaped
from nets_conv import Classifier, conv3

IMAGE = shaped((3, 8, 8))
TOKENS = shaped((6, 5))
VECTOR = shaped((5,))
OUTPUT = {"head": "output"}


@hazard("ending_in_log_softmax", VECTOR, "fc1->act", skipped={"fc2": "output"})
class EndingInLogSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.log_softmax = nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 4), nn.LogSoftmax(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.log_softmax(self.fc2(self.act(self.fc1(x))))


@hazard("token_logits", TOKENS, "fc1->fn:gelu", skipped=OUTPUT, class_dim=2, dims={"fc1": (0, 2)})
class TokenLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.fc1(x)))


# Pooling and interpolation after the last convolution leave its masked channels what they were: constants.
@hazard("ending_in_pooling", IMAGE, "conv1->act1", skipped={"last": "output"})
class EndingInPooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = conv3(3, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.last, self.pool, self.flatten = nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        return self.flatten(self.pool(self.last(self.act1(self.bn1(self.conv1(x))))))


@hazard("ending_in_interpolation", IMAGE, "conv1->act1", skipped={"last": "output"})
class EndingInInterpolation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = conv3(3, 8, stride=2), nn.BatchNorm2d(8), nn.ReLU()
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.act1(self.bn1(self.conv1(x))))
        return F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)


# The pooled stream is an output, but the sum with x stands on the way from conv1 and from stem.
@hazard("tuple_output", IMAGE, "stem->stem conv1->bn1", skipped={"fc": "output"})
class TupleOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.bn1 = conv3(3, 8), conv3(8, 8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        features = F.relu(x + self.bn1(self.conv1(x))).mean((2, 3))
        return self.fc(features), features


# conv2's channels are themselves an output: masked, they would be zeros there, though the logits mix them.
@hazard("dict_output", IMAGE, "conv1->fn:relu", skipped={"conv2": "output", "fc": "output"})
class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.bn2, self.fc = conv3(3, 8), conv3(8, 8), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = F.relu(self.bn2(self.conv2(F.relu(self.conv1(x)))))
        return {"logits": self.fc(features.mean((2, 3))), "features": features}


@hazard("two_heads", IMAGE, "conv->act hidden->fn:gelu", skipped={"kind": "output", "place": "output"})
class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv3(3, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.kind, self.hidden, self.place = nn.Linear(8, 5), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.act(self.bn(self.conv(x))).mean((2, 3))
        return self.kind(x), self.place(F.gelu(self.hidden(x)))


# The trunk meets the image and the numbers in a cat.
@hazard("two_inputs", shaped((3, 8, 8), (6,)), "conv->fn:relu numbers->fn:gelu fc1->fn:gelu", skipped={"fc2": "output"})
class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.numbers = conv3(3, 8), nn.Linear(6, 8)
        self.fc1, self.fc2 = nn.Linear(22, 8), nn.Linear(8, 5)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        x, y = F.relu(self.conv(image)).mean((2, 3)), F.gelu(self.numbers(numbers))
        return self.fc2(F.gelu(self.fc1(torch.cat([x, y, numbers], dim=-1))))


# The sum with a parameter is neither activation nor scale: the chain ends at the stem's own norm.
@hazard("position_embedding", TOKENS, "stem->norm fc->fn:gelu", skipped=OUTPUT)
class PositionEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.pos_embed = nn.Linear(5, 8), nn.LayerNorm(8), nn.Parameter(torch.randn(1, 6, 8))
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)) + self.pos_embed
        return self.head((x + F.gelu(self.fc(x))).mean(1))


# What is made of coordinates alone has no sample in any dimension, so no member either.
@hazard("position_mlp", TOKENS, "stem->stem fc->fn:gelu", skipped={"pos1": "batch", "pos2": "batch"} | OUTPUT)
class PositionMlp(nn.Module):
    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.linspace(-1, 1, 12).reshape(6, 2), persistent=False)
        self.pos1, self.pos2 = nn.Linear(2, 8), nn.Linear(8, 8)
        self.stem, self.fc, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.pos2(F.gelu(self.pos1(self.grid)))
        return self.head(F.gelu(self.fc(x)).mean(1))


# The same with the coordinates as an input that all samples share.
@hazard(
    "unbatched_input",
    lambda batch: (torch.randn(batch, 6, 5), torch.randn(6, 2)),
    "stem->stem fc->fn:gelu",
    skipped={"pos": "batch"} | OUTPUT,
    unbatched=("grid",),
)
class UnbatchedInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pos = nn.Linear(5, 8), nn.Linear(2, 8)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        return self.head(F.gelu(self.fc(self.stem(x) + torch.tanh(self.pos(grid)))).mean(1))


# Sites are the same in both modes, so nothing of the head that runs in training only is masked.
@hazard(
    "auxiliary_head",
    IMAGE,
    "conv1->act1 conv2->act2",
    skipped={"aux.0": "training", "aux.4": "training"} | {"head.fc": "output"},
    modes_differ=True,
)
class AuxiliaryHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = conv3(3, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.act2 = conv3(8, 8), nn.BatchNorm2d(8), nn.ReLU()
        tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
        self.aux = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), *tail)
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        middle = self.act1(self.bn1(self.conv1(x)))
        logits = self.head(self.act2(self.bn2(self.conv2(middle))))
        if self.training:
            return logits, self.aux(middle)
        return logits


# fc1's dropout is baked by a trace: the two modes are two graphs with the same sites.
@hazard("functional_dropout", VECTOR, "fc1->fn:gelu fc2->fc2", skipped=OUTPUT, stochastic=True, modes_differ=True)
class FunctionalDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.gelu(self.fc1(x)), 0.2, training=self.training)
        return self.head(F.dropout(self.fc2(x), p=0.2, training=self.training))


class DropSample(nn.Module):
    """Stochastic depth, by sample: it reads the training flag in its own forward."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty(x.shape[0], 1, 1).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


@hazard("stochastic_depth", TOKENS, "stem->stem fc1->fn:gelu fc2->fc2", skipped=OUTPUT, stochastic=True)
class StochasticDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc1, self.fc2, self.head = nn.Linear(5, 8), nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 4)
        self.drop_path = DropSample(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.drop_path(self.fc2(F.gelu(self.fc1(x))))
        return self.head(x.mean(1))


# Made from the dtype of the input, the constant does not lift half precision to float32.
@hazard("half_precision", IMAGE, "conv->fn:relu fc1->fn:gelu", skipped={"fc2": "output"}, half=True)
class HalfPrecision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc1, self.fc2 = conv3(3, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x - torch.full((1, 3, 1, 1), 0.5, dtype=x.dtype, device=x.device)
        return self.fc2(F.gelu(self.fc1(F.relu(self.conv(x)).mean((2, 3)))))


# The mean over the batch mixes samples, and members with them.
@refused("mean_over_batch", TOKENS, node="mean")
class MeanOverBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc(x))
        return self.head((x - x.mean((0, 1))).sum(1))


# Tokens outermost: 6*b rows, the whole batch six times, of which each member has b in each.
@hazard("fold_with_batch_inside", TOKENS, "fc->fn:gelu", skipped={"head": "output"}, outer={"fc": 6})
class FoldWithBatchInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.fc(x.transpose(0, 1).reshape(-1, 5)))
        return self.head(y.reshape(6, -1, 8).mean(0))


# b + 1 is not proportional to b: n times it is not what n times the batch gives.
@refused("size_plus_one", VECTOR, node="add")
class SizePlusOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(x.shape[0] + 1, device=x.device)[1:] - 1
        return self.head(F.gelu(self.fc(x))[order])

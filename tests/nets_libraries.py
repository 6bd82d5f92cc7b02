"""Hazard nets of what models do outside timm: torchvision, segmentation-models-pytorch, MONAI, transformers."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets_base import hazard, refused, shaped
from nets_conv import Classifier, conv3

IMAGE = shaped((3, 8, 8))
VECTOR = shaped((5,))
TOKENS = shaped((6, 5))
OUTPUT = {"head": "output"}


# The sum of two heads is as much the output as each of them: a class that both mask would be a constant.
@hazard("sum_of_heads", VECTOR, "fc->fn:gelu", skipped={"head": "output", "head_dist": "output"})
class SumOfHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head, self.head_dist = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc(x))
        return (self.head(x) + self.head_dist(x)) / 2


# `up` is read by `last`, which mixes its channels; `last` only reaches the output, by the sum with `up`.
@hazard("residual_output", IMAGE, "conv->fn:relu up->fn:relu", skipped={"last": "output"})
class ResidualOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.last = conv3(3, 8), nn.ConvTranspose2d(8, 4, 2, 2), conv3(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.conv(x))))
        return x + self.last(x)


# Features without a head, as of a ViT with num_classes=0: the last branch is added to a stream, and masked as others.
@hazard("stream_output", TOKENS, "fc0->fc0 fc1->fn:gelu fc2->fc2")
class StreamOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc0, self.fc1, self.fc2 = nn.Linear(5, 5), nn.Linear(5, 8), nn.Linear(8, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.fc0(x)
        return self.norm(x + self.fc2(F.gelu(self.fc1(x)))).mean(1)


# torch.fx would make a dict of it.
@hazard("ordered_dict_output", IMAGE, "conv->fn:relu", skipped={"last": "output", "aux": "output"})
class OrderedDictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last, self.aux = conv3(3, 8), nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        x, result = F.relu(self.conv(x)), OrderedDict()
        result["out"] = self.last(x)
        result["aux"] = self.aux(x)
        return result


# The modules are no submodules, so there is nothing to call by a name. (Such a dropout never learns of eval.)
@hazard("module_made_in_forward", VECTOR, "fc1->fn:gelu fc2->fn:relu", skipped=OUTPUT)
class ModuleMadeInForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.ReLU()(self.fc2(nn.GELU()(self.fc1(x)))))


# A mask of windows and a shifted branch, written part by part: later readers must read what was assigned. The sum with
# the windows, which is no scale, ends the chain of `conv1`.
@hazard("assigned_parts", IMAGE, "conv1->conv1 conv2->fn:relu", skipped={"head.fc": "output"})
class AssignedParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.head = conv3(3, 8), conv3(8, 8), Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w = x.shape
        windows = torch.zeros((1, 1, h, w), dtype=x.dtype, device=x.device)
        for i, rows in enumerate((slice(0, h // 2), slice(h // 2, None))):
            windows[:, :, rows, :] = i - 0.5
        x = self.conv1(x) + windows
        y = torch.zeros_like(x)
        y[:, :, 1:] = F.relu(self.conv2(x))[:, :, :-1]
        return self.head(x + y)


# numpy asks a proxy for its protocols, and then for its number. The division by one number is a scale.
@hazard("numpy_of_sizes", IMAGE, "conv->fn:truediv", skipped={"head.fc": "output"})
class NumpyOfSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv3(3, 8), Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        if (np.array(x.shape[2:]) % 2).any():
            raise ValueError("odd")
        more = int(np.ceil(x.shape[-1] / 3)) * 3 - x.shape[-1]
        return self.head(F.pad(F.relu(self.conv(x)), (0, more)) / torch.sqrt(torch.tensor(x.shape[1])))


# It must not keep the proxies of a trace, which no copy and no pickle of the converted model could take along.
@hazard("keeps_what_it_computes", VECTOR, "fc1->fn:gelu fc2->fn:gelu", skipped=OUTPUT)
class KeepsWhatItComputes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.seen["fc1"] = F.gelu(self.fc1(x))
        self.last = F.gelu(self.fc2(self.seen["fc1"]))
        return self.head(self.last)


# Both images go through the pooling as one batch, and are two batches again: members of one stay beside those of
# the other.
@hazard("two_batches_in_one", shaped((3, 8, 8), (3, 8, 8)), "stem->stem stem->stem conv->fn:relu", skipped=OUTPUT)
class TwoBatchesInOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = conv3(3, 8), nn.Conv2d(16, 8, 1), nn.Linear(8, 4)

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        pooled = F.avg_pool2d(torch.cat([self.stem(one), self.stem(other)], dim=0), 2)
        one, other = torch.chunk(pooled, 2, dim=0)
        return self.head(F.relu(self.conv(torch.cat([one, other], 1))).mean((2, 3)))


# The size of a masked tensor is that of all members, and so must be what it is compared with.
@hazard("compared_sizes", IMAGE, "conv->fn:relu", skipped={"head.fc": "output"})
class ComparedSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = conv3(3, 8), Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        x = F.relu(self.conv(x))
        if x.shape != (b, 8, h, w):
            raise ValueError("another shape")
        return self.head(x)


# Where it looks is computed from the image, and comes with the batch; a masked coordinate would be the middle.
@hazard(
    "grid_sample",
    IMAGE,
    "conv->fn:relu last->fn:relu",
    skipped={"grid": "gate", "to_grid": "gate", "head.fc": "output"},
)
class GridSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.grid, self.last, self.head = conv3(3, 8), conv3(8, 4), conv3(8, 8), Classifier(8)
        self.to_grid = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        where = torch.tanh(self.to_grid(self.grid(x))).permute(0, 2, 3, 1)
        return self.head(F.relu(self.last(F.grid_sample(x, where, align_corners=False))))


# A loss may be a number; a number that goes back into the samples mixes them.
@refused("largest_of_all", VECTOR, node="max")
class LargestOfAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc(x))
        return self.head(x / x.max())

"""Hazard nets of what only a few families of architectures do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets_base import hazard, refused, shaped

IMAGE = shaped((3, 8, 8))
VECTOR = shaped((5,))
OUTPUT = {"head": "output"}


class EvoNorm(nn.Module):
    """Divides by the deviation of groups of channels, which a reshape makes, and is an activation as well."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.reshape(x.shape[0], self.groups, -1)
        scale = (grouped.var(2, keepdim=True) + 1e-5).rsqrt().expand_as(grouped).reshape(x.shape)
        shape = (1, -1, 1, 1)
        return x.sigmoid() * x * scale * self.weight.view(shape) + self.bias.view(shape)


# The groups are the norm's own business: its output has the channels of its input.
@hazard("norm_that_groups_channels", IMAGE, "conv1->norm1 conv2->norm2", skipped=OUTPUT)
class NormThatGroupsChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3), EvoNorm(8, 4)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3), EvoNorm(8, 2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm2(self.conv2(self.norm1(self.conv1(x)))).mean((2, 3)))


# Overlapping windows of height and width, as of halo attention, become new last dimensions.
@hazard("windows_by_unfold", IMAGE, "conv->fn:relu", skipped=OUTPUT, dims={"conv": (0, 1)})
class WindowsByUnfold(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(F.relu(self.conv(x)), (1, 1, 1, 1)).unfold(2, 4, 2).unfold(3, 4, 2)
        return self.head(x.mean((2, 3)).flatten(1))


# One grouped convolution for all samples, which stand in front of the channels; depthwise the second time. Of a hidden
# layer that ends in a sigmoid and goes into a matrix the channels are masked as of any other.
@hazard("weights_for_each_sample", IMAGE, "stem->fn:relu routing->fn:sigmoid", skipped=OUTPUT)
class WeightsForEachSample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.routing, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4), nn.Linear(6, 4)
        self.experts = nn.Parameter(torch.randn(4, 6 * 8 * 9))
        self.depthwise_experts = nn.Parameter(torch.randn(4, 6 * 9))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        b, c, h, w = x.shape
        routing = torch.sigmoid(self.routing(x.mean((2, 3))))
        weight = 8 * torch.matmul(routing, self.experts).view(b * 6, c, 3, 3)
        x = F.relu(F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b))
        weight = torch.matmul(routing, self.depthwise_experts).view(b * 6, 1, 3, 3)
        x = F.conv2d(x, weight, padding=1, groups=b * 6)
        return self.head(F.relu(x.view(b, 6, h, w)).mean((2, 3)))


# Attention over the batch by mistake, as in csatv2: of a norm of one element only the bias is left, so all samples are
# alike and nothing is mixed.
@hazard("attention_over_equal_samples", IMAGE, "stem->fn:relu fc->fn:gelu", skipped=OUTPUT, spreads_nan=True)
class AttentionOverEqualSamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm(1)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = self.norm(x.mean(1).flatten(1).unsqueeze(-1)).squeeze(-1)  # [b, h * w]
        y = (y @ y.transpose(-1, -2)).softmax(-1) @ y
        x = x + y.view(x.shape[0], 1, *x.shape[2:])
        return self.head(F.gelu(self.fc(x.mean((2, 3)))))


# Each sample looks at all others, and each member would look at all members.
@refused("attention_over_samples", VECTOR, node="matmul")
class AttentionOverSamples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc(x))
        return self.head((x @ x.transpose(0, 1)).softmax(-1) @ x)

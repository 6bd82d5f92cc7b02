"""Hazard nets made of convolutions; the expected sites are worked out by hand from the written rules.

A chain is a layer and what follows it without another user: norm, activation, dropout, per-channel scale, depthwise
convolution. It ends at its last computing node: pooling, padding, rolling, shapes, dropout and Identity do not name it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets_base import hazard, shaped


def conv3(c_in: int, c_out: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, groups=groups, bias=False)


class Classifier(nn.Module):
    """Global average and Linear: the tail of most nets here. `fc` is their output layer."""

    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(x).flatten(1))


IMAGE = shaped((3, 8, 8))
OUTPUT = {"head.fc": "output"}


# The sum has another user of the mask, so conv2's chain ends before it, at its norm: the ReLU after the sum
# belongs to no layer.
@hazard("conv_bn_relu", IMAGE, "stem->act conv1->act1 conv2->bn2", skipped=OUTPUT, half=True, dims={"conv1": (0, 1)})
class ConvBnRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.act = conv3(3, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.conv1, self.bn1, self.act1 = conv3(8, 12), nn.BatchNorm2d(12), nn.ReLU()
        self.conv2, self.bn2, self.act2 = conv3(12, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.stem(x)))
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.head(self.act2(x + y))


# One ReLU object serves all chains, in place as torchvision's blocks have it; the sum is `+=`.
@hazard("shared_activation", IMAGE, "stem->relu conv1->relu conv2->bn2", skipped=OUTPUT)
class SharedActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = conv3(3, 8), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = conv3(8, 8), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv3(8, 8), nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        return self.head(self.relu(y))


@hazard("inplace_relu", IMAGE, "conv1->act1 conv2->fn:relu_ conv3->fn:relu", skipped=OUTPUT)
class InplaceRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = conv3(3, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv2, self.conv3 = conv3(8, 8), conv3(8, 8)
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.conv2(x).relu_()
        return self.head(F.relu(self.conv3(x), inplace=True))


# The second call reads masked channels but mixes them, so it has a site of its own.
@hazard("repeated_call", IMAGE, "stem->stem block.0->block.2 block.0->block.2", skipped=OUTPUT)
class RepeatedCall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = conv3(3, 8)
        self.block = nn.Sequential(conv3(8, 8), nn.BatchNorm2d(8), nn.ReLU())
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.block(self.stem(x))))


# A window that is saved and one that is not; both stand before the first layer and belong to no chain.
@hazard("buffers", IMAGE, "conv->fn:relu", skipped=OUTPUT)
class Buffers(nn.Module):
    window: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(8, periodic=False) + 0.1, persistent=False)
        self.register_buffer("mean", torch.tensor([0.4, -0.2, 0.1]).reshape(3, 1, 1))
        self.conv = conv3(3, 8)
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv((x - self.mean) * self.window)))


# StarReLU is arithmetic with single numbers; the chain ends at its sum, for a zero before it would come out as `bias`.
@hazard(
    "functional_activation",
    IMAGE,
    "conv1->fn:relu conv2->fn:relu conv3->fn:gelu conv4->fn:add conv5->fn:leaky_relu",
    skipped=OUTPUT,
)
class FunctionalActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv3(3, 8), conv3(8, 8), conv3(8, 8)
        self.conv4, self.conv5 = conv3(8, 8), conv3(8, 8)
        self.scale, self.bias = nn.Parameter(torch.rand(1) + 0.5), nn.Parameter(torch.randn(1))
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = self.conv2(x).relu()
        x = F.gelu(self.conv3(x))
        x = self.scale * F.relu(self.conv4(x)) ** 2 + self.bias
        return self.head(F.leaky_relu(self.conv5(x), 0.1))


# bn has two users, the sigmoid and the product, so the chain ends there. One user of bn does not pass the sigmoid:
# this is no gate.
@hazard("silu_by_hand", IMAGE, "conv1->bn1 conv2->conv2", skipped=OUTPUT)
class SiluByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2 = conv3(3, 8), nn.BatchNorm2d(8), conv3(8, 8)
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        return self.head(self.conv2(x * torch.sigmoid(x)))


@hazard("trailing_identity", IMAGE, "conv1->act1 conv2->bn2", skipped=OUTPUT, stochastic=True)
class TrailingIdentity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = conv3(3, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.identity, self.drop = nn.Identity(), nn.Dropout2d(0.2)
        self.conv2, self.bn2, self.act2 = conv3(8, 8), nn.GroupNorm(2, 8), nn.Identity()
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.identity(self.act1(self.bn1(self.conv1(x)))))
        return self.head(self.act2(self.bn2(self.conv2(x))))


# The norm comes after the pool and the padding: the chain goes on through them, to the ReLU.
@hazard("pool_and_pad_in_chain", IMAGE, "conv1->act1 conv2->bn2 conv3->fn:gelu", skipped=OUTPUT)
class PoolAndPadInChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.pool, self.bn1, self.act1 = conv3(3, 8), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.pad, self.bn2 = conv3(8, 8), nn.ZeroPad2d(1), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3)
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.pool(self.conv1(x))))
        x = F.avg_pool2d(F.pad(self.bn2(self.pad(self.conv2(x))), (0, 1, 0, 1)), 2)
        return self.head(F.gelu(self.conv3(x)))


# Flattening keeps every channel together, so conv2 has its site, before the flatten; conv1 has one input channel.
@hazard("flatten_to_linear", shaped((1, 8, 8)), "conv1->fn:relu conv2->fn:gelu fc1->fn:tanh", skipped={"fc2": "output"})
class FlattenToLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 2)
        self.fc1, self.fc2 = nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.gelu(self.conv2(x))
        return self.fc2(torch.tanh(self.fc1(torch.flatten(x, 1))))


# act has two users, so conv's chain ends there; from that mask to the end of `dw` no channel meets another.
@hazard("depthwise_after_two_users", IMAGE, "conv->act pw->fn:gelu", skipped={"dw": "masked"} | OUTPUT)
class DepthwiseAfterTwoUsers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv3(3, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.dw, self.bn1 = conv3(8, 8, groups=8), nn.BatchNorm2d(8)
        self.pw = nn.Conv2d(8, 8, 1)
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x)))
        return self.head(F.gelu(self.pw(x + F.relu(self.bn1(self.dw(x))))))


# Two outputs for each input channel are depthwise still, so the chain widens from 8 to 16 and has one mask of 16.
@hazard("depthwise_multiplier", IMAGE, "conv->fn:relu", chained={"dw": "conv"}, skipped=OUTPUT)
class DepthwiseMultiplier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.dw = conv3(3, 8), conv3(8, 16, groups=8)
        self.head = Classifier(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.dw(F.relu(self.conv(x)))))


# Groups of four channels do mix: a layer like any other.
@hazard("grouped_conv", IMAGE, "conv1->act1 conv2->act2", skipped=OUTPUT)
class GroupedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = conv3(3, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.act2 = conv3(8, 12, groups=2), nn.BatchNorm2d(12), nn.ReLU()
        self.head = Classifier(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        return self.head(self.act2(self.bn2(self.conv2(x))))


# The channel axis becomes pixels before `conv2` mixes channels.
@hazard("pixel_shuffle", IMAGE, "conv1->fn:relu conv2->fn:relu", skipped={"up": "reshape"} | OUTPUT)
class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.up, self.shuffle, self.conv2 = conv3(3, 8), conv3(8, 16), nn.PixelShuffle(2), conv3(4, 8)
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(self.shuffle(self.up(F.relu(self.conv1(x)))))))


@hazard("channel_split", IMAGE, "conv2->fn:relu", skipped={"conv1": "reshape"} | OUTPUT)
class ChannelSplit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2 = conv3(3, 16), nn.BatchNorm2d(16), conv3(8, 8)
        self.head = Classifier(16)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.bn1(self.conv1(x))).chunk(2, dim=1)
        return self.head(torch.cat([a, F.relu(self.conv2(b))], dim=1))


# The norms and activations before a convolution belong to no chain where what they read has other users or is a cat.
@hazard("densenet_cat", IMAGE, "conv0->conv0 conv1->act2 conv2->conv2 conv3->act4 conv4->conv4", skipped=OUTPUT)
class DensenetCat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv0 = conv3(3, 8)
        self.norm1, self.act1, self.conv1 = nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1)
        self.norm2, self.act2, self.conv2 = nn.BatchNorm2d(8), nn.SiLU(), conv3(8, 6)
        self.norm3, self.act3, self.conv3 = nn.BatchNorm2d(14), nn.SiLU(), nn.Conv2d(14, 8, 1)
        self.norm4, self.act4, self.conv4 = nn.BatchNorm2d(8), nn.SiLU(), conv3(8, 6)
        self.norm5, self.act5 = nn.BatchNorm2d(20), nn.SiLU()
        self.head = Classifier(20)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.conv0(x)]
        y = self.conv1(self.act1(self.norm1(torch.cat(features, 1))))
        features.append(self.conv2(self.act2(self.norm2(y))))
        y = self.conv3(self.act3(self.norm3(torch.cat(features, 1))))
        features.append(self.conv4(self.act4(self.norm4(y))))
        return self.head(self.act5(self.norm5(torch.cat(features, 1))))


# The constants have no batch of their own: one is expanded to it, the other made from it.
@hazard("constant_in_cat", IMAGE, "conv->fn:relu conv2->fn:relu", skipped=OUTPUT)
class ConstantInCat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.plane = conv3(3, 8), nn.Parameter(torch.randn(1, 2, 8, 8))
        self.conv2 = conv3(11, 8)
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        ones = x.new_ones(x.shape[0], 1, 8, 8)
        return self.head(F.relu(self.conv2(torch.cat([x, self.plane.expand(x.size(0), -1, -1, -1), ones], dim=1))))


# Both the skip and the way up reach conv3 through a cat; the last convolution makes the logits.
@hazard("transposed_conv", IMAGE, "conv1->act1 conv2->act2 up->up conv3->act3", skipped={"last": "output"})
class TransposedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act1, self.pool = conv3(3, 8), nn.ReLU(), nn.MaxPool2d(2)
        self.conv2, self.act2 = conv3(8, 12), nn.ReLU()
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.conv3, self.act3, self.last = conv3(16, 8), nn.ReLU(), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.act1(self.conv1(x))
        y = self.up(self.act2(self.conv2(self.pool(skip))))
        return self.last(self.act3(self.conv3(torch.cat([y, skip], dim=1))))


# conv1's chain includes gamma; in the block it ends at the scale, before the sum.
@hazard("layer_scale", IMAGE, "conv1->fn:mul conv2->fn:mul", skipped=OUTPUT)
class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2 = conv3(3, 8), nn.BatchNorm2d(8), conv3(8, 8)
        self.gamma1, self.gamma2 = nn.Parameter(torch.rand(8, 1, 1) + 0.5), nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5)
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x))) * self.gamma1
        return self.head(x + self.gamma2 * F.relu(self.conv2(x)))


class FrozenBatchNorm(nn.Module):
    """BatchNorm as buffers and arithmetic, as detection models carry it."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(channels) + 0.5)
        self.register_buffer("bias", torch.randn(channels))
        self.register_buffer("running_mean", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


# Whether the norm is one module or arithmetic, a mask before it would come out as a constant: the end is the ReLU.
@hazard("frozen_batchnorm", IMAGE, "conv1->act1 conv2->act2", skipped=OUTPUT)
class FrozenBatchNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = conv3(3, 8), FrozenBatchNorm(8), nn.ReLU()
        self.conv2, self.bn2, self.act2 = conv3(8, 8), FrozenBatchNorm(8), nn.ReLU()
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act2(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))))


@hazard("conv1d", shaped((3, 12)), "conv1->act1 conv2->fn:gelu", skipped={"fc": "output"}, dims={"conv1": (0, 1)})
class Conv1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU()
        self.conv2, self.fc = nn.Conv1d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.gelu(self.conv2(self.act1(self.bn1(self.conv1(x))))).mean(-1))


@hazard("conv3d", shaped((2, 4, 6, 6)), "conv1->act1 conv2->fn:relu", skipped={"fc": "output"}, dims={"conv1": (0, 1)})
class Conv3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv3d(2, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU()
        self.conv2, self.fc = nn.Conv3d(8, 8, 2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.conv2(self.act1(self.bn1(self.conv1(x))))).mean((2, 3, 4)))

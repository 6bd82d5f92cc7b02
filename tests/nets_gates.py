"""Hazard nets of gates and products: what only multiplies is no feature, and a product needs one mask only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets_base import hazard, shaped
from nets_conv import Classifier, conv3

IMAGE = shaped((3, 8, 8))
TOKENS = shaped((6, 5))
OUTPUT = {"head.fc": "output"}


# Both convolutions see the pooled input and only scale x. conv's chain ends where pool and product both read it.
@hazard(
    "squeeze_excite",
    IMAGE,
    "conv->act conv2->fn:relu",
    skipped={"reduce": "gate", "expand": "gate", "reduce2": "gate", "expand2": "gate"} | OUTPUT,
)
class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.act = conv3(3, 8), nn.BatchNorm2d(8), nn.ReLU()
        self.reduce, self.expand, self.gate = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Sigmoid()
        self.conv2 = conv3(8, 8)
        self.reduce2, self.expand2 = nn.Linear(8, 4), nn.Linear(4, 8)
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(x)))
        x = x * self.gate(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        x = F.relu(self.conv2(x))
        s = self.expand2(F.relu(self.reduce2(x.mean((2, 3)))))
        return self.head(x * F.hardsigmoid(s)[:, :, None, None])


# The weights of two branches come from a softmax over them, and it only multiplies.
@hazard(
    "split_attention",
    IMAGE,
    "conv_a->fn:relu conv_b->fn:relu",
    skipped={"squeeze": "gate", "weigh_a": "gate", "weigh_b": "gate"} | OUTPUT,
)
class SplitAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_a, self.conv_b = conv3(3, 8), nn.Conv2d(3, 8, 1)
        self.squeeze, self.weigh_a, self.weigh_b = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(6, 8)
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.conv_a(x)), F.relu(self.conv_b(x))
        s = F.relu(self.squeeze((a + b).mean((2, 3))))
        w = torch.stack([self.weigh_a(s), self.weigh_b(s)], 1).softmax(1)[..., None, None]
        return self.head(a * w[:, 0] + b * w[:, 1])


# One mask for conv_pw -> bn -> act -> conv_dw -> bn -> act, before squeeze-excite splits the path.
@hazard(
    "mbconv_with_gate",
    IMAGE,
    "stem->act0 conv_pw->act2 conv_pwl->bn3",
    chained={"conv_dw": "conv_pw"},
    skipped={"reduce": "gate", "expand": "gate"} | OUTPUT,
)
class MBConvWithGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0, self.act0 = conv3(3, 8), nn.BatchNorm2d(8), nn.SiLU()
        self.conv_pw, self.bn1, self.act1 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU()
        self.conv_dw, self.bn2, self.act2 = conv3(16, 16, groups=16), nn.BatchNorm2d(16), nn.SiLU()
        self.reduce, self.expand = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.conv_pwl, self.bn3 = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = Classifier(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act0(self.bn0(self.stem(x)))
        y = self.act2(self.bn2(self.conv_dw(self.act1(self.bn1(self.conv_pw(x))))))
        y = y * torch.sigmoid(self.expand(F.silu(self.reduce(y.mean((2, 3), keepdim=True)))))
        return self.head(x + self.bn3(self.conv_pwl(y)))


# Neither factor is a gate by itself: SiLU is an activation. The product is masked by its first factor already.
@hazard("product_of_branches", TOKENS, "first->fn:silu fc2->fc2", skipped={"second": "masked"} | {"head": "output"})
class ProductOfBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc2, self.head = (nn.Linear(i, o) for i, o in ((5, 8), (5, 8), (8, 8), (8, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(F.silu(self.first(x)) * self.second(x)).mean(1))


# With a sigmoid the first factor is a gate, so the mask goes to the other one.
@hazard("gated_linear_unit", TOKENS, "value->value fc2->fc2", skipped={"gate": "gate"} | {"head": "output"})
class GatedLinearUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.value, self.fc2, self.head = (nn.Linear(i, o) for i, o in ((5, 8), (5, 8), (8, 8), (8, 4)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc2(torch.sigmoid(self.gate(x)) * self.value(x)).mean(1))


@hazard("fused_product_of_branches", TOKENS, "fc2->fc2", skipped={"fc1": "reshape"} | {"head": "output"})
class FusedProductOfBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(5, 16), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.head(self.fc2(a * F.gelu(b)).mean(1))


# The weights of the tokens come from a softmax that only multiplies. stem has two users.
@hazard("attention_pooling", TOKENS, "stem->fn:gelu", skipped={"score": "gate"} | {"head": "output"})
class AttentionPooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.score, self.head = nn.Linear(5, 8), nn.Linear(8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        return self.head((x * self.score(x).softmax(dim=1)).sum(1))

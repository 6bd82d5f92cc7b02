"""Hazard nets of attention: heads are cut from the channel axis before anything mixes channels again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets_base import hazard, shaped

TOKENS = shaped((6, 5))
OUTPUT = {"head": "output"}


# The patches go through a cat with the class token, so `patch` ends its chain; nothing after fc2 and proj computes
# but dropout and the sum.
@hazard(
    "fused_qkv",
    shaped((3, 8, 8)),
    "patch->patch proj->proj fc1->act fc2->fc2",
    skipped={"qkv": "reshape"} | OUTPUT,
    dims={"patch": (0, 1), "proj": (0, 2), "fc1": (0, 2)},
    stochastic=True,
)
class FusedQkv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.cls_token = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.randn(1, 1, 8))
        self.pos_embed, self.pos_drop = nn.Parameter(torch.randn(1, 5, 8)), nn.Dropout(0.1)
        self.norm1, self.qkv, self.attn_drop = nn.LayerNorm(8), nn.Linear(8, 24), nn.Dropout(0.1)
        self.proj, self.proj_drop = nn.Linear(8, 8), nn.Dropout(0.1)
        self.norm2, self.fc1, self.act, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def attend(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.attn_drop((q * 0.5 @ k.transpose(-2, -1)).softmax(dim=-1))
        return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(b, t, c)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pos_drop(x + self.pos_embed)
        x = x + self.attend(self.norm1(x))
        x = x + self.fc2(self.act(self.fc1(self.norm2(x))))
        return self.head(self.norm(x)[:, 0])


# A trace in evaluation bakes dropout_p = 0.0: two graphs, the same sites.
@hazard(
    "fused_attention_dropout",
    TOKENS,
    "stem->stem proj->proj",
    skipped={"qkv": "reshape"} | OUTPUT,
    stochastic=True,
    modes_differ=True,
)
class FusedAttentionDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.qkv = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 24)
        self.proj, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, t, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2 if self.training else 0.0)
        return self.head((x + self.proj(y.transpose(1, 2).reshape(b, t, c))).mean(1))


# Heads are cut right after each of the three, also after v.
@hazard(
    "separate_qkv",
    TOKENS,
    "stem->stem proj->proj",
    skipped={"q": "reshape", "k": "reshape", "v": "reshape"} | OUTPUT,
)
class SeparateQkv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, t, _ = x.shape
        y = self.norm(x)
        q = self.q(y).view(b, t, 2, 4).transpose(1, 2)
        k = self.k(y).view(b, t, 2, 4).transpose(1, 2)
        v = self.v(y).view(b, t, 2, 4).transpose(1, 2)
        y = (torch.matmul(q, k.transpose(2, 3)) / 2).softmax(-1) @ v
        return self.head((x + self.proj(y.transpose(1, 2).reshape(b, t, 8))).mean(1))


# One head and no reshape: q and k only make the weights, v's channels reach proj as they are.
@hazard(
    "single_head",
    TOKENS,
    "stem->stem v->v proj->proj",
    skipped={"q": "query or key", "k": "query or key"} | OUTPUT,
    dims={"v": (0, 2), "proj": (0, 2)},
)
class SingleHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(x)
        q, k, v = self.q(y), self.k(y), self.v(y)
        y = torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) * 8**-0.5, dim=-1), v)
        return self.head((x + self.proj(y)).mean(1))


# The same through the one function of torch.
@hazard(
    "single_head_fused",
    TOKENS,
    "stem->stem v->v proj->proj",
    skipped={"q": "query or key", "k": "query or key"} | OUTPUT,
)
class SingleHeadFused(SingleHead):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(x)
        y = F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        return self.head((x + self.proj(y)).mean(1))


# The batch is dimension 1; with the heads it folds to b*2 rows, b outermost, and comes back.
@hazard(
    "sequence_first_attention",
    TOKENS,
    "stem->stem proj->proj fc->fn:gelu",
    skipped={"q": "reshape", "k": "reshape", "v": "reshape"} | OUTPUT,
    dims={"stem": (1, 2), "proj": (1, 2), "fc": (1, 2)},
)
class SequenceFirstAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.proj = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.transpose(0, 1))
        t, b, c = x.shape
        y = self.norm(x)
        q = self.q(y).contiguous().view(t, b * 2, c // 2).transpose(0, 1)
        k = self.k(y).contiguous().view(t, b * 2, c // 2).transpose(0, 1)
        v = self.v(y).contiguous().view(t, b * 2, c // 2).transpose(0, 1)
        y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).div(2).softmax(-1), v)
        x = x + self.proj(y.transpose(0, 1).reshape(t, b, c))
        return self.head((x + F.gelu(self.fc(x))).mean(0))


# The module multiplies with out_proj's weights and never calls it.
@hazard("multihead_attention", TOKENS, "stem->stem fc->fn:gelu", skipped={"attn.out_proj": "call"} | OUTPUT)
class MultiheadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(5, 8), nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return self.head((x + F.gelu(self.fc(x))).mean(1))


# torch's default layout: the batch is dimension 1 of what goes in and comes out.
@hazard(
    "multihead_attention_sequence_first",
    TOKENS,
    "stem->stem fc->fn:gelu",
    skipped={"attn.out_proj": "call"} | OUTPUT,
    dims={"stem": (1, 2), "fc": (1, 2)},
)
class MultiheadAttentionSequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attn = nn.Linear(5, 8), nn.MultiheadAttention(8, 2)
        self.fc, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.permute(1, 0, 2))
        y, _ = self.attn(x, x, x)
        x = x + y
        return self.head((x + F.gelu(self.fc(x))).mean(0))


# Both Linears mix the heads' attention weights, one before the softmax and one after: attention weights, no features.
@hazard(
    "talking_heads",
    TOKENS,
    "stem->stem proj->proj",
    skipped={"qkv": "reshape", "before": "gate", "after": "gate"} | OUTPUT,
)
class TalkingHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.proj, self.head = (nn.Linear(i, o) for i, o in ((5, 8), (8, 24), (8, 8), (8, 4)))
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.before((q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).softmax(dim=2)
        weights = self.after(weights).permute(0, 3, 1, 2)
        return self.head((x + self.proj((weights @ v).transpose(1, 2).reshape(b, t, c))).mean(1))


# The bias is made of coordinates alone. It ends in the attention weights too, but has no batch to begin with.
@hazard(
    "attention_position_bias",
    TOKENS,
    "stem->stem proj->proj",
    skipped={"qkv": "reshape", "bias1": "batch", "bias2": "batch"} | OUTPUT,
)
class AttentionPositionBias(nn.Module):
    grid: Tensor
    index: Tensor

    def __init__(self) -> None:
        super().__init__()
        position = torch.arange(6)
        self.register_buffer("grid", torch.linspace(-1, 1, 11).reshape(11, 1))
        self.register_buffer("index", position[:, None] - position[None, :] + 5, persistent=False)
        self.bias1, self.bias2 = nn.Linear(1, 8), nn.Linear(8, 2, bias=False)
        self.stem, self.qkv, self.proj, self.head = (nn.Linear(i, o) for i, o in ((5, 8), (8, 24), (8, 8), (8, 4)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.bias2(F.relu(self.bias1(self.grid)))[self.index.view(-1)].view(6, 6, 2).permute(2, 0, 1)
        weights = (q @ k.transpose(-2, -1) + 16 * torch.sigmoid(bias).unsqueeze(0)).softmax(dim=-1)
        return self.head((x + self.proj((weights @ v).transpose(1, 2).reshape(b, t, c))).mean(1))

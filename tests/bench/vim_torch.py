# SPDX-License-Identifier: Apache-2.0
"""Vision Mamba in plain torch operations, tuned as far as those go: a peer of `vimcore bench`, reported only.

Both directions run in one loop over the tokens, as two halves of a leading axis; everything that does not
depend on the previous state is computed before the loop, in chunks so that the (B, L, E, N) tensors stay in
cache, and the loop body is one fused multiply-add.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = {"tiny": 192, "small": 384, "base": 768}
CHUNK = 8  # tokens whose decay and input terms are built at once


def scan(u: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, Cm: Tensor) -> Tensor:
    """u, delta (S, L, E), A (S, E, N), Bm, Cm (S, L, N) -> y (S, L, E), no skip; S: directions and batch."""
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[2])
    out = []
    for d, x, b, c in zip(*(t.split(CHUNK, 1) for t in (delta, delta * u, Bm, Cm)), strict=True):
        decay = torch.exp(d.unsqueeze(-1) * A.unsqueeze(1)).unbind(1)
        inputs = (x.unsqueeze(-1) * b.unsqueeze(2)).unbind(1)
        states = []
        for a_t, x_t in zip(decay, inputs, strict=True):
            h = torch.addcmul(x_t, a_t, h)
            states.append(h)
        out.append((torch.stack(states, 1) @ c.unsqueeze(-1)).squeeze(-1))
    return torch.cat(out, 1)


class Layer(nn.Module):
    """Residual add, RMSNorm and the bidirectional mixer."""

    def __init__(self, width: int, state: int, kernel: int) -> None:
        super().__init__()
        inner, rank = 2 * width, -(-width // 16)
        self.rank, self.state, self.kernel = rank, state, kernel
        self.norm = nn.Parameter(torch.ones(width))
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(0.5 * torch.randn(2, inner, 1, kernel))
        self.conv_bias = nn.Parameter(torch.zeros(2, inner))
        self.x_proj = nn.Parameter(torch.randn(2, inner, rank + 2 * state) / inner**0.5)
        self.dt_weight = nn.Parameter(torch.randn(2, rank, inner) / rank**0.5)
        self.dt_bias = nn.Parameter(torch.full((2, inner), -4.0))
        self.A_log = nn.Parameter(torch.arange(1, state + 1).log().repeat(2, inner, 1))
        self.D = nn.Parameter(torch.ones(2, inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, r: Tensor) -> Tensor:
        batch, length, width = r.shape
        v = F.rms_norm(r, (width,), self.norm, 1e-5)
        x, z = self.in_proj(v).chunk(2, -1)
        x = F.pad(torch.stack([x, x.flip(1)]).transpose(2, 3), (self.kernel - 1, 0))  # (2, B, E, L + K - 1)
        u = F.conv1d(
            x.transpose(0, 1).flatten(1, 2),
            self.conv_weight.flatten(0, 1),
            self.conv_bias.flatten(),
            groups=4 * width,
        )
        u = F.silu(u).unflatten(1, (2, -1)).permute(1, 0, 3, 2).flatten(1, 2)  # (2, B L, E)
        dt, b, c = (u @ self.x_proj).split([self.rank, self.state, self.state], -1)
        delta = F.softplus(torch.baddbmm(self.dt_bias.unsqueeze(1), dt, self.dt_weight))
        A = (-self.A_log.exp()).repeat_interleave(batch, 0)  # (2 B, E, N)
        y = scan(*(t.reshape(2 * batch, length, -1) for t in (u, delta)), A, *(
            t.reshape(2 * batch, length, -1) for t in (b, c)
        ))  # fmt: skip
        y = (y.view(2, batch * length, -1) + self.D.unsqueeze(1) * u).view(2, batch, length, -1)
        return self.out_proj((y[0] + y[1].flip(1)) * 0.5 * F.silu(z))


class VimTorch(nn.Module):
    """Images (B, 3, img_size, img_size) -> logits (B, 1000); middle class token, averaged directions."""

    def __init__(self, img_size: int = 224, patch_size: int = 16, width: int = 192, depth: int = 24) -> None:
        super().__init__()
        self.patches = (img_size // patch_size) ** 2
        self.patch_embed = nn.Conv2d(3, width, patch_size, patch_size)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.patches + 1, width))
        self.layers = nn.ModuleList(Layer(width, state=16, kernel=4) for _ in range(depth))
        self.norm = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        middle = self.patches // 2
        token = self.cls_token.expand(x.shape[0], -1, -1)
        r = torch.cat([x[:, :middle], token, x[:, middle:]], 1) + self.pos_embed
        for layer in self.layers:
            r = r + layer(r)
        return self.head(F.rms_norm(r[:, middle], (r.shape[2],), self.norm, 1e-5))


def build(size: str, img_size: int) -> VimTorch:
    """The plain-torch twin of vim_{tiny,small,base}_patch16."""
    return VimTorch(img_size, width=SIZES[size])

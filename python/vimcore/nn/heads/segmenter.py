# SPDX-License-Identifier: Apache-2.0
"""Segmenter's mask transformer (arXiv 2105.05633): classes are tokens, masks their likeness to patches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...weights.dense import attention_heads
from ..parameters import trunc_normal


class Attention(nn.Module):
    """Self-attention of all tokens."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = attention_heads(dim), dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) of the same."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], dropout_p=dropout)
        return F.dropout(self.proj(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)


class Mlp(nn.Module):
    """Two linear maps with GELU between them."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) of the same."""
        x = F.dropout(F.gelu(self.fc1(x)), self.dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


class Block(nn.Module):
    """A pre-norm block of a transformer."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim, dropout), Mlp(dim, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) of the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MaskTransformer(nn.Module):
    """The decoder, under the names of its authors.

    Args:
        dim: width of the tokens.
        layers: blocks.
        dropout: of attention and within the blocks.
    """

    def __init__(self, dim: int, classes: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.classes = classes
        self.proj_dec = nn.Linear(dim, dim)
        self.cls_emb = nn.Parameter(torch.zeros(1, classes, dim))
        self.blocks = nn.ModuleList(Block(dim, dropout) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(dim)
        self.proj_patch = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.proj_classes = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.mask_norm = nn.LayerNorm(classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal(module.weight, 0.02)
                nn.init.zeros_(module.bias)
        trunc_normal(self.cls_emb, 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, J, classes) of normalised patches (B, J, D)."""
        x = torch.cat([self.proj_dec(tokens), self.cls_emb.expand(len(tokens), -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        patches, classes = self.decoder_norm(x).split([tokens.shape[1], self.classes], dim=1)
        patches = F.normalize(patches @ self.proj_patch, dim=-1)
        classes = F.normalize(classes @ self.proj_classes, dim=-1)
        return self.mask_norm(patches @ classes.transpose(1, 2))

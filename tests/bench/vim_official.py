# SPDX-License-Identifier: Apache-2.0
"""Vision Mamba step by step as the published code runs it: a peer of the GPU benchmark, also in training.

The same operations and memory traffic: activations are channel-major (B, E, L), the reverse direction works
on a flipped copy and its output is flipped back, B and C are copied, x_proj and out_proj read transposed
copies, and each direction is gated by itself. `official_kernels` says what computes them, what is kept for
the backward pass and what is computed again.

Trained under autocast, weights stay float32 and are cast at every step. For inference `cast` casts them once,
where autocast would do so at every step: that is in the peer's favour.

State-dict keys are the authors', so the weights of `vimcore.VisionMamba` load directly.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from official_kernels import AddNorm, Direction, kernels, scan, scan_gradients

__all__ = ["DEPTHS", "SIZES", "Layer", "VimOfficial", "build", "kernels", "scan", "scan_gradients"]

SIZES = {"toy": 64, "tiny": 192, "small": 384, "base": 768}  # toy: to try a benchmark out
DEPTHS = {"toy": 2, "tiny": 24, "small": 24, "base": 24}


class Weight(nn.Module):
    """Holds a weight, and a bias where there is one."""

    def __init__(self, *shape: int, bias: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)
        if bias:
            self.bias = nn.Parameter(torch.zeros(bias))


class Mixer(nn.Module):
    """The bidirectional mixer: (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, state: int, kernel: int) -> None:
        super().__init__()
        inner, rank = 2 * width, -(-width // 16)
        self.rank, self.state = rank, state
        steps = torch.arange(1, state + 1).log().repeat(inner, 1)
        self.A_log, self.A_b_log = nn.Parameter(steps), nn.Parameter(steps.clone())
        self.D, self.D_b = nn.Parameter(torch.ones(inner)), nn.Parameter(torch.ones(inner))
        self.in_proj = Weight(2 * inner, width)
        self.out_proj = Weight(width, inner)
        for suffix in ("", "_b"):
            self.add_module("conv1d" + suffix, Weight(inner, 1, kernel, bias=inner))
            self.add_module("x_proj" + suffix, Weight(rank + 2 * state, inner))
            self.add_module("dt_proj" + suffix, Weight(inner, rank, bias=inner))

    def direction(self, xz: Tensor, suffix: str) -> Tensor:
        """One direction on xz (B, 2E, L), from the first token to the last -> (B, E, L)."""
        conv1d, x_proj, dt_proj = (getattr(self, n + suffix) for n in ("conv1d", "x_proj", "dt_proj"))
        A, D = (self.A_b_log, self.D_b) if suffix else (self.A_log, self.D)
        weights = (conv1d.weight.squeeze(1), conv1d.bias, x_proj.weight, dt_proj.weight)
        gated: Tensor = Direction.apply(xz, *weights, -torch.exp(A), D, dt_proj.bias)
        return gated

    def forward(self, v: Tensor) -> Tensor:
        batch, length, width = v.shape
        xz = self.in_proj.weight @ v.reshape(batch * length, width).t()  # (2E, B L)
        xz = xz.view(-1, batch, length).transpose(0, 1)
        out = self.direction(xz, "") + self.direction(xz.flip(2), "_b").flip(2)
        return F.linear(out.transpose(1, 2) / 2, self.out_proj.weight)


class Layer(nn.Module):
    """Residual add, RMSNorm, mixer."""

    def __init__(self, width: int, state: int = 16, kernel: int = 4) -> None:
        super().__init__()
        self.mixer = Mixer(width, state, kernel)
        self.norm = nn.Module()
        self.norm.weight = nn.Parameter(torch.ones(width))

    def forward(self, h: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        v, residual = AddNorm.apply(h, residual, self.norm.weight)
        return self.mixer(v), residual

    def cast(self, dtype: torch.dtype) -> Layer:
        """Matrices and convolutions to `dtype`; A, D, the bias of dt and the norms stay as they are."""
        for name, module in self.mixer.named_children():
            module.weight.data = module.weight.data.to(dtype)
            if name.startswith("conv1d"):
                module.bias.data = module.bias.data.to(dtype)
        return self


class VimOfficial(nn.Module):
    """Images (B, 3, img_size, img_size) -> logits; middle class token, averaged directions."""

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        width: int = 192,
        depth: int = 24,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patches = (img_size // patch_size) ** 2
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch_size, patch_size)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.patches + 1, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm_f = nn.Module()
        self.norm_f.weight = nn.Parameter(torch.ones(width))
        self.head = nn.Linear(width, num_classes)

    def cast(self, dtype: torch.dtype) -> VimOfficial:
        """For activations in `dtype`; see `Layer.cast`."""
        for module in (self.patch_embed, self.head):
            module.to(dtype)
        self.cls_token.data, self.pos_embed.data = (
            self.cls_token.data.to(dtype),
            self.pos_embed.data.to(dtype),
        )
        for layer in self.layers:
            layer.cast(dtype)
        return self

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)
        middle = self.patches // 2
        h = (
            torch.cat([x[:, :middle], self.cls_token.expand(len(x), -1, -1), x[:, middle:]], 1)
            + self.pos_embed
        )
        residual = None
        for layer in self.layers:
            h, residual = layer(h, residual)
        h, _ = AddNorm.apply(h, residual, self.norm_f.weight)
        return self.head(h[:, middle])


def build(size: str, img_size: int) -> VimOfficial:
    """The published network of vim_{tiny,small,base}_patch16."""
    return VimOfficial(img_size, width=SIZES[size], depth=DEPTHS[size])

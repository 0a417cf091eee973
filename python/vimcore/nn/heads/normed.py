# SPDX-License-Identifier: Apache-2.0
"""Convolutions followed by a LayerNorm over the channels of each pixel, as ViTDet's detectors have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class ChannelNorm(nn.Module):
    """LayerNorm over C of (B, C, H, W), at every pixel by itself; float32 or wider under autocast."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) of the same."""
        last = x.permute(0, 2, 3, 1)  # no copy of channels-last tensors, which come out as such
        return F.layer_norm(last, self.weight.shape, self.weight, self.bias, EPS).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={EPS:g}"


class NormedConv2d(nn.Conv2d):
    """A convolution without bias that keeps the size, its norm, and maybe a ReLU.

    Its tensors are `weight`, `norm.weight`, `norm.bias`: detectron2's names.
    """

    def __init__(self, channels: int, out: int, kernel: int, relu: bool = False) -> None:
        super().__init__(channels, out, kernel, padding=kernel // 2, bias=False)
        self.norm, self.relu = ChannelNorm(out), relu

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, out, H, W)."""
        x = self.norm(super().forward(x))
        return F.relu(x, inplace=True) if self.relu else x

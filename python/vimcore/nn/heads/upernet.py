# SPDX-License-Identifier: Apache-2.0
"""UPerNet's head (arXiv 1807.10221): pooling at four scales, a top-down pyramid, all levels fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...weights.dense import POOLS
from .layers import ConvNorm, classifier, resized


class UPerHead(nn.Module):
    """mmsegmentation's UPerHead for four maps of the same channels.

    Args:
        dim: channels of the maps.
        channels: within the head.
        norm: "batch" or "group".
        dropout: share of whole channels that training sets to zero before the classifier.
    """

    def __init__(self, dim: int, channels: int, classes: int, norm: str, dropout: float) -> None:
        super().__init__()

        def conv(inputs: int, kernel: int) -> ConvNorm:
            return ConvNorm(inputs, channels, kernel, norm)

        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), conv(dim, 1)) for bins in POOLS
        )
        self.bottleneck = conv(dim + len(POOLS) * channels, 3)
        self.lateral_convs = nn.ModuleList(conv(dim, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(conv(channels, 3) for _ in range(3))
        self.fpn_bottleneck = conv(4 * channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, classes, h, w) at the size of the first map.

        Args:
            maps: four of (B, dim, h, w), from fine to coarse.
        """
        *finer, top = maps
        pooled = [resized(pool(top), top.shape[2:]) for pool in self.psp_modules]
        levels = [self.bottleneck(torch.cat([top, *pooled], dim=1))]
        for i in (2, 1, 0):  # each level gets what the coarser ones have summed up
            lateral = self.lateral_convs[i](finer[i])
            levels.insert(0, lateral + resized(levels[0], lateral.shape[2:]))
        out = [conv(level) for conv, level in zip(self.fpn_convs, levels)] + levels[3:]
        fused = torch.cat([resized(level, out[0].shape[2:]) for level in out], dim=1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(fused)))

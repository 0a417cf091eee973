# SPDX-License-Identifier: Apache-2.0
"""Regions of maps: which level of a pyramid a box reads, and aligned pooling there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align

CANONICAL = 224  # side in pixels of a box that reads the map of stride 16


def levels_of(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """(R,) which of the maps of these strides each box (R, 4) reads: the larger, the coarser."""
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    first = round(math.log2(strides[0]))
    level = torch.floor(4 + torch.log2(area.clamp(min=0).sqrt() / CANONICAL + 1e-8))
    return (level.long() - first).clamp(0, len(strides) - 1)


def pool(maps: Sequence[Tensor], strides: Sequence[int], boxes: Sequence[Tensor], side: int) -> Tensor:
    """Means (R, C, side, side) over the bins of all boxes, each on the map of its level.

    Half-pixel aligned: a bin's value is that of the map at its centre, less half a pixel of the map. Bins
    take as many samples as they cover pixels.

    Args:
        maps: (B, C, h, w) of each stride.
        boxes: (N, 4) of each of the B images, pixels of the image.
    """
    index = torch.cat([x.new_full((len(x), 1), i) for i, x in enumerate(boxes)])
    every = torch.cat(list(boxes))
    rois, level = torch.cat([index, every], 1), levels_of(every, strides)
    places, parts = [], []
    for i, (x, stride) in enumerate(zip(maps, strides)):
        here = torch.nonzero(level == i)[:, 0]
        places.append(here)
        parts.append(aligned(x, rois[here], side, 1 / stride))
    return torch.cat(parts)[torch.cat(places).argsort()]


def aligned(x: Tensor, rois: Tensor, side: int, scale: float = 1.0) -> Tensor:
    """Means (R, C, side, side) over the bins of boxes on one map (B, C, h, w).

    Args:
        rois: (R, 5): index into the batch, then the box in pixels that are `scale` pixels of the map.
    """
    found: Tensor = roi_align(x, rois, side, scale, sampling_ratio=0, aligned=True)
    return found


class ScaledGradient(torch.autograd.Function):
    """The input; its gradient is multiplied by a factor."""

    @staticmethod
    def forward(context: Any, x: Tensor, factor: float) -> Tensor:
        """x as it is."""
        context.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """The gradient, scaled."""
        return grads[0] * context.factor, None

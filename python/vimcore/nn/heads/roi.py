# SPDX-License-Identifier: Apache-2.0
"""Regions of maps: which level of a pyramid a box reads, and aligned pooling there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align

SMALL = 32 * 32  # pixels of a map up to which matrix products are faster on a CPU
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
        few = x.device.type == "cpu" and x.shape[2] * x.shape[3] <= SMALL
        parts.append((products if few else aligned)(x, rois[here], side, 1 / stride))
    return torch.cat(parts)[torch.cat(places).argsort()]


def aligned(x: Tensor, rois: Tensor, side: int, scale: float = 1.0) -> Tensor:
    """Means (R, C, side, side) over the bins of boxes on one map (B, C, h, w).

    Args:
        rois: (R, 5): index into the batch, then the box in pixels that are `scale` pixels of the map.
    """
    found: Tensor = roi_align(x, rois, side, scale, sampling_ratio=0, aligned=True)
    return found


def products(x: Tensor, rois: Tensor, side: int, scale: float = 1.0) -> Tensor:
    """As `aligned`, for boxes in the order of their images: each bin weighs all rows and all columns.

    The mean of bilinear samples on a grid is a product of one over its rows and one over its columns.
    """
    height, width = x.shape[2:]
    with torch.no_grad():
        corners = rois[:, 1:] * scale - 0.5
        rows = _weights(corners[:, 1], corners[:, 3], side, height)
        columns = _weights(corners[:, 0], corners[:, 2], side, width)
        counts = (rois[:, 0, None] == torch.arange(len(x), device=x.device)).sum(0).tolist()
    found = []
    for image, by_row, by_column in zip(x, rows.split(counts), columns.split(counts)):
        narrow = image.flatten(0, 1) @ by_column.flatten(0, 1).T  # (C height, R side)
        narrow = narrow.view(len(image), height, len(by_column), side).permute(2, 1, 0, 3)
        bins = by_row @ narrow.flatten(2)  # (R, side, C side)
        found.append(bins.view(len(by_row), side, len(image), side).transpose(1, 2))
    return torch.cat(found)


def _weights(low: Tensor, high: Tensor, side: int, cells: int) -> Tensor:
    """(R, side, cells): how much each cell of an axis weighs in each bin from low to high, (R,) each."""
    length = (high - low)[:, None, None]
    samples = (length / side).ceil()  # in a bin, as many as it covers cells; of an empty box none
    each = torch.arange(int(samples.max()) if len(low) else 0, dtype=low.dtype, device=low.device)
    bins = torch.arange(side, dtype=low.dtype, device=low.device)[:, None]
    place = low[:, None, None] + (bins + (each + 0.5) / samples.clamp(min=1)) * (
        length / side
    )  # (R, side, samples)
    counts = (each < samples) & (place >= -1) & (place <= cells)
    place = place.clamp(0, cells - 1)
    centres = torch.arange(cells, dtype=low.dtype, device=low.device)
    near = (1 - (place[..., None] - centres).abs()).clamp(min=0) * counts[..., None]
    return near.sum(2) / samples.clamp(min=1)


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

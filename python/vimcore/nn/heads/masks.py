# SPDX-License-Identifier: Apache-2.0
"""Masks of objects: the head that draws them in their boxes, what it learns, and how they are pasted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .normed import NormedConv2d
from .roi import aligned
from .rpn import wide


class MaskHead(nn.Module):
    """3x3 convolutions with norms, one transposed convolution, and the logits of each class."""

    def __init__(self, channels: int, num_classes: int, convs: int) -> None:
        super().__init__()
        self.convs = convs
        for i in range(convs):
            self.add_module(f"mask_fcn{i + 1}", NormedConv2d(channels, channels, 3, relu=True))
        self.deconv = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.predictor = nn.Conv2d(channels, num_classes, 1)
        for module in self.modules():
            if isinstance(module, (NormedConv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.001)
        for bias in (self.deconv.bias, self.predictor.bias):
            assert bias is not None
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features (R, channels, s, s) to logits (R, num_classes, 2 s, 2 s)."""
        for i in range(self.convs):
            x = self.get_submodule(f"mask_fcn{i + 1}")(x)
        return wide(self.predictor(F.relu(self.deconv(x), inplace=True)))


def mask_targets(masks: Tensor, index: Tensor, boxes: Tensor, side: int) -> Tensor:
    """What of objects lies in boxes, as (R, side, side) of 0 and 1: bins that they cover by half or more.

    Args:
        masks: (N, H, W) of 0 and 1, the objects of one image.
        index, boxes: (R,) and (R, 4): which object in which box.
    """
    rois = torch.cat([index[:, None].to(boxes), boxes], 1)
    covered = aligned(masks[:, None].to(boxes.dtype), rois, side)[:, 0]
    return (covered >= 0.5).to(boxes.dtype)


def mask_loss(logits: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of the logits (R, K, s, s) of the true classes; 0 without any box."""
    if not len(logits):
        return logits.sum() * 0
    own = logits[torch.arange(len(logits), device=logits.device), classes]
    return F.binary_cross_entropy_with_logits(own, targets)


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (N, s, s) in their boxes (N, 4) on images (N, height, width): values at the pixels' centres.

    Bilinear, with 0 around: 0.5 on the edge of the box of a full mask, so that from 0.5 on a pixel counts.
    """
    out = masks.new_zeros(len(masks), *size)
    for i, (rows, columns, part) in enumerate(pasted(masks, boxes, size)):
        out[i, rows, columns] = part
    return out


def pasted(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Iterable[tuple[slice, slice, Tensor]]:
    """As `paste`, one object after the other: rows, columns and the values there; all else is 0."""
    for mask, box in zip(masks, boxes):
        x1, y1, x2, y2 = box.tolist()
        rows, columns = _around(y1, y2, size[0], len(mask)), _around(x1, x2, size[1], len(mask))
        y, x = _places(rows, y1, y2, mask), _places(columns, x1, x2, mask)
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], 2)
        part = F.grid_sample(mask[None, None], grid[None], align_corners=False)
        yield rows, columns, part[0, 0]


def _around(low: float, high: float, side: int, cells: int) -> slice:
    """The pixels of a box and of half a cell of its mask around it: beyond, all is 0."""
    margin = (high - low) / cells / 2
    begin = min(max(int(low - margin), 0), side)
    return slice(begin, max(min(int(high + margin) + 1, side), begin))


def _places(pixels: slice, low: float, high: float, like: Tensor) -> Tensor:
    """Centres of the pixels, as -1 to 1 within the box."""
    centres = torch.arange(pixels.start, pixels.stop, dtype=like.dtype, device=like.device) + 0.5
    return (centres - low) / max(high - low, 1e-6) * 2 - 1

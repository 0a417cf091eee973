# SPDX-License-Identifier: Apache-2.0
"""Images of any size through a network: by overlapping windows or whole, then back to the size asked for."""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

STRIP = 1 << 24  # numbers of logits at the full size that are made at a time

Sides = tuple[int, int]


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: in steps of the stride, the last one at the end."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [min(stride * k, max(length - window, 0)) for k in range(count)]


def logits_by_windows(model: nn.Module, images: Tensor, window: Sides | None, stride: Sides) -> Tensor:
    """Logits (B, K, H, W) in float32 of images (B, C, H, W): means over the windows that see a pixel.

    A side shorter than the window is filled up with zeros (the mean colour) at the right and bottom; what
    the network says of that part is dropped.

    Args:
        window: that the network takes; None: images as they are.
    """
    if window is None:
        whole: Tensor = model(images).float()
        return whole
    height, width = images.shape[2:]
    padded = F.pad(images, (0, max(window[1] - width, 0), 0, max(window[0] - height, 0)))
    tops, lefts = (starts(n, w, s) for n, w, s in zip(padded.shape[2:], window, stride))
    if len(tops) == len(lefts) == 1:
        only: Tensor = model(padded).float()
        return only[:, :, :height, :width]
    total = counts = None
    for top, left in itertools.product(tops, lefts):
        rows, columns = slice(top, top + window[0]), slice(left, left + window[1])
        found = model(padded[:, :, rows, columns]).float()
        if total is None or counts is None:
            total = found.new_zeros(*found.shape[:2], *padded.shape[2:])
            counts = found.new_zeros(padded.shape[2:])
        total[:, :, rows, columns] += found
        counts[rows, columns] += 1
    assert total is not None
    assert counts is not None
    return (total / counts)[:, :, :height, :width]


def classes_of(logits: Tensor, size: Sides) -> NDArray[np.uint8]:
    """Most probable class (H, W) of each pixel at `size`, of logits (K, h, w), which are resized bilinearly.

    The lowest of equal ones. Full-size logits exist for some rows at a time.
    """
    if tuple(logits.shape[1:]) == tuple(size):
        return logits.argmax(0).to(torch.uint8).cpu().numpy()
    classes, height = logits.shape[:2]
    rows = max(STRIP // (classes * size[1]), 1)
    parts = []
    for top in range(0, size[0], rows):
        bottom = min(top + rows, size[0])
        places = (torch.arange(top, bottom, dtype=torch.float64) + 0.5) * (height / size[0]) - 0.5
        above = places.clamp(min=0).floor().long()
        share = (places.clamp(min=0) - above).to(logits)[None, :, None]
        below = (above + 1).clamp(max=height - 1)
        strip = logits[:, above] * (1 - share) + logits[:, below] * share
        strip = F.interpolate(strip[None], (bottom - top, size[1]), mode="bilinear", align_corners=False)[0]
        parts.append(strip.argmax(0).to(torch.uint8))
    return torch.cat(parts).cpu().numpy()

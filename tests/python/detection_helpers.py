# SPDX-License-Identifier: Apache-2.0
"""A small detector, and targets of rectangles, for test_detection_*.py."""

from __future__ import annotations

from typing import Any

import torch
import vimcore
from torch import Tensor
from vimcore.detection import CascadeMaskRCNN

SMALL: dict[str, Any] = {
    "channels": 8,
    "scales": (1, 0.5, 0.25),
    "anchors": (8, 16, 24),
    "box_convs": 1,
    "box_width": 16,
    "mask_convs": 1,
    "anchors_sampled": 32,
    "boxes_sampled": 16,
    "before_nms": (64, 64),
    "proposals": 32,
}


def backbone(**options: Any) -> vimcore.VisionMamba:
    """16 wide, 2 deep, 8 x 8 patches of images of 32 x 32."""
    small = {"img_size": 32, "patch_size": 4, "embed_dim": 16, "depth": 2, "class_token": "none"}
    return vimcore.VisionMamba(**{**small, "num_classes": 0, **options})


def detector(num_classes: int = 3, vim: dict[str, Any] | None = None, **options: Any) -> CascadeMaskRCNN:
    """With weights that are the same at every call, and large enough that everything matters."""
    torch.manual_seed(0)
    model = CascadeMaskRCNN(backbone(**(vim or {})), num_classes, **{**SMALL, **options})
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "cls_score" in name or "bbox_pred" in name or "anchor_deltas" in name or "logits" in name:
                p.mul_(20)
    return model


def target(
    *boxes: tuple[int, int, int, int], labels: tuple[int, ...] = (), size: tuple[int, int] = (32, 32)
) -> dict[str, Tensor]:
    """Rectangles that fill their boxes; labels count 1, 2, 3, 1, ... where none are given."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes):
        mask[y1:y2, x1:x2] = True
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels or [i % 3 + 1 for i in range(len(boxes))], dtype=torch.int64),
        "masks": masks,
    }


TWO = [target((2, 3, 14, 20), (10, 8, 30, 28)), target((5, 5, 12, 17))]  # of two images

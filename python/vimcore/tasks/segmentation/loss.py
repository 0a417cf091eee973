# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of pixels; those of unknown class have no part in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from ...nn.heads.layers import resized

IGNORED = 255  # in masks: no class
AVERAGES = ("valid", "all")


def cross_entropy(logits: Tensor, target: Tensor, average: str = "valid") -> Tensor:
    """Mean cross-entropy; 0, with gradients of 0, where no pixel has a class.

    Args:
        logits: (B, classes, h, w); resized to the target's size, never the target to theirs.
        target: (B, H, W) of integers: classes, or 255 for none.
        average: the sum is divided by the number of pixels that have a class ("valid", as torch does), or of
            all pixels ("all", as mmsegmentation does), so that empty surroundings lower the rate.
    """
    if average not in AVERAGES:
        raise ValueError(f"average: expected {' or '.join(map(repr, AVERAGES))}, got {average!r}")
    logits = resized(logits, target.shape[1:])
    total = F.cross_entropy(logits, target.long(), ignore_index=IGNORED, reduction="sum")
    if average == "all":
        return total / max(target.numel(), 1)
    return total / (target != IGNORED).sum().clamp(min=1)


def loss_of_heads(
    outputs: Tensor | Sequence[Tensor], target: Tensor, average: str = "valid", auxiliary: float = 0.4
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of what a network gives in training, and the auxiliary head's part of it, unweighted.

    Args:
        outputs: logits, or logits and those of an auxiliary head.
        target, average: as `cross_entropy`.
        auxiliary: weight of the auxiliary loss.
    """
    if isinstance(outputs, Tensor):
        return cross_entropy(outputs, target, average), {}
    logits, further = outputs
    aux = cross_entropy(further, target, average)
    return cross_entropy(logits, target, average) + auxiliary * aux, {"aux_loss": aux.detach()}

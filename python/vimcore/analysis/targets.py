# SPDX-License-Identifier: Apache-2.0
"""Which class of each image an explanation is about."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Target = int | Sequence[int] | Tensor | None


def target_index(op: str, target: Target, logits: Tensor) -> Tensor:
    """Class indices (B) int64: the target, or the predicted classes.

    Args:
        op: the function, for messages.
        target: a class for all images, or one per image; None: the predicted ones.
        logits: (B, classes).

    Raises:
        ValueError: the target is no class, or there are not as many as images.
    """
    batch, classes = logits.shape
    if target is None:
        return logits.argmax(dim=1)
    index = torch.as_tensor(target, device=logits.device)
    if index.dtype.is_floating_point or index.dtype == torch.bool or index.ndim > 1:
        raise ValueError(f"[{op}] target: expected class indices, got {target!r}")
    if index.ndim == 1 and len(index) != batch:
        raise ValueError(f"[{op}] target: expected one class or {batch}, got {len(index)}")
    index = index.long().expand(batch)
    if batch and (int(index.min()) < 0 or int(index.max()) >= classes):
        raise ValueError(f"[{op}] target: expected 0 .. {classes - 1}, got {index.tolist()}")
    return index

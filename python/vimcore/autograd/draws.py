# SPDX-License-Identifier: Apache-2.0
"""The random draws of a training forward, all from torch's generators and in a fixed order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._core import Config, Draws
from .tensors import exported, wide

NONE = Draws()  # of a forward in eval mode


def draw(config: Config, images: Tensor, position: int | None = None) -> Draws:
    """The draws for a batch.

    Args:
        images: (B, ...); only their number, type and device count.
        position: of a random class token where it was drawn before; None: drawn here.
    """
    batch, depth, dtype = images.shape[0], config.depth, wide(images.dtype)
    drop_path = dropout = None
    if config.drop_path_rate > 0:
        steps = max(depth - 1, 1)
        rates = [config.drop_path_rate * (j / steps if depth > 1 else 1.0) for j in range(depth)]
        keep = 1 - torch.tensor(rates, dtype=dtype, device=images.device)[:, None]
        drop_path = (torch.rand(depth, batch, dtype=dtype, device=images.device) < keep) / keep
    if config.drop_rate > 0:
        ones = images.new_ones(batch, config.tokens, config.embed_dim, dtype=dtype)
        dropout = F.dropout(ones, config.drop_rate)
        if config.class_token == "registers":  # as published, only patches are dropped
            dropout[:, config.class_positions] = 1
    flip = config.directions == "sequence" and bool(torch.rand(()) < 0.5)
    if position is None:
        position = draw_position(config) if config.class_token == "random" else -1
    return Draws(exported(drop_path), exported(dropout), flip, position)


def draw_position(config: Config) -> int:
    """Where the class token stands in a training forward (class_token="random")."""
    return int(torch.randint(0, config.patches + 1, ()))

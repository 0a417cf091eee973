# SPDX-License-Identifier: Apache-2.0
"""What becomes of normalised tokens: read out for the head, or taken apart into patches of some layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._core import Config
from ..utils.arguments import integer


def readout(tokens: Tensor, config: Config, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Pools normalised tokens (B, L, D), applies the head: (B, num_classes); pool="all": per token."""
    if config.class_token == "double":
        return head((tokens[:, 0] + tokens[:, -1]) / 2)
    if config.class_token != "none":
        return head(tokens[:, class_position(tokens, config)])
    if config.head_per_token:
        logits = head(tokens)
        return logits.amax(1) if config.pool == "max" else logits
    return head(tokens[:, -1] if config.pool == "last" else tokens.mean(1))


def class_position(tokens: Tensor, config: Config) -> int:
    """Index of the (first) class token among tokens (B, L, D) of eval mode."""
    return (tokens.shape[1] - 1) // 2 if config.class_token == "middle" else config.class_position


def patches_of(tokens: Tensor, config: Config) -> Tensor:
    """Tokens without class tokens."""
    count, at = config.class_tokens, class_position(tokens, config)
    if count == 0:
        return tokens
    if count == 2:
        return tokens[:, 1:-1]
    return torch.cat([tokens[:, :at], tokens[:, at + 1 :]], dim=1) if at else tokens[:, 1:]


def layer_indices(config: Config, indices: Sequence[int] | None) -> list[int]:
    """Layers counted from the first; None: the last of each quarter, of a pair ("block") the second.

    Raises:
        ValueError: there is no such layer.
    """
    depth = config.depth
    if indices is None:
        step = 2 if config.directions == "block" else 1
        indices = sorted({(depth * i // 4 + step - 1) // step * step - 1 for i in range(1, 5)} - {-1})
    indices = [integer("[VisionMamba] indices", index) for index in indices]
    for index in indices:
        if not -depth <= index < depth:
            raise ValueError(f"[VisionMamba] indices: expected {-depth} to {depth - 1}, got {index}")
    return [index % depth for index in indices]

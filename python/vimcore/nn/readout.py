# SPDX-License-Identifier: Apache-2.0
"""What becomes of normalised tokens: read out for the head, or taken apart into patches of some layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _core
from .._core import Config
from ..utils.arguments import integer
from .following import Plan

Known = Config | Plan
Weight = Callable[[str], Tensor]  # a parameter by its state-dict key
Module = Callable[[Tensor], Tensor]


def activations_like(tensor: Tensor) -> AbstractContextManager[Any]:
    """Within, modules of torch compute in the 16-bit type of this tensor beside wide parameters."""
    if tensor.dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(tensor.device.type, tensor.dtype)
    return nullcontext()


def readout(
    tokens: Tensor, config: Known, weight: Weight, head: Module, neck: Module | None = None
) -> Tensor:
    """Pools normalised tokens (B, L, D), applies the head: (B, num_classes); pool="all": per token.

    Args:
        neck: what narrows registers (B, n, D) to the readout; None: computed from its weights.
    """
    if config.head_per_token:
        logits = head(tokens)
        return logits.amax(1) if config.pool == "max" else logits
    return head(pooled(tokens, config, weight, neck))


def pooled(tokens: Tensor, config: Known, weight: Weight, neck: Module | None = None) -> Tensor:
    """What a head that does not see every token sees: (B, readout width) of normalised tokens (B, L, D)."""
    if config.class_token == "registers":
        registers = tokens[:, class_positions(tokens, config)]
        if neck is not None and config.neck_reduction > 1:
            return neck(registers)
        return _through_neck(registers, config, weight)
    if config.class_token == "double":
        return (tokens[:, 0] + tokens[:, -1]) / 2
    if config.class_token != "none":
        return tokens[:, class_positions(tokens, config)[0]]
    return tokens[:, -1] if config.pool == "last" else tokens.mean(1)


def _through_neck(registers: Tensor, config: Known, weight: Weight) -> Tensor:
    """Registers (B, n, D) one beside the other, narrowed and normalised where the network has a neck."""
    if config.neck_reduction == 1:
        return registers.flatten(1)
    x, eps = F.linear(registers, weight("neck.weight")).flatten(1), config.norm_eps
    if config.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight("norm_neck.weight"), weight("norm_neck.bias"), eps)
    return F.rms_norm(x, x.shape[-1:], weight("norm_neck.weight"), eps)


def class_positions(tokens: Tensor, config: Known) -> list[int]:
    """Indices of the class tokens among tokens (B, L, D) of eval mode."""
    if tokens.shape[1] == config.tokens:  # which a compiler knows
        return config.class_positions
    patches = tokens.shape[1] - config.class_tokens
    return _core.class_places(config.class_token, patches, config.registers or 0)


def patches_of(tokens: Tensor, config: Known) -> Tensor:
    """Tokens without class tokens."""
    at = class_positions(tokens, config)
    if at == [0]:
        return tokens[:, 1:]
    ends = zip([-1, *at], [*at, tokens.shape[1]])
    parts = [tokens[:, before + 1 : next] for before, next in ends]
    parts = [part for part in parts if part.shape[1]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def map_shape(config: Known) -> tuple[int, ...]:
    """Axes of the patches of an image, (h, w), or of a clip, (T, h, w)."""
    return (config.frames, *config.grid) if config.frames else config.grid


def layer_indices(config: Known, indices: Sequence[int] | None) -> list[int]:
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

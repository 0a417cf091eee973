# SPDX-License-Identifier: Apache-2.0
"""Images as patches of pixels, and what a backbone must be like to learn from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._core import Config
from ..nn.vision_mamba import VisionMamba
from ..weights.dense import refuse_clips


def checked_backbone(name: str, backbone: nn.Module) -> VisionMamba:
    """The backbone.

    Args:
        name: of the class that asks, for messages.

    Raises:
        TypeError, ValueError: it is no VisionMamba, has a head, or patches that overlap or do not fit.
    """
    if not isinstance(backbone, VisionMamba):
        raise TypeError(f"[{name}] backbone: expected a VisionMamba, got {type(backbone).__name__}")
    config = backbone._config
    if config.num_classes:
        raise ValueError(
            f"[{name}] backbone: expected no head (num_classes=0), got {config.num_classes} classes; "
            "call reset_classifier(0)"
        )
    refuse_clips(name, config)
    if config.stride != config.patch_size:
        raise ValueError(
            f"[{name}] backbone: expected stride {config.patch_size} as its patches, got {config.stride}: "
            "patches that overlap show what is to be predicted"
        )
    if any(side % config.patch_size for side in config.img_size):
        raise ValueError(
            f"[{name}] backbone: expected sides that patches of {config.patch_size} divide, "
            f"got img_size {tuple(config.img_size)}"
        )
    return backbone


def patches(images: Tensor, size: int) -> Tensor:
    """(B, J, C size^2) pixels of the patches, by rows, of images (B, C, H, W)."""
    batch, channels, height, width = images.shape
    rows, columns = height // size, width // size
    parts = images.reshape(batch, channels, rows, size, columns, size)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * size**2)


def unpatched(values: Tensor, config: Config) -> Tensor:
    """Images (B, C, H, W) of their patches (B, J, C size^2): the inverse of `patches`."""
    rows, columns = config.grid
    channels, size = config.in_chans, config.patch_size
    parts = values.reshape(len(values), rows, columns, channels, size, size)
    return parts.permute(0, 3, 1, 4, 2, 5).reshape(len(values), channels, rows * size, columns * size)


def normalised(values: Tensor, floor: float) -> Tensor:
    """Every patch by its own mean and deviation.

    Args:
        floor: added to the variance.
    """
    variance, mean = torch.var_mean(values, dim=-1, keepdim=True, correction=0)
    return (values - mean) / (variance + floor).sqrt()


def restored(found: Tensor, values: Tensor, floor: float) -> Tensor:
    """Predictions of `normalised(values, floor)`, given mean and deviation of the values back."""
    variance, mean = torch.var_mean(values, dim=-1, keepdim=True, correction=0)
    return found.to(values.dtype) * (variance + floor).sqrt() + mean

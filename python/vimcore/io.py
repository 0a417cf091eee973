# SPDX-License-Identifier: Apache-2.0
"""Weights of ``VisionMamba`` in files: vimcore files and the authors' checkpoints; position tables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .config import image_size
from .nn import saving
from .nn.saving import load_checkpoint
from .nn.vision_mamba import VisionMamba
from .positions import resize_pos_embed

Path = str | os.PathLike[str]
__all__ = ["image_size", "load_checkpoint", "load_model", "resize_pos_embed", "save_model"]


def save_model(
    model: torch.nn.Module,
    path: Path,
    labels: Sequence[str] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
) -> None:
    """Writes weights, architecture, labels and preprocessing to one safetensors file, all or nothing.

    See `VisionMamba.save` for what becomes of other modules and parametrised weights.

    Args:
        model: a `VisionMamba`, or what torch.compile, DistributedDataParallel or AveragedModel made of it.
        labels: one name for each class.
        preprocess: mean, std, resize, crop, interpolation; default: ImageNet evaluation at the model's image
            size. Networks with neither 1 nor 3 channels have none.
        dtype: of the weights in the file, see `VisionMamba.save`.

    Raises:
        ValueError: the file could not describe the network, or labels or preprocessing do not fit.
    """
    saving.save(_unwrapped(model), path, labels, preprocess, dtype)


def _unwrapped(model: Any) -> VisionMamba:
    """The network itself."""
    inner = model
    while not isinstance(inner, VisionMamba):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            raise TypeError(f"[VisionMamba] save: expected a VisionMamba, got {type(model).__name__}")
    return inner


def load_model(
    path: Path,
    img_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
    stride: int | None = None,
    dynamic_img_size: bool = False,
) -> VisionMamba:
    """The network of a vimcore file, in eval mode.

    Args:
        img_size, stride: other image size and stride of the patches than stored, pixels; the position table
            is resized, class tokens left alone.
        dynamic_img_size: images of any size, see `VisionMamba`.

    Raises:
        vimcore.Error: the file is missing or damaged.
        ValueError: it is no vimcore file, its tensors do not fit its configuration, or an option does not.
    """
    return saving.load_as(VisionMamba, path, img_size, device, stride, dynamic_img_size)

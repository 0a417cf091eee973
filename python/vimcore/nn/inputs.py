# SPDX-License-Identifier: Apache-2.0
"""Images as a network takes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._core import Config
from ..autograd.checks import refuse_layout, refuse_wrapped
from ..autograd.tensors import (
    NAMES,
    activation_types,
    autocast_type,
    describe,
    from_device,
    no_half,
    on_cuda,
    require_unit,
    wide,
)


def checked_images(
    images: Any, like: Tensor, config: Config, any_size: bool, followed: bool = False
) -> Tensor:
    """The images as the core takes them.

    Args:
        like: a parameter of the network.
        any_size: whether sizes other than the configuration's are taken.
        followed: by a tracer: memory is not looked at.

    Raises:
        ValueError: type, shape or device do not fit, of the images or of the parameter.
        vimcore.Error: they are bfloat16, for which this CPU has no unit.
    """
    height, width = config.img_size
    channels, ndim = config.in_chans, 5 if config.frames else 4
    cuda = on_cuda(like)
    if like.is_meta or like.dtype not in ((torch.float32,) if cuda else (torch.float32, torch.float64)):
        raise ValueError(
            "[VisionMamba] parameters: expected f32 or f64 on the cpu, or f32 on cuda, got "
            f"{describe(like)}; for 16-bit activations leave them in f32 and use torch.autocast, or images "
            "of that type"
        )
    images = from_device(images)
    if isinstance(images, Tensor):
        refuse_wrapped("VisionMamba", ["images"], [images])
        if not followed:
            refuse_layout("VisionMamba", "images", images)
    autocast = autocast_type(like)
    if autocast is not None and isinstance(images, Tensor) and images.is_floating_point():
        images = images.to(autocast)
    types = [t for t in activation_types(like) if wide(t) == like.dtype]
    if (
        not isinstance(images, Tensor)
        or images.ndim != ndim
        or images.shape[1] != channels
        or (config.frames and images.shape[2] != config.frames)
        or (images.shape[-2:] != (height, width) and not any_size)
        or images.dtype not in types
        or images.device != like.device
    ):
        *others, last = [NAMES[t] for t in types]
        names = f"{', '.join(others)} or {last}" if others else last
        axes = config.images_axes.replace(f"{height}, {width})", "H, W)") if any_size else config.images_axes
        expected = f"{axes} {names} {like.device}"
        remedy = no_half(images.dtype) if isinstance(images, Tensor) and not cuda else ""
        if not any_size and isinstance(images, Tensor) and images.ndim == ndim:
            size = tuple(images.shape[-2:])
            if size != (height, width):
                remedy = (
                    f": other sizes by dynamic_img_size=True, set_input_size({size}), or "
                    f"load(..., img_size={size})"
                )
        raise ValueError(f"[VisionMamba] images: expected {expected}, got {describe(images)}{remedy}")
    if not cuda:
        require_unit("[VisionMamba] images", images.dtype)
    return images if followed else images.resolve_neg().contiguous()

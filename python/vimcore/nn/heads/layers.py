# SPDX-License-Identifier: Apache-2.0
"""Convolutions with norm and ReLU under mmsegmentation's names, and resizing between maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...utils import distributed
from ...weights.dense import NORMS, norm_groups


def norm_layer(kind: str, channels: int) -> nn.Module:
    """ "batch": BatchNorm; "group": GroupNorm, which needs no other images (`weights.dense.norm_groups`)."""
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(norm_groups(channels), channels)


class ConvNorm(nn.Module):
    """A convolution without bias that keeps the size, norm, ReLU."""

    def __init__(self, inputs: int, channels: int, kernel: int, norm: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, channels, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        self.norm_name = NORMS[norm]
        self.add_module(self.norm_name, norm_layer(norm, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, channels, H, W).

        Raises:
            ValueError: BatchNorm is to learn from one value of each channel.
        """
        x, norm = self.conv(x), self.get_submodule(self.norm_name)
        if self.training and isinstance(norm, nn.BatchNorm2d) and x[:, 0].numel() == 1:
            raise ValueError(
                "[segmentation] BatchNorm cannot learn from a single value of each channel, as here with one "
                "image in this process and a map of one pixel; take two or more images for each process, or "
                "head_norm='group'"
            )
        return F.relu(norm(x), inplace=True)


def classifier(channels: int, classes: int) -> nn.Conv2d:
    """The last 1x1 convolution."""
    conv = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def resized(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """A map (B, C, h, w) as (B, C, *size): bilinear between the centres of pixels, no antialiasing."""
    if tuple(x.shape[2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with BatchNorm over the images of all processes, where there are several on GPUs.

    On CPUs, where torch has no such thing, every process keeps statistics of its own images.
    """
    if device.type != "cuda" or distributed.world() == 1:
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)

# SPDX-License-Identifier: Apache-2.0
"""A small network by timm, and images for it, for test_timm*.py."""

from __future__ import annotations

from typing import Any

import timm
import torch
import vimcore.timm  # noqa: F401  registers
from vimcore.timm import TimmVisionMamba

NAME = "vimcore_vim_tiny_patch16_224"
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 8}


def small(**options: Any) -> TimmVisionMamba:
    return timm.create_model(NAME, **{**SMALL, "num_classes": 5, **options})


def images(batch: int = 2, channels: int = 3, side: int = 32) -> torch.Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(5))

# SPDX-License-Identifier: Apache-2.0
"""The networks that are measured: Vim and its peers, as classifiers or as backbones of a feature pyramid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...config import WIDTHS
from ...nn.heads.pyramid import SimplePyramid
from ...nn.vision_mamba import VisionMamba
from .common import Options
from .peers import load_module

PATCH = 16
# Peer: module in tests/bench, further arguments of its `build`.
TORCH_PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "torch": ("deit", {}),
    "torch-materialised": ("deit", {"materialised": True}),
    "openvino": ("deit", {}),
    "onnxruntime": ("deit", {}),
    "vim-torch": ("vim_torch", {}),
}
WITHOUT_NECK = {"vim-torch"}
OURS = (None, "vimcore-float32")


class WithNeck(nn.Module):
    """The last map of a backbone, through ViTDet's pyramid: images to the sums of its levels' maps.

    The sums stand for what a head would read; they cost next to nothing and keep every level alive.
    """

    def __init__(self, backbone: nn.Module, width: int) -> None:
        super().__init__()
        self.backbone, self.pyramid = backbone, SimplePyramid(width, stride=PATCH)

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.backbone, VisionMamba):
            (features,) = self.backbone.forward_intermediates(images, [self.backbone.config["depth"] - 1])
        else:
            features = self.backbone.features(images)  # type: ignore[operator]
        levels = self.pyramid(features.to(next(self.pyramid.parameters()).dtype))
        return torch.stack([level.sum((1, 2, 3)) for level in levels], 1)


def build(options: Options, peer: str | None, side: int, folder: Path | None) -> nn.Module:
    """Vim, where no peer is named, or a peer's network in torch; random weights.

    Args:
        side: of the images, pixels.
        folder: of the peers' sources.
    """
    torch.manual_seed(0)
    width = WIDTHS[options.model]
    classes = 1000 if options.neck == "none" else 0
    model: nn.Module
    if peer in OURS:
        model = VisionMamba(img_size=side, embed_dim=width, memory=options.memory, num_classes=classes)
    else:
        assert peer is not None
        assert folder is not None
        module, arguments = TORCH_PEERS[peer]
        model = load_module(folder, module).build(options.model.removeprefix("vim_"), side, **arguments)
    return model if options.neck == "none" else WithNeck(model, width)


def dtype_of(options: Options, peer: str | None) -> torch.dtype:
    """Of the images that a network is given, and of the activations in it."""
    return torch.float32 if peer == "vimcore-float32" else getattr(torch, options.dtype)


def placed(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """On the device, in the type of the activations; Vim's own weights stay in float32, as it wants them."""
    model.to(device)
    if isinstance(model, VisionMamba):
        return model
    if isinstance(model, WithNeck) and isinstance(model.backbone, VisionMamba):
        model.pyramid.to(dtype)
        return model
    return model.to(dtype)


def neck_flops(options: Options, side: int) -> int:
    """Multiply-adds of the neck for one image."""
    if options.neck == "none":
        return 0
    grid = side // PATCH
    return SimplePyramid(WIDTHS[options.model], stride=PATCH).flops(grid, grid)

# SPDX-License-Identifier: Apache-2.0
"""The head of fully convolutional networks: a few 3x3 convolutions and a classifier of pixels."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import ConvNorm, classifier


class FCNHead(nn.Module):
    """mmsegmentation's FCNHead without its concatenation; with convs=0 a linear map of every pixel.

    Args:
        dim: channels of the map.
        channels: of the convolutions.
        convs: how many.
        norm: "batch" or "group".
        dropout: share of whole channels that training sets to zero before the classifier.
    """

    def __init__(self, dim: int, channels: int, convs: int, classes: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *(ConvNorm(channels if i else dim, channels, 3, norm) for i in range(convs))
        )
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels if convs else dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes, h, w) of a map (B, dim, h, w)."""
        return self.conv_seg(self.dropout(self.convs(x)))

# SPDX-License-Identifier: Apache-2.0
"""Four maps of strides 4, 8, 16 and 32 pixels, each from one layer of a plain backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ...weights.dense import levels
from .layers import norm_layer


class Neck(nn.Module):
    """Transposed convolutions where maps grow, max-pooling where they shrink; channels stay.

    Growing fourfold, norm and GELU stand between the two steps. Published files count it to the backbone:
    `fpn1`, `fpn2`.

    Args:
        dim: channels.
        stride: of the incoming maps in pixels: 4, 8 or 16.
        norm: "batch" or "group".
    """

    def __init__(self, dim: int, stride: int, norm: str) -> None:
        super().__init__()
        self.exponents = levels(stride)
        for level, exponent in enumerate(self.exponents, 1):
            if exponent > 0:
                steps: list[nn.Module] = [nn.ConvTranspose2d(dim, dim, 2, 2)]
                if exponent == 2:
                    steps += [norm_layer(norm, dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)]
                self.add_module(f"fpn{level}", nn.Sequential(*steps))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, D, H, W) of the four strides from four maps (B, D, h, w) of one; sides are at least 1."""
        found = []
        for level, (x, exponent) in enumerate(zip(maps, self.exponents), 1):
            if exponent > 0:
                x = self.get_submodule(f"fpn{level}")(x)
            elif exponent < 0:
                height, width = (min(2**-exponent, side) for side in x.shape[2:])
                x = F.max_pool2d(x, (height, width))
            found.append(x)
        return found


# Published files, and therefore state dicts, have the neck's tensors among the backbone's.


def published(name: str) -> str:
    """The state dict's name of a parameter."""
    return f"backbone.{name.removeprefix('neck.')}" if name.startswith("neck.") else name


def published_names(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state-dict hook: neck.* becomes backbone.*"""
    for name in [name for name in state if name.startswith(prefix + "neck.")]:
        state[prefix + published(name.removeprefix(prefix))] = state.pop(name)


def own_names(state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before loading: backbone.fpn* becomes neck.fpn*"""
    for name in [name for name in state if name.startswith(prefix + "backbone.fpn")]:
        state[prefix + "neck." + name.removeprefix(prefix + "backbone.")] = state.pop(name)

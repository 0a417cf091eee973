# SPDX-License-Identifier: Apache-2.0
"""ViTDet's simple feature pyramid (arXiv 2203.16527): several strides from one map of a plain backbone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from ...utils.arguments import boolean, integer, native
from .normed import ChannelNorm, NormedConv2d


class SimplePyramid(nn.Module):
    """Maps of several strides, of `out` channels each, from one map.

    Every scale has transposed convolutions (enlarging), nothing, or max-pooling, then a 1x1 and a 3x3
    convolution, each with a LayerNorm over channels; between the two transposed ones of scale 4 stand
    LayerNorm and GELU.

    Args:
        dim: channels of the map, a multiple of 4 for scale 4, of 2 for scale 2.
        out: channels of the results.
        scales: powers of two up to 4: sides of the results in sides of the map, finest first.
        stride: of the map in pixels of the image; it numbers the levels, whose names are detectron2's
            (simfp_2 has stride 4, simfp_3 stride 8, ...).
        top: one more level, every other pixel of the last one; has no parameters.

    Attributes:
        strides: of the results, in pixels of the image.

    Raises:
        ValueError, TypeError: a number is out of range or no number.
    """

    def __init__(
        self,
        dim: int,
        out: int = 256,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        stride: int = 16,
        top: bool = True,
    ) -> None:
        super().__init__()
        self.dim = integer("[SimplePyramid] dim", dim, 1)
        self.out = integer("[SimplePyramid] out", out, 1)
        self.stride = integer("[SimplePyramid] stride", stride, 1)
        self.top = boolean("[SimplePyramid] top", top)
        self.scales = _checked(scales, self.dim, self.stride)
        self._names: list[str] = []
        for scale in self.scales:
            level = round(math.log2(self.stride / scale))
            self._names.append(f"simfp_{level}")
            self.add_module(self._names[-1], _level(self.dim, self.out, scale))

    @property
    def strides(self) -> list[int]:
        """Of the results, in pixels of the image."""
        found = [round(self.stride / scale) for scale in self.scales]
        return [*found, 2 * found[-1]] if self.top else found

    def forward(self, x: Tensor) -> list[Tensor]:
        """One map (B, out, scale h, scale w) for each scale, then the top, of a map (B, dim, h, w).

        Raises:
            ValueError: it has other channels, or is smaller than one pixel of the coarsest level.
        """
        least = round(1 / min(1.0, self.scales[-1]))
        if x.ndim != 4 or x.shape[1] != self.dim or min(x.shape[2:]) < least:
            raise ValueError(
                f"[SimplePyramid] map: expected (B, {self.dim}, h, w) of {least} x {least} or more, "
                f"got {tuple(x.shape)}"
            )
        maps = [self.get_submodule(name)(x) for name in self._names]
        return [*maps, maps[-1][:, :, ::2, ::2]] if self.top else maps

    def flops(self, height: int, width: int) -> int:
        """Multiply-adds of its convolutions for one map (dim, height, width)."""
        total = 0
        for name in self._names:
            h, w = height, width
            for module in self.get_submodule(name):  # type: ignore[attr-defined]
                if isinstance(module, nn.MaxPool2d):
                    side = integer("stride", module.stride)
                    h, w = h // side, w // side
                if isinstance(module, nn.ConvTranspose2d):
                    total += module.weight.numel() * h * w
                    h, w = 2 * h, 2 * w
                if isinstance(module, NormedConv2d):
                    total += module.weight.numel() * h * w
        return total

    def extra_repr(self) -> str:
        return f"strides={self.strides}"


def _checked(scales: Sequence[float], dim: int, stride: int) -> list[float]:
    """The scales as numbers.

    Raises:
        ValueError: names the first one that cannot be.
    """
    found = native("[SimplePyramid] scales", scales)
    if not isinstance(found, list) or not found:
        raise ValueError(f"[SimplePyramid] scales: expected at least one, got {scales!r}")
    for scale in found:
        if not isinstance(scale, (int, float)) or scale <= 0 or scale > 4 or math.log2(scale) % 1:
            raise ValueError(f"[SimplePyramid] scales: expected powers of two up to 4, got {scale!r}")
        if scale > 1 and (dim % int(scale) or stride % int(scale)):
            raise ValueError(
                f"[SimplePyramid] scale {scale:g}: must divide dim and stride, which are {dim} and {stride}"
            )
    if found != sorted(set(found), reverse=True):
        raise ValueError(f"[SimplePyramid] scales: expected the finest first, each once, got {scales!r}")
    return [float(scale) for scale in found]


def _level(dim: int, out: int, scale: float) -> nn.Sequential:
    steps: list[nn.Module] = []
    width = dim
    if scale == 4:
        steps += [nn.ConvTranspose2d(dim, dim // 2, 2, 2), ChannelNorm(dim // 2), nn.GELU()]
        width = dim // 2
    if scale > 1:
        steps.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
        width //= 2
    if scale < 1:
        steps.append(nn.MaxPool2d(round(1 / scale), round(1 / scale)))
    return nn.Sequential(*steps, NormedConv2d(width, out, 1), NormedConv2d(out, out, 3))

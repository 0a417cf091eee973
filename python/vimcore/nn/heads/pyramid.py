# SPDX-License-Identifier: Apache-2.0
"""ViTDet's simple feature pyramid (arXiv 2203.16527): several strides from one map of a plain backbone."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ...utils.arguments import boolean, integer
from ...weights.detector import Step, checked_scales, level_name, level_steps, pyramid_flops
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
        self.scales = checked_scales(scales, self.dim, self.stride)
        self._names = [level_name(self.stride, scale) for scale in self.scales]
        for name, scale in zip(self._names, self.scales):
            steps = level_steps(self.dim, self.out, scale)
            self.add_module(name, nn.Sequential(*(_layer(step) for step in steps)))

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
        return pyramid_flops(self.dim, self.out, self.scales, height, width)

    def extra_repr(self) -> str:
        return f"strides={self.strides}"


def _layer(step: Step) -> nn.Module:
    kind, inputs, outputs = step
    if kind == "enlarge":
        return nn.ConvTranspose2d(inputs, outputs, 2, 2)
    if kind == "norm":
        return ChannelNorm(inputs)
    if kind == "gelu":
        return nn.GELU()
    if kind == "shrink":
        return nn.MaxPool2d(outputs, outputs)
    return NormedConv2d(inputs, outputs, int(kind[-1]))

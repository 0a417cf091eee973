# SPDX-License-Identifier: Apache-2.0
"""The effective receptive field, by the protocol of RepLKNet (Ding et al., arXiv 2203.06717) and VMamba."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..utils.arguments import integer
from .layers import evaluating, exact, network_of, output_layers

SHARES = (0.2, 0.3, 0.5, 0.99)  # those of the protocol's table
_OP = "effective_receptive_field"


@exact
def effective_receptive_field(
    model: Any, images: Tensor, layer: int = -1, position: Sequence[int] | None = None
) -> Tensor:
    """How much each pixel moves the features of one place.

    The gradient of the sum over channels of relu(feature map of the layer, at the position) by the image, its
    positive part summed over channels and images. The protocol takes 50 images of 1024 x 1024 pixels; images
    are computed one by one. `erf_shown` scales for pictures, `erf_sides` makes the protocol's table.

    Args:
        model: a `VisionMamba`; run in eval mode, its own mode and gradients do not change.
        images: (B, C, H, W), normalised as for the model, at least one.
        layer: whose output (`forward_intermediates`), negative ones count from the last.
        position: (row, column) of a patch; None: the middle one, (h // 2, w // 2).

    Returns:
        (H, W) in the type of the model, at least 0.

    Raises:
        TypeError, ValueError: the model is no VisionMamba; images, layer or position do not fit.
    """
    model = network_of(_OP, model)
    (layer,) = output_layers(_OP, model._config, integer(f"[{_OP}] layer", layer))
    images = images.detach() if isinstance(images, Tensor) else images
    total: Tensor | None = None
    with evaluating(model), torch.enable_grad():
        for image in range(len(images) if isinstance(images, Tensor) and images.ndim == 4 else 1):
            one = images[image : image + 1] if isinstance(images, Tensor) and images.ndim == 4 else images
            one = one.requires_grad_() if isinstance(one, Tensor) and one.is_floating_point() else one
            (found,) = model.forward_intermediates(one, [layer])
            row, column = _place(position, *found.shape[2:])
            (gradient,) = torch.autograd.grad(found[0, :, row, column].relu().sum(), one)
            field = gradient[0].relu().sum(0)
            total = field if total is None else total + field
    if total is None:
        raise ValueError(f"[{_OP}] images: expected at least one, got {tuple(images.shape)}")
    return total


def _place(position: Sequence[int] | None, height: int, width: int) -> tuple[int, int]:
    if position is None:
        return height // 2, width // 2
    at = list(position) if isinstance(position, Sequence) else [position]
    if len(at) != 2:
        raise ValueError(f"[{_OP}] position: expected (row, column), got {position!r}")
    row, column = (integer(f"[{_OP}] position", value) for value in at)
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(
            f"[{_OP}] position: expected a row of 0 .. {height - 1} and a column of 0 .. {width - 1}, "
            f"got ({row}, {column})"
        )
    return row, column


def erf_shown(field: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The field as the protocol shows it: log10(x + 1), the largest 1; zeros where all are."""
    shown = np.log10(np.asarray(field, np.float64) + 1)
    return shown / max(float(shown.max(initial=0)), np.finfo(np.float64).tiny)


def erf_sides(
    field: NDArray[np.floating[Any]],
    shares: Sequence[float] = SHARES,
    centre: tuple[int, int] | None = None,
) -> list[tuple[float, int | None, float | None]]:
    """The protocol's table: side in pixels of the smallest centred square that holds each share.

    Args:
        field: (H, W), shown values, from `erf_shown`.
        shares: from 0 to 1.
        centre: pixel; None: the middle one. The side is odd, and may reach beyond the border.

    Returns:
        (share, side, area of the square as a share of the image); None where the field is zero.
    """
    field = np.asarray(field, np.float64)
    height, width = field.shape
    row, column = centre or (height // 2, width // 2)
    # how far each pixel is from the centre, the longer way of both axes
    far = np.maximum(abs(np.arange(height) - row)[:, None], abs(np.arange(width) - column)[None])
    held = np.cumsum(np.bincount(far.ravel(), field.ravel()))
    pixels = np.cumsum(np.bincount(far.ravel()))
    if not held[-1] > 0:
        return [(share, None, None) for share in shares]
    found: list[tuple[float, int | None, float | None]] = []
    for share in shares:
        reach = min(int(np.searchsorted(held, share * held[-1] * (1 - 1e-12))), len(held) - 1)
        found.append((share, 2 * reach + 1, float(pixels[reach] / field.size)))
    return found

# SPDX-License-Identifier: Apache-2.0
"""Whether evidence points at what matters: deletion and insertion (Petsiuk et al., arXiv 1806.07421)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .layers import evaluating, exact, network_of
from .targets import target_index

_BATCH = 8
_OP = "deletion_insertion"


@dataclass(frozen=True)
class Curves:
    """The probability of a class while the image goes, or comes, from its strongest evidence on.

    Attributes:
        shares: of the pixels deleted or inserted, 0 to 1.
        deletion, insertion: the probabilities, as many.
    """

    shares: NDArray[np.float64]
    deletion: NDArray[np.float64]
    insertion: NDArray[np.float64]

    @property
    def deletion_area(self) -> float:
        """Mean height of the curve: low where the map finds what the decision needs."""
        return _area(self.shares, self.deletion)

    @property
    def insertion_area(self) -> float:
        """Mean height of the curve: high where the map finds what suffices for the decision."""
        return _area(self.shares, self.insertion)


def _area(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())


@exact
def deletion_insertion(
    model: Any, image: Tensor, evidence: Tensor, target: int | None = None, steps: int = 24
) -> Curves:
    """Deletes the pixels of an image in the order of the evidence, and inserts them into an even image.

    A pixel that is not there has the mean colour of the image, as in `saliency`.

    Args:
        model: a `VisionMamba` with a head; run in eval mode, its own mode does not change.
        image: (C, H, W), normalised as for the model.
        evidence: (H, W), or (h, w) by patch; ties in the order of rows.
        target: class index; None: the predicted class.
        steps: of each curve, the cost is 2 * steps forward passes.

    Raises:
        TypeError, ValueError: the model has no logits of whole images; image, evidence or target do not fit.
    """
    model = network_of(_OP, model)
    if image.ndim != 3:
        raise ValueError(f"[{_OP}] image: expected (C, H, W), got {tuple(image.shape)}")
    config = model._config_for(image[None])
    if evidence.shape == config.grid:
        evidence = by_pixel(evidence, config.patch_size, config.stride, *image.shape[1:])
    if evidence.shape != image.shape[1:]:
        raise ValueError(
            f"[{_OP}] evidence: expected {tuple(image.shape[1:])} or {config.grid}, "
            f"got {tuple(evidence.shape)}"
        )
    if steps < 1:
        raise ValueError(f"[{_OP}] steps: expected at least 1, got {steps}")
    order = evidence.flatten().argsort(descending=True, stable=True)
    counts = [round(step * len(order) / steps) for step in range(steps + 1)]
    even = image.mean((1, 2), keepdim=True).expand_as(image)
    mixtures = [(one, other, n) for one, other in ((image, even), (even, image)) for n in counts]
    found = []
    with evaluating(model):
        for begin in range(0, len(mixtures), _BATCH):
            images = [_mixed(*mixture, order) for mixture in mixtures[begin : begin + _BATCH]]
            found.append(model(torch.stack(images)))
    logits = torch.cat(found)
    if logits.ndim != 2 or not model.num_classes:
        raise ValueError(f"[{_OP}] model: expected logits (B, classes), got {tuple(logits.shape)}")
    index = int(target_index(_OP, target, logits[:1])[0])
    p = logits.double().softmax(1)[:, index].cpu().numpy()
    return Curves(np.array(counts) / len(order), p[: steps + 1], p[steps + 1 :])


def _mixed(first: Tensor, second: Tensor, count: int, order: Tensor) -> Tensor:
    """The first image (C, H, W), but `count` pixels of the second, in this order."""
    mixed = first.flatten(1).clone()
    mixed[:, order[:count]] = second.flatten(1)[:, order[:count]]
    return mixed.view_as(first)


def by_pixel(x: Tensor, patch: int, stride: int, height: int, width: int) -> Tensor:
    """(h, w) by patch as (height, width): every pixel the value of the patch whose centre is nearest."""

    def nearest(pixels: int, patches: int) -> Tensor:
        at = (torch.arange(pixels, device=x.device) + 0.5 - (patch - stride) / 2) / stride
        return at.floor().long().clamp(0, patches - 1)

    return x[nearest(height, x.shape[0])][:, nearest(width, x.shape[1])]

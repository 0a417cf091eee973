# SPDX-License-Identifier: Apache-2.0
"""Saliency: integrated gradients, averaged over the patches that the network sees.

Method. f is the logit of the target class minus the mean of all logits. Along the straight path from an even
image of the same mean colour (which holds no shape at all) to the image, the gradient of f is averaged at
`steps` midpoints and multiplied by the difference of the two images; by the fundamental theorem of calculus
these values add up to the change of f, up to the error of the midpoint rule. They are summed over channels
and averaged over windows of one patch, because single pixels inside a patch are only separated by the first
linear layer. What speaks against the class is cut off at 0.

Why not the plain gradient: it shows how f would change, not what it is made of, and vanishes where the
network is sure. Why not the states of the scan: they tell what is carried, in both directions and every
layer, not what the head reads.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from .targets import Target, target_index

if TYPE_CHECKING:
    from ..nn.vision_mamba import VisionMamba


def saliency(
    model: VisionMamba,
    images: torch.Tensor,
    target: Target = None,
    *,
    steps: int = 16,
) -> torch.Tensor:
    """Saliency map: how much each part of an image contributes to the logit of a class; at least 0.

    Args:
        model: a VisionMamba with a head; run in eval mode, its own mode and gradients do not change.
        images: (B, C, H, W), normalised as for the model.
        target: class index for all images, or one per image; default: the predicted class.
        steps: gradients per image; the cost is `steps` forward and backward passes.

    Returns:
        (B, H, W) float32 on the device of ``images``, in units of the logit per pixel.
    """
    if images.ndim != 4:
        raise ValueError(f"[saliency] images: expected (B, C, H, W), got {tuple(images.shape)}")
    if steps < 1:
        raise ValueError(f"[saliency] steps: expected at least 1, got {steps}")
    was_training = model.training
    model.eval()
    try:
        images = images.detach()
        with torch.no_grad():
            logits = model(images)
        if logits.ndim != 2 or not model.config["num_classes"]:
            raise ValueError(f"[saliency] model: expected logits (B, classes), got {tuple(logits.shape)}")
        index = target_index("saliency", target, logits)
        baseline = images.mean(dim=(2, 3), keepdim=True)
        difference = images - baseline
        total = torch.zeros_like(images)
        for step in range(steps):
            point = (baseline + (step + 0.5) / steps * difference).requires_grad_(True)
            with torch.enable_grad():
                logits = model(point)
                score = logits.gather(1, index[:, None]).sum() - logits.mean(dim=1).sum()
                (gradient,) = torch.autograd.grad(score, point)
            total += gradient
        evidence = (difference * total / steps).sum(dim=1, keepdim=True).float()
    finally:
        model.train(was_training)
    return _patch_mean(evidence, int(model.config["patch_size"])).clamp_(min=0).squeeze(1)


def _patch_mean(evidence: torch.Tensor, patch: int) -> torch.Tensor:
    """Mean over a smooth window of about one patch: two box filters of half a patch, the edges repeated."""
    side = max(math.ceil(patch / 2), 1)
    for _ in range(2):
        left = (side - 1) // 2
        padded = F.pad(evidence, (left, side - 1 - left, left, side - 1 - left), mode="replicate")
        evidence = F.avg_pool2d(padded, side, stride=1)
    return evidence

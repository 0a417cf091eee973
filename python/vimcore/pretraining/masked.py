# SPDX-License-Identifier: Apache-2.0
"""Masked image modelling (SimMIM, arXiv 2111.09886) through the whole network.

A patch is masked by a learnt patch of pixels in its place. Where patches do not overlap, their embedding is a
linear map of their pixels, onto all of the width when it is at most their number; so this is the same as a
learnt token in the place of the patch's, and every class token and scan direction works as it does later.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn.readout import patches_of
from ..utils.arguments import boolean, real
from .patches import checked_backbone, normalised, patches, restored, unpatched


class MaskedImages(nn.Module):
    """Predicts the pixels of masked patches: loss = sum(m mean_P |y' - y|^power) / sum(m).

    Args:
        backbone: `VisionMamba` without a head, whose stride is its patch size.
        mask_ratio: share of the patches that are masked in every image.
        norm_target: predict every patch relative to its own mean and deviation, as photographs want it.
        norm_floor: added to the variance there; flat patches, as of drawings, want about 1e-2.
        power: 2, or 1 as in SimMIM.

    Raises:
        TypeError, ValueError: an argument is out of range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        mask_ratio: float = 0.6,
        norm_target: bool = False,
        norm_floor: float = 1e-6,
        power: int = 2,
    ) -> None:
        super().__init__()
        self.backbone = checked_backbone("MaskedImages", backbone)
        config = self.backbone._config
        self.mask_ratio = real("[MaskedImages] mask_ratio", mask_ratio)
        self.norm_target = boolean("[MaskedImages] norm_target", norm_target)
        self.norm_floor, self.power = real("[MaskedImages] norm_floor", norm_floor), power
        self.count = config.grid[0] * config.grid[1]
        self.masked = round(self.mask_ratio * self.count)
        if not 0 < self.masked < self.count:
            raise ValueError(
                f"[MaskedImages] mask_ratio: expected a share that masks some and leaves some of "
                f"{self.count} patches, got {mask_ratio}"
            )
        if power not in (1, 2):
            raise ValueError(f"[MaskedImages] power: expected 1 or 2, got {power!r}")
        if not self.norm_floor > 0:
            raise ValueError(f"[MaskedImages] norm_floor: expected more than 0, got {norm_floor}")
        pixels = config.in_chans * config.patch_size**2
        self.mask_pixels = nn.Parameter(torch.zeros(pixels))  # 0: the mean colour of normalised images
        self.predict = nn.Linear(config.embed_dim, pixels)

    def draw(self, batch: int) -> Tensor:
        """A mask (batch, J) of torch's generator of the CPU: True for `masked` patches of every image."""
        order = torch.rand(batch, self.count, device="cpu").argsort(1)
        return order < self.masked

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss.

        Args:
            images: (B, C, H, W), normalised.
            mask: (B, J) bool, True: masked; None: drawn.
        """
        target = self._targets(images)
        mask = self._checked(images, mask)
        error = (self._predicted(images, mask) - target).abs()
        if self.power == 2:
            error = error.square()
        return (error.mean(2) * mask).sum() / mask.sum()

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images with their masked patches as predicted (B, C, H, W), and the mask (B, J).

        With `norm_target` a patch gets its own mean and deviation back, which the network has not seen.
        """
        mask = self._checked(images, mask)
        pixels = patches(images, self.backbone._config.patch_size)
        found = self._predicted(images, mask).to(pixels.dtype)
        if self.norm_target:
            found = restored(found, pixels, self.norm_floor)
        return unpatched(torch.where(mask[:, :, None], found, pixels), self.backbone._config), mask

    def _targets(self, images: Tensor) -> Tensor:
        pixels = patches(images, self.backbone._config.patch_size)
        return normalised(pixels, self.norm_floor) if self.norm_target else pixels

    def _checked(self, images: Tensor, mask: Tensor | None) -> Tensor:
        mask = self.draw(len(images)) if mask is None else mask
        if mask.dtype != torch.bool or mask.shape != (len(images), self.count) or not bool(mask.any()):
            raise ValueError(
                f"[MaskedImages] mask: expected ({len(images)}, {self.count}) bool with a masked patch, "
                f"got {tuple(mask.shape)} {mask.dtype}"
            )
        return mask.to(images.device)

    def _predicted(self, images: Tensor, mask: Tensor) -> Tensor:
        """Pixels (B, J, P) of all patches."""
        config = self.backbone._config
        own = patches(images, config.patch_size)
        filled = torch.where(mask[:, :, None], self.mask_pixels.to(own.dtype), own)
        tokens = self.backbone.forward_features(unpatched(filled, config))
        found: Tensor = self.predict(patches_of(tokens, config))
        return found

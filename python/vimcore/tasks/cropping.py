# SPDX-License-Identifier: Apache-2.0
"""Settings of tasks whose training images are random crops without further changes. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from .settings import Settings, key


@dataclass
class CropSettings(Settings):
    """How images are cropped and flipped."""

    crop_pct: float = key("data", 1.0, "validation: image size over short side before the crop")
    augment: str = key(
        "augmentation", "crop", "random crop and flip; or turns and shifts", ("crop", "jiggle", "none")
    )
    crop_scale: tuple[float, ...] = key("augmentation", (0.2, 1.0), "area of the random crop, from and to")
    crop_ratio: tuple[float, ...] = key("augmentation", (3 / 4, 4 / 3), "its width over height, from and to")
    hflip: float = key("augmentation", 0.5, "probability")

    def _check_ranges(self) -> None:
        super()._check_ranges()
        if not self.crop_pct > 0:
            raise ValueError(f"crop_pct: expected more than 0, got {self.crop_pct}")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip: expected a probability, got {self.hflip}")
        for name in ("crop_scale", "crop_ratio"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name}: expected 2 numbers, got {getattr(self, name)}")

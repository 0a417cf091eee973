# SPDX-License-Identifier: Apache-2.0
"""What a run of pretraining can be told besides what every run can. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import Settings, key


@dataclass
class PretrainingSettings(Settings):
    """Learning without labels; the recipes are presets."""

    crop_pct: float = key("data", 1.0, "validation: image size over short side before the crop")
    augment: str = key(
        "augmentation", "crop", "random crop and flip; or turns and shifts", ("crop", "jiggle", "none")
    )
    crop_scale: tuple[float, ...] = key("augmentation", (0.2, 1.0), "area of the random crop, from and to")
    crop_ratio: tuple[float, ...] = key("augmentation", (3 / 4, 4 / 3), "its width over height, from and to")
    hflip: float = key("augmentation", 0.5, "probability")

    objective: str = key(
        "task", "mim", "mim: masked patches; ar2: the next patch, in both directions", ("mim", "ar2")
    )
    mask_ratio: float = key("task", 0.6, "mim: share of the patches that are masked")
    loss_power: int = key("task", 2, "mim: 2: squared differences of pixels; 1: absolute ones")
    norm_target: bool = key("task", False, "predict patches relative to their own mean and deviation")
    norm_floor: float = key("task", 1e-6, "added to their variance; 1e-2 where patches are flat")
    cluster: int = key("task", 1, "ar2: side in patches of what is predicted at a time, by a decoder")
    decoder_dim: int = key("task", 512, "ar2 with clusters: width of the decoder")
    decoder_depth: int = key("task", 4, "ar2 with clusters: its blocks")

    def _check_ranges(self) -> None:
        super()._check_ranges()
        if not self.crop_pct > 0:
            raise ValueError(f"crop_pct: expected more than 0, got {self.crop_pct}")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip: expected a probability, got {self.hflip}")
        for name in ("crop_scale", "crop_ratio"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name}: expected 2 numbers, got {getattr(self, name)}")
        if self.objective == "mim" and self.cluster != 1:
            raise ValueError(f"cluster: is of objective ar2, got {self.cluster} with mim")

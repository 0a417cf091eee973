# SPDX-License-Identifier: Apache-2.0
"""What a run of classification can be told besides what every run can. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import Settings, key


@dataclass
class ClassificationSettings(Settings):
    """One label for an image; the defaults are the authors' recipe."""

    frames: int | None = key(
        "model", None, "of a clip: data are folders of frames or .npy clips (T, H, W, C)", later=True
    )
    frame_sampling: str = key(
        "augmentation",
        "middle",
        "longer clips, in training: the middle frame of each part, or a random one",
        ("middle", "random"),
        later=True,
    )
    crop_pct: float = key("data", 0.875, "validation: image size over short side before the crop")
    augment: str = key(
        "augmentation",
        "imagenet",
        "crop, flip, colours; or turns and shifts",
        ("imagenet", "jiggle", "none"),
    )
    crop_scale: tuple[float, ...] = key("augmentation", (0.08, 1.0), "area of the random crop, from and to")
    crop_ratio: tuple[float, ...] = key("augmentation", (3 / 4, 4 / 3), "its width over height, from and to")
    hflip: float = key("augmentation", 0.5, "probability")
    rand_augment: str = key(
        "augmentation", "rand-m9-mstd0.5-inc1", "timm's notation; 3a: 3-Augment; empty: none"
    )
    color_jitter: float = key("augmentation", 0.3, "acts only without rand_augment, or with 3a")
    random_erase: float = key("augmentation", 0.25, "probability")
    mixup: float = key("augmentation", 0.8, "alpha; 0: off")
    cutmix: float = key("augmentation", 1.0, "alpha; 0: off")
    mix_switch: float = key("augmentation", 0.5, "probability of cutmix where both are on")
    label_smoothing: float = key("augmentation", 0.1, "share of the target spread over all classes")

    def _check_ranges(self) -> None:
        super()._check_ranges()
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames: expected 1 or more, got {self.frames}")
        if not self.crop_pct > 0:
            raise ValueError(f"crop_pct: expected more than 0, got {self.crop_pct}")
        for name in ("mixup", "cutmix"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("hflip", "random_erase", "mix_switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a probability, got {getattr(self, name)}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing: expected 0 or more and less than 1, got {self.label_smoothing}"
            )
        for name in ("crop_scale", "crop_ratio"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name}: expected 2 numbers, got {getattr(self, name)}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ValueError(
                f"batch_size: expected an even number with mixup or cutmix, got {self.batch_size}"
            )

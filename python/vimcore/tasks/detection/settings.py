# SPDX-License-Identifier: Apache-2.0
"""What a run of detection can be told besides what every run can. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..settings import Settings, key

HEAD = "head_"  # before the options of `vimcore.detection.CascadeMaskRCNN`


@dataclass
class DetectionSettings(Settings):
    """Boxes and masks of objects; the defaults are the authors' recipe, for images of 1024 px."""

    masks: bool = key("model", True, "also learn masks")
    head_channels: int | None = key("model", None, "of pyramid and heads; default 256")
    head_scales: tuple[float, ...] | None = key(
        "model", None, "of the pyramid: sides of its maps in sides of the backbone's; default 4 2 1 0.5"
    )
    head_anchors: tuple[float, ...] | None = key(
        "model", None, "pixels, one for each map, one more for a coarser map; default 32 64 128 256 512"
    )
    head_box_convs: int | None = key("model", None, "convolutions of each of three stages; default 4")
    head_box_width: int | None = key("model", None, "fully connected units of each stage; default 1024")
    head_mask_convs: int | None = key("model", None, "convolutions before masks; default 4")
    head_anchors_sampled: int | None = key(
        "model", None, "anchors of an image that the loss sees; default 256"
    )
    head_boxes_sampled: int | None = key("model", None, "boxes of an image that it sees; default 512")
    head_before_nms: tuple[int, ...] | None = key(
        "model", None, "proposals of each map, in training and in inference; default 2000 1000"
    )
    head_proposals: int | None = key("model", None, "of an image, that the stages refine; default 1000")
    head_score: float | None = key("model", None, "smallest score of a detection; default 0.05")
    head_detections: int | None = key("model", None, "of an image, at most; default 100")

    data: str | None = key(
        "data",
        None,
        "COCO file (.json), COCO's folder, folder of images/ and masks/ of instances (or of train/ and val/ "
        "with these), or digits-scenes",
    )
    images: str | None = key("data", None, "folder with the pictures of a COCO file; default: looked for")
    val_images: str | None = key("data", None, "the same of --val")
    scenes: int = key("data", 2000, "digits-scenes: those of an epoch, always new ones")

    augment: str = key(
        "augmentation", "jitter", "any size and a window of it; none: as in validation", ("jitter", "none")
    )
    scale: tuple[float, ...] = key("augmentation", (0.1, 2.0), "jitter: size, in the network's, from and to")
    hflip: float = key("augmentation", 0.5, "probability")
    resize: tuple[int, ...] | None = key(
        "augmentation", None, "validation: short and long side to fit into; default: img_size"
    )

    def _check_ranges(self) -> None:
        super()._check_ranges()
        for name, value in (("scale", self.scale), ("resize", self.resize)):
            if value is not None and (len(value) != 2 or not 0 < value[0] <= value[1]):
                raise ValueError(f"{name}: expected 2 numbers above 0, the smaller first, got {value}")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip: expected a probability, got {self.hflip}")
        if self.scenes < 1:
            raise ValueError(f"scenes: expected at least 1, got {self.scenes}")

    def head_options(self) -> dict[str, Any]:
        """Arguments of the network's constructor besides backbone and number of classes."""
        given = {name: value for name, value in vars(self).items() if name.startswith(HEAD)}
        set_ = {name.removeprefix(HEAD): value for name, value in given.items() if value is not None}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in set_.items()}
        return {"masks": self.masks, **plain}

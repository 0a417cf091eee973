# SPDX-License-Identifier: Apache-2.0
"""What a run of image-text learning can be told besides what every run can. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..cropping import CropSettings
from ..settings import key


@dataclass
class ClipSettings(CropSettings):
    """Images and captions in one space; the recipes are presets."""

    data: str | None = key(
        "data",
        None,
        "CSV or TSV list of path and caption, folder of pictures with a .txt each (or of train/ and val/ "
        "with these), or digits-colours",
    )
    crop_scale: tuple[float, ...] = key("augmentation", (0.9, 1.0), "area of the random crop, from and to")
    hflip: float = key("augmentation", 0.0, "probability; captions may say left and right")

    loss: str = key(
        "task", "clip", "clip: softmax over a batch; siglip: sigmoid of each pair", ("clip", "siglip")
    )
    space_dim: int = key("task", 512, "dimensions of the common space")
    text_width: int = key("task", 512, "text tower: width")
    text_layers: int = key("task", 12, "text tower: blocks")
    text_heads: int = key("task", 8, "text tower: heads of its attention")
    text_context: int = key("task", 77, "text tower: tokens of a caption; longer ones lose their end")

    def _check_ranges(self) -> None:
        super()._check_ranges()
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size: pairs are told from each other, so at least 2, got {self.batch_size}"
            )
        if self.accumulate != 1:
            raise ValueError(
                f"accumulate: expected 1, pairs of one forward pass are compared, got {self.accumulate}"
            )

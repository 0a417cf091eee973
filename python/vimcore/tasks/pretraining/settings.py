# SPDX-License-Identifier: Apache-2.0
"""What a run of pretraining can be told besides what every run can. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..cropping import CropSettings
from ..settings import key


@dataclass
class PretrainingSettings(CropSettings):
    """Learning without labels; the recipes are presets."""

    data: str | None = key(
        "data",
        None,
        "folder of pictures at any depth (or of train/ and val/), CSV or TSV list of paths, digits, "
        "or a data set by timm: tar:FILE, hfds/NAME[#SPLIT], torch/NAME:FOLDER[#SPLIT]; labels are ignored",
    )
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
        if self.objective == "mim" and self.cluster != 1:
            raise ValueError(f"cluster: is of objective ar2, got {self.cluster} with mim")

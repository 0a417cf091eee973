# SPDX-License-Identifier: Apache-2.0
"""What a run of segmentation can be told besides what every run can. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..settings import Settings, key

if TYPE_CHECKING:
    from typing_extensions import Self

# Options of the networks in `vimcore.segmentation` by setting, and the heads that have them.
HEAD_OPTIONS = {
    "head_channels": ("channels", ("fcn", "uper")),
    "head_convs": ("convs", ("fcn",)),
    "head_layers": ("layers", ("segmenter",)),
    "head_taps": ("taps", ("uper",)),
    "head_indices": ("indices", ("uper",)),
    "head_aux": ("aux", ("uper",)),
    "head_norm": ("head_norm", ("fcn", "uper")),
    "head_dropout": ("dropout", ("fcn", "linear", "uper", "segmenter")),
}
HEADS = ("fcn", "linear", "uper", "segmenter")


@dataclass
class SegmentationSettings(Settings):
    """A class for every pixel; the defaults are those of mmsegmentation."""

    head: str = key("model", "uper", "what makes classes of features", HEADS)
    head_channels: int | None = key("model", None, "fcn, uper: of its convolutions; default: the backbone's")
    head_convs: int | None = key("model", None, "fcn: 3x3 convolutions; default 2")
    head_layers: int | None = key("model", None, "segmenter: transformer blocks; default 2")
    head_taps: str | None = key(
        "model", None, "uper: what it sees of a layer, stream or mixer; default: stream"
    )
    head_indices: tuple[int, ...] | None = key("model", None, "uper: four layers; default: of each quarter")
    head_aux: bool | None = key("model", None, "uper: a second head that helps to train; default: yes")
    head_norm: str | None = key("model", None, "fcn, uper: batch, or group for single images; default: batch")
    head_init: str = key(
        "model",
        "published",
        "fcn, linear, uper: weights of the last layer, small, or torch's, which name classes sooner",
        ("published", "torch"),
    )
    head_dropout: float | None = key("model", None, "of whole channels (segmenter: values); default 0.1")

    data: str | None = key(
        "data",
        None,
        "folder of images/ and masks/ of class indices (or of train/ and val/ with these), ADE20K's folder, "
        "CSV or TSV list of path and mask, or digits-scenes",
    )
    classes: int | None = key("data", None, "how many, where no classes.txt names them; default: counted")
    reduce_zero_label: bool = key(
        "data", False, "masks: 0 is no class, k is class k - 1; presets for ADE20K have it, for ADE20K alone"
    )
    scenes: int = key("data", 2000, "digits-scenes: those of an epoch, always new ones")

    resize: tuple[int, ...] | None = key(
        "augmentation", None, "short and long side that images are fitted into, here and in validation"
    )
    scale: tuple[float, ...] = key("augmentation", (0.5, 2.0), "random factor of the size, from and to")
    hflip: float = key("augmentation", 0.5, "probability")
    crop_share: float = key(
        "augmentation", 0.75, "crops of which one class has this share or more are drawn again; 1: any"
    )
    photometric: bool = key("augmentation", True, "distort brightness, contrast, saturation and hue")

    optimizer_groups: str = key(
        "optimizer",
        "intended",
        "released: as in the authors' code, layer_decay acts on patch embedding and position table alone, "
        "and that table is decayed",
        ("intended", "released"),
    )

    loss_average: str = key(
        "task", "valid", "divide the loss by the pixels that have a class, or by all", ("valid", "all")
    )
    window: tuple[int, ...] | None = key(
        "task", None, "pixels that validation sees at once: side, or height and width; default: img_size"
    )
    window_stride: tuple[int, ...] | None = key(
        "task", None, "pixels from window to window; default: two thirds of it, with segmenter all"
    )
    whole: bool = key("task", False, "validate on whole images of any size, not by windows")

    def _check_ranges(self) -> None:
        super()._check_ranges()
        for name in ("resize", "scale"):
            value = getattr(self, name)
            if value is not None and (len(value) != 2 or not 0 < value[0] <= value[1]):
                raise ValueError(f"{name}: expected 2 numbers above 0, the smaller first, got {value}")
        for name in ("window", "window_stride"):
            value = getattr(self, name)
            if value is not None and (len(value) not in (1, 2) or min(value) < 1):
                raise ValueError(f"{name}: expected 1 or 2 numbers, at least 1, got {value}")
        if self.whole and (self.window or self.window_stride):
            raise ValueError("whole: there are no windows; leave window and window_stride away")
        if not 0 <= self.hflip <= 1:
            raise ValueError(f"hflip: expected a probability, got {self.hflip}")
        if not 0 < self.crop_share <= 1:
            raise ValueError(f"crop_share: expected more than 0 and at most 1, got {self.crop_share}")
        if self.classes is not None and not 1 <= self.classes <= 255:
            raise ValueError(f"classes: expected 1 to 255, got {self.classes}")
        if self.scenes < 1:
            raise ValueError(f"scenes: expected at least 1, got {self.scenes}")
        if self.head_init == "torch" and self.head == "segmenter":
            raise ValueError("head_init: an option of the head fcn, linear or uper, not of segmenter")
        self.head_options()

    def merged(self, changes: Mapping[str, Any]) -> Self:
        """See `Settings.merged`; another head does not take over options of the former that it lacks."""
        head = changes.get("head", self.head)
        if head == self.head:
            return super().merged(changes)
        former: dict[str, Any] = {
            name: None for name, (_, heads) in HEAD_OPTIONS.items() if head not in heads
        }
        if head == "segmenter":
            former["head_init"] = "published"
        return super().merged({**former, **changes})

    def head_options(self) -> dict[str, Any]:
        """Arguments of the network's constructor besides backbone and number of classes.

        Raises:
            ValueError: one is set that the head does not have.
        """
        found = {}
        for setting, (name, heads) in HEAD_OPTIONS.items():
            value = getattr(self, setting)
            if value is None:
                continue
            if self.head not in heads:
                raise ValueError(f"{setting}: an option of the head {' or '.join(heads)}, not of {self.head}")
            found[name] = list(value) if isinstance(value, tuple) else value
        return found

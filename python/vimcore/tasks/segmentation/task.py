# SPDX-License-Identifier: Apache-2.0
"""Segmentation as a task of the engine: a class for every pixel, cross-entropy, the best mIoU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import _core
from ...data.classes import passed_over
from ...data.inputs import channels_of, input_of
from ...data.joint import Joint, JointAugment
from ...data.pairs import Reading, training_and_validation
from ...data.scenes import NAME as SCENES
from ...data.scenes import PALETTE as SCENE_COLOURS
from ...data.segments import Segments, Training, Validation, collate
from ...nn.heads.layers import synchronized
from ...segmentation import Segmentation as Network
from ...segmentation import load, load_checkpoint
from ...segmentation.files import create
from ...utils import distributed
from ...weights.task import SegmentTask, default_palette, unpack_task
from ...weights.wrappers import format_of
from .. import backbone
from ..task import Data, Metric, Scores, Task
from .answers import figures
from .evaluation import Sight, answers, count
from .loss import loss_of_heads
from .settings import SegmentationSettings

WORST = 48  # images in eval.npz


class Segmentation(Task):
    """The settings are `SegmentationSettings`."""

    metrics = (Metric("miou", "mIoU"), Metric("macc", "mAcc"), Metric("aacc", "aAcc"))
    settings: SegmentationSettings

    def data(self) -> Data:
        """See `Task.data`; channels, mean, deviation and number of classes are settled."""
        s = self.settings
        if s.data is None:
            raise ValueError(
                "data: name a folder of ADE20K's layout, one of images/ and masks/ or of train/ and val/ "
                f"with these, a CSV or TSV list of path and mask, or {SCENES}"
            )
        reading = Reading(s.classes, s.reduce_zero_label, s.scenes)
        train, self.valid, about = training_and_validation(s.data, s.val, s.val_fraction, reading)
        self.classes = train.classes
        channels = channels_of(train.images, s.in_chans)
        size = backbone.size_of(s)
        self.input = input_of(train.images, channels, size, mean=s.mean, std=s.std, crop_pct=1.0)
        found = {
            "in_chans": channels,
            "mean": tuple(self.input.mean),
            "std": tuple(self.input.std),
            "classes": len(self.classes),
        }
        self.settings = s = s.merged(found)
        augment = JointAugment(resize_of(s), (s.scale[0], s.scale[1]), s.hflip, s.crop_share, s.photometric)
        joint = Joint(self.input, train.images.arrays, augment)
        return Data(
            Training(train, joint),
            Validation(self.valid, joint),
            collate,
            f"{len(train)} images of {len(self.classes)} classes to learn from, {len(self.valid)} {about}",
            train.fingerprint(),
            passed_over(train.images, self.valid.images),
        )

    def build(self) -> tuple[Network, list[str]]:
        """See `Task.build`."""
        s = self.settings
        assert s.in_chans is not None, "data() comes first"
        network = backbone.create(s, s.in_chans, 0)
        model = create(s.head, network, len(self.classes), s.head_options())
        self.depth = int(network.config["depth"])
        network.dynamic_img_size = needs_any_size(s)
        if s.head_init == "torch":
            model.decode_head.conv_seg.reset_parameters()  # type: ignore[operator, union-attr]
        notes = [] if s.init is None else self._start(model)
        if s.optimizer_groups == "released":
            model.no_weight_decay = set  # type: ignore[method-assign]  # their names had a prefix too many
        if distributed.on_gpus():
            synchronized(model, torch.device("cuda"))
        return model, notes

    def _start(self, model: Network) -> list[str]:
        """Gives the model the weights of `init`: all of a file of this very task, else the backbone's."""
        s, path = self.settings, str(self.settings.init)
        about = None
        if format_of(path) == "safetensors":
            about = unpack_task(_core.safetensors_header(path)[1], path)
        same = isinstance(about, SegmentTask) and (list(about.classes), about.head, dict(about.options)) == (
            self.classes,
            model.head,
            dict(model.options),
        )
        if same:
            notes = load_checkpoint(model, path, weights=s.init_weights, pos_embed=s.pos_embed)
            model.task = None  # windows and colours are those of the settings
            return [f"weights of backbone and head from {path}", *notes]
        notes = backbone.start_without_head(model.backbone, s)
        return [*notes, f"new head for {len(self.classes)} classes"]

    def layers(self) -> Mapping[str, Any]:
        """See `Task.layers`: neck and heads follow the last block."""
        stem = r"^backbone\.(?:cls_token|pos_embed|patch_embed)"
        if self.settings.optimizer_groups == "released":
            return {"stem": stem}
        return {"stem": stem, "blocks": [(r"^backbone\.layers\.(\d+)", None)]}

    def layer_decay(self) -> float | None:
        """See `Task.layer_decay`; as released, the stem has the power that it would have below all blocks."""
        rate = self.settings.layer_decay
        if rate is None or self.settings.optimizer_groups == "intended":
            return rate
        return float(rate ** (self.depth + 1))

    def prepare(self, batch: Segments, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images (B, C, h, w) and class indices (B, h, w).

        Raises:
            ValueError: a mask holds an index that no class has, or nothing can be read any more.
        """
        if batch.fault:
            raise ValueError(batch.fault)
        images, masks = torch.stack(batch.images), torch.stack(batch.masks)
        return images.to(device, non_blocking=True), masks.to(device, non_blocking=True)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of pixels, and of an auxiliary head."""
        images, masks = batch
        return loss_of_heads(model(images), masks, self.settings.loss_average)

    def evaluate(
        self, model: nn.Module, batches: Iterable[Segments], device: torch.device, precision: torch.dtype
    ) -> Scores:
        """mIoU, mean accuracy of classes, accuracy of pixels; nan counts as 0 where no pixel has a class."""
        counted = count(model, batches, device, self._sight(model, precision), len(self.classes))
        found = figures(counted.counts)
        values = {
            name: 0.0 if value != value else value
            for name, value in (("miou", found.miou), ("macc", found.macc), ("aacc", found.aacc))
        }
        text = f"{100 * values['miou']:.2f} % mIoU (pixels {100 * values['aacc']:.2f} %)"
        return Scores(values, text, counted.errors)

    def _sight(self, model: nn.Module, precision: torch.dtype = torch.float32) -> Sight:
        assert isinstance(model, Network)
        return sight_of(model, self.settings, precision)

    def save(self, model: nn.Module, path: Path) -> None:
        """With classes, colours, windows, and for pictures with their preprocessing."""
        assert isinstance(model, Network)
        s, sight = self.settings, self._sight(model)
        model.save(
            path,
            self.classes,
            palette_of(s, len(self.classes)),
            sight.window,
            None if sight.window is None else sight.stride,
            resize_of(s),
            None if self.valid.images.arrays else self.input.preprocess,
        )

    def load(self, path: Path, device: torch.device) -> Network:
        """See `Task.load`."""
        return load(path, device, dynamic_img_size=needs_any_size(self.settings))

    def report(
        self,
        model: nn.Module,
        batches: Iterable[Segments],
        device: torch.device,
        precision: torch.dtype,
        folder: Path,
    ) -> None:
        """eval.npz: counts, figures of every image, and the worst images."""
        colours = palette_of(self.settings, len(self.classes))
        sight = self._sight(model, precision)
        found, _ = answers(model, batches, device, sight, self.valid, colours, WORST)
        found.save(folder / "eval.npz")


def resize_of(settings: SegmentationSettings) -> tuple[int, int] | None:
    """(short, long) that images are fitted into."""
    return None if settings.resize is None else (settings.resize[0], settings.resize[1])


def needs_any_size(settings: SegmentationSettings) -> bool:
    """Whether the network has to take images of other sizes than its own."""
    size = backbone.size_of(settings)
    return settings.whole or (settings.window is not None and pair_of(settings.window) != size)


def sight_of(model: Network, settings: SegmentationSettings, precision: torch.dtype) -> Sight:
    """As the settings have it; what they leave open is the network's."""
    window = model.backbone._config.img_size if settings.window is None else pair_of(settings.window)
    part, whole = model.stride_share
    stride = window[0] * part // whole, window[1] * part // whole
    if settings.window_stride is not None:
        stride = pair_of(settings.window_stride)
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(f"window_stride: {stride} leaves gaps between windows of {window}")
    return Sight(None if settings.whole else window, (max(stride[0], 1), max(stride[1], 1)), precision)


def pair_of(sides: Sequence[int]) -> tuple[int, int]:
    """(height, width) of one side or of both."""
    return sides[0], sides[-1]


def palette_of(settings: SegmentationSettings, classes: int) -> Sequence[Sequence[int]]:
    """Colours of the classes."""
    return SCENE_COLOURS if settings.data == SCENES else default_palette(classes)

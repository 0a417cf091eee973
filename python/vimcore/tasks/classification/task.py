# SPDX-License-Identifier: Apache-2.0
"""Classification as a task of the engine: one label for an image, cross-entropy, the best top-1."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data.mixup import Mixup
from torch import Tensor, nn

from ...data.classes import (
    Images,
    Sample,
    Training,
    Validation,
    collate,
    passed_over,
    training_and_validation,
)
from ...data.digits import jiggle
from ...data.inputs import channels_of, eval_transform, input_of, shape_of
from ...data.transforms import Augment, Transform, array_train, clip_train, picture_train
from ...io import load_model, save_model
from ...nn.vision_mamba import VisionMamba
from .. import backbone
from ..settings import Settings
from ..task import Data, Metric, Scores, Task
from .evaluation import accuracy, cross_entropy, outputs
from .predictions import Predictions
from .settings import ClassificationSettings


class Classification(Task):
    """The settings are `ClassificationSettings`."""

    metrics = (Metric("top1", "top-1"), Metric("top5", "top-5"))
    settings: ClassificationSettings

    def data(self) -> Data:
        """See `Task.data`; channels, mean and deviation are settled."""
        s = self.settings
        if s.data is None:
            raise ValueError("data: name a folder of class folders, a CSV or TSV list, or digits")
        frames = backbone.frames_of(s) or 0
        train, self.valid, about = training_and_validation(s.data, s.val, s.val_fraction, frames)
        self.classes = train.classes
        channels = channels_of(train, s.in_chans)
        size = backbone.size_of(s)
        self.input = input_of(train, channels, size, mean=s.mean, std=s.std, crop_pct=s.crop_pct)
        found = {"in_chans": channels, "mean": tuple(self.input.mean), "std": tuple(self.input.std)}
        self.settings = s = s.merged(found)
        self.mixup = _mixup(s, len(self.classes))
        train = replace(train, random_frames=s.frame_sampling == "random")
        what = f"{len(train)} {'clips' if frames else 'images'} of {len(self.classes)} classes to learn from"
        return Data(
            Training(train, self._training_transform(train)),
            Validation(self.valid, eval_transform(self.input, self.valid), shape_of(self.input, frames)),
            collate,
            f"{what}, {len(self.valid)} {about}",
            train.fingerprint(),
            passed_over(train, self.valid),
            samples=dict(
                zip(train.classes, np.bincount(train.labels, minlength=len(train.classes)).tolist())
            ),
        )

    def _training_transform(self, images: Images) -> Transform:
        s = self.settings
        if s.augment != "imagenet":
            return eval_transform(self.input, images)
        augment = Augment(s.crop_scale, s.crop_ratio, s.hflip, s.rand_augment, s.color_jitter, s.random_erase)
        if images.frames:
            return clip_train(self.input, augment)
        return (array_train if images.arrays else picture_train)(self.input, augment)

    def build(self) -> tuple[VisionMamba, list[str]]:
        """See `Task.build`."""
        channels = self.settings.in_chans
        assert channels is not None, "data() comes first"
        return build(self.settings, channels, self.classes)

    def prepare(self, batch: Sample, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) or clips (B, C, T, H, W) and classes (B,), or shares of them (B, classes)."""
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        shape = images.shape
        images = images.flatten(1, -3)  # frames as channels: what befalls one of a clip befalls all
        if self.settings.augment == "jiggle":
            images = jiggle(images.cpu(), torch.default_generator).to(device)
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        return images.view(shape), labels

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy."""
        images, target = batch
        return cross_entropy(model(images), target, self.settings.label_smoothing), {}

    def evaluate(
        self, model: nn.Module, batches: Iterable[Sample], device: torch.device, precision: torch.dtype
    ) -> Scores:
        """Loss, top-1, top-5."""
        found = accuracy(model, batches, device, precision)
        values = {"loss": found.loss, "top1": found.top1, "top5": found.top5}
        return Scores(values, f"{100 * found.top1:.2f} % (loss {found.loss:.4f})", found.errors)

    def save(self, model: nn.Module, path: Path) -> None:
        """With the classes, and for pictures with their preprocessing."""
        assert isinstance(model, VisionMamba)
        save_model(model, path, self.valid.classes, None if self.valid.arrays else self.input.preprocess)

    def load(self, path: Path, device: torch.device) -> VisionMamba:
        """See `Task.load`."""
        return load_model(path, device=device)

    def report(
        self,
        model: nn.Module,
        batches: Iterable[Sample],
        device: torch.device,
        precision: torch.dtype,
        folder: Path,
    ) -> None:
        """eval.npz: the predictions for every image."""
        found = outputs(model, batches, device, precision)
        predictions_of(self.valid, found.labels, found.indices, found.probabilities).save(folder / "eval.npz")


def build(settings: Settings, channels: int, classes: list[str]) -> tuple[VisionMamba, list[str]]:
    """The network, and what a reader should know about how its weights came about.

    Raises:
        ValueError: an option is out of range, or `init` does not fit.
    """
    model = backbone.create(settings, channels, len(classes))
    if len(model._config.logits_shape(1)) == 3:
        raise ValueError("pool: all gives logits for every patch; one label for an image cannot teach them")
    return model, [] if settings.init is None else backbone.start_from(model, settings, classes)


def predictions_of(images: Images, labels: Any, indices: Any, probabilities: Any) -> Predictions:
    """Predictions with the names of classes and files.

    Args:
        labels, indices: (N,) true class, and place among the images.
        probabilities: (N, classes).
    """
    files = [images.files[i] if images.files else "" for i in indices]
    return Predictions(labels, probabilities.argmax(1), probabilities, list(images.classes), files)


def _mixup(settings: ClassificationSettings, classes: int) -> Mixup | None:
    """Mixup and CutMix, None where both are off."""
    if not settings.mixup and not settings.cutmix:
        return None
    return Mixup(
        settings.mixup,
        settings.cutmix,
        switch_prob=settings.mix_switch,
        label_smoothing=settings.label_smoothing,
        num_classes=classes,
    )

# SPDX-License-Identifier: Apache-2.0
"""`vimcore eval` of classifiers: weights against images with labels, also at another size or stride."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ... import _core
from ..._core import Config, Preprocess
from ...data import transforms
from ...data.batches import evaluation_loader
from ...data.classes import Images, Validation, collate, open_images, training_and_validation
from ...data.inputs import eval_transform, shape_of
from ...io import load_model
from ...weights.metadata import unpack
from .evaluation import Outputs, outputs
from .predictions import Predictions
from .settings import ClassificationSettings
from .task import predictions_of


@dataclass(frozen=True)
class Evaluated:
    """One file of weights, its outputs and the images that they are about."""

    weights: str
    outputs: Outputs
    images: Images

    def predictions(self) -> Predictions:
        """With the names of classes and files."""
        found = self.outputs
        return predictions_of(self.images, found.labels, found.indices, found.probabilities)


def images_of(data: str | None, settings: ClassificationSettings | None, weights: Path) -> Images:
    """The images named, or those that the run was validated on; clips where these weights take them."""
    frames = unpack(_core.safetensors_header(str(weights))[1], str(weights)).config.frames or 0
    if data is not None:
        if data == "digits" or (Path(data) / "train").is_dir():
            return training_and_validation(data, None, 0.1, frames)[1]
        return open_images(data, "validation", frames)
    if settings is None or settings.data is None:
        raise ValueError(
            "data: name a folder of class folders, a CSV or TSV list, or digits; there is no run to ask"
        )
    return training_and_validation(settings.data, settings.val, settings.val_fraction, frames)[1]


def evaluate(
    path: Path,
    images: Images,
    settings: ClassificationSettings | None,
    *,
    img_size: Sequence[int] | None = None,
    stride: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 64,
    workers: int = 2,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
) -> Evaluated:
    """The outputs of one file of weights.

    Args:
        img_size, stride: pixels, other than stored; the position table is resized.
        mean, std: of .npy images where no run beside the weights tells them.
        dtype: of activations.

    Raises:
        ValueError: classes, channels or sizes do not fit.
    """
    size = None if img_size is None else (img_size[0], img_size[-1])
    model = load_model(path, size, device, stride=stride)
    _, metadata = _core.safetensors_header(str(path))
    _, labels, stored = unpack(metadata, str(path))
    classes = model.num_classes
    if labels is not None:
        images = images.relabelled(labels)
    elif len(images.classes) != classes:
        raise ValueError(f"{path}: {classes} classes without names, the images have {len(images.classes)}")
    of = _input(model._config, stored, images, settings, mean, std)
    valid = Validation(images, eval_transform(of, images), shape_of(of, images.frames))
    batches = evaluation_loader(valid, batch_size, collate, workers)
    found = outputs(model, batches, torch.device(device), getattr(torch, dtype))
    return Evaluated(str(path), found, images)


def _input(
    config: Config,
    stored: Preprocess | None,
    images: Images,
    settings: ClassificationSettings | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> transforms.Input:
    (height, width), channels = config.img_size, config.in_chans
    found = stored or Preprocess.default(config)
    if found is not None and not images.arrays:
        steps = found.rescaled(height, width)
        return transforms.Input(channels, (height, width), steps.mean, steps.std, steps.resize)
    mean = mean or (settings.mean if settings else None)
    std = std or (settings.std if settings else None)
    if not mean or not std or len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean and std: {channels} channels need as many values each, got {mean} and {std}")
    crop = settings.crop_pct if settings else 0.875
    return transforms.Input(channels, (height, width), mean, std, int(min(height, width) / crop))

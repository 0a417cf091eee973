# SPDX-License-Identifier: Apache-2.0
"""`vimcore eval` of segmentation: weights against images with masks, also at another size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...data.batches import evaluation_loader
from ...data.joint import Joint, JointAugment
from ...data.pairs import Pairs, Reading, training_and_validation, validation
from ...data.segments import Validation, collate
from ...data.transforms import Input
from ...segmentation import Segmentation as Network
from ...segmentation import load
from .answers import Answers
from .evaluation import Counted, Sight, answers
from .settings import SegmentationSettings
from .task import WORST


@dataclass(frozen=True)
class Evaluated:
    """One file of weights, and what it says of the pixels of images.

    Attributes:
        counted: images, seconds of the network, files that could not be read.
    """

    weights: str
    answers: Answers
    counted: Counted
    pairs: Pairs


def pairs_of(
    data: str | None,
    settings: SegmentationSettings | None,
    classes: Sequence[str],
    reduce_zero_label: bool | None,
) -> Pairs:
    """The images named, or those that the run was validated on."""
    if reduce_zero_label is None:
        reduce_zero_label = bool(settings and settings.reduce_zero_label)
    if data is not None:
        return validation(data, list(classes), reduce_zero_label)
    if settings is None or settings.data is None:
        raise ValueError("data: name images with masks, as for train; there is no run to ask")
    reading = Reading(settings.classes, reduce_zero_label, settings.scenes)
    return training_and_validation(settings.data, settings.val, settings.val_fraction, reading)[1]


def evaluate(
    path: str,
    data: str | None,
    settings: SegmentationSettings | None,
    *,
    reduce_zero_label: bool | None = None,
    img_size: Sequence[int] | None = None,
    whole: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 64,
    workers: int = 2,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
) -> Evaluated:
    """What one file of weights says of images with masks.

    Args:
        data: images with masks; None: the validation images of the run.
        settings: of the run, if there is one.
        img_size: pixels, other than stored: of the network and its windows.
        whole: no windows.
        mean, std: of .npy images where no run beside the weights tells them.
        dtype: of activations.

    Raises:
        ValueError: classes, channels or sizes do not fit.
    """
    size = None if img_size is None else (img_size[0], img_size[-1])
    model = load(path, device, img_size=size)
    task = model.task
    assert task is not None
    pairs = pairs_of(data, settings, task.classes, reduce_zero_label)
    if pairs.classes != list(task.classes):
        raise ValueError(f"{path}: another set of classes than the images have")
    window, stride = task.window, task.stride
    if size is not None:
        part, of = model.stride_share
        window, stride = size, (max(size[0] * part // of, 1), max(size[1] * part // of, 1))
    model.backbone.dynamic_img_size = whole or window != model.backbone._config.img_size
    joint = Joint(_input(model, pairs, settings, mean, std), pairs.images.arrays, JointAugment(task.resize))
    batches = evaluation_loader(Validation(pairs, joint), batch_size, collate, workers)
    sight = Sight(None if whole else window, stride, getattr(torch, dtype))
    found = answers(model, batches, torch.device(device), sight, pairs, task.palette, WORST)
    return Evaluated(path, *found, pairs)


def _input(
    model: Network,
    pairs: Pairs,
    settings: SegmentationSettings | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Input:
    config, stored = model.backbone._config, model.preprocess
    if stored is not None and not pairs.images.arrays:
        mean, std = stored.mean, stored.std
    else:
        mean = mean or (settings.mean if settings else None)
        std = std or (settings.std if settings else None)
    channels = config.in_chans
    if not mean or not std or len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean and std: {channels} channels need as many values each, got {mean} and {std}")
    return Input(channels, config.img_size, mean, std, min(config.img_size))

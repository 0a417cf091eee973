# SPDX-License-Identifier: Apache-2.0
"""What a run feeds its network: size and statistics of the input, batches, mixup."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import numpy as np
from timm.data.mixup import Mixup
from torch import Tensor
from torch.utils.data import DataLoader

from ..tasks.classification import one_thread
from ..tasks.settings import Settings
from . import transforms
from .classes import Images, Sample, Training, collate
from .sampling import Order
from .transforms import Input

_MEASURED = 256  # numpy files looked at for mean and deviation


def channels_of(settings: Settings, images: Images) -> int:
    """Channels of the network's input; ValueError where the images cannot have them."""
    if images.arrays:
        return settings.in_chans or next(_readable(images)).shape[0]
    channels = settings.in_chans or 3
    if channels not in (1, 3):
        raise ValueError(f"in_chans: expected 1 or 3 for pictures, got {channels}")
    return channels


def input_of(settings: Settings, images: Images, channels: int, size: tuple[int, int]) -> Input:
    """Mean and deviation as set, as usual for pictures, or measured."""
    mean, std = settings.mean, settings.std
    if mean is None or std is None:
        known = None if images.arrays else transforms.default_statistics(channels)
        statistics = known or _statistics(images)
        mean, std = mean or statistics[0], std or statistics[1]
    if len(mean) != channels or len(std) != channels or not min(std) > 0:
        raise ValueError(f"mean and std: expected {channels} values each, std positive, got {mean} and {std}")
    return Input(channels, size, mean, std, int(min(size) / settings.crop_pct))


def eval_transform(of: Input, images: Images) -> transforms.Transform:
    """From an image as read to the network's input, without chance."""
    return transforms.array_eval(of) if images.arrays else transforms.picture_eval(of)


def training_batches(
    settings: Settings, of: Input, images: Images, order: Order, pin: bool
) -> DataLoader[Sample]:
    """Augmented images in this order."""
    if settings.augment == "imagenet":
        make = transforms.array_train if images.arrays else transforms.picture_train
        transform = make(of, settings)
    else:
        transform = eval_transform(of, images)
    return DataLoader(
        Training(images, transform),
        batch_sampler=order,
        num_workers=settings.workers,
        collate_fn=collate,
        worker_init_fn=one_thread,
        persistent_workers=settings.workers > 0,
        pin_memory=pin,
    )


def grouped(batches: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    """Batches by `size`; what is left over is left out."""
    group: list[Sample] = []
    for sample in batches:
        group.append(sample)
        if len(group) == size:
            yield group
            group = []


def _readable(images: Images) -> Iterator[Tensor]:
    """Some of the arrays (C, H, W) float32, those that can be read."""
    found = 0
    for index in range(0, len(images), max(len(images) // _MEASURED, 1)):
        with contextlib.suppress(transforms.UnreadableError):  # told when the run meets it
            yield transforms.scaled(images.read(index))
            found += 1
    if not found:
        raise ValueError("none of the images could be read")


def _statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of each channel, from 0 to 1 for integer types."""
    total = squares = np.zeros(0)
    count = 0
    for array in _readable(images):
        values = array.double().flatten(1).numpy()
        if count and len(values) != len(total):
            continue  # of another number of channels: skipped and told by the run
        total = values.sum(1) + (total if count else 0)
        squares = (values**2).sum(1) + (squares if count else 0)
        count += values.shape[1]
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
    return tuple(round(float(v), 6) for v in mean), tuple(max(round(float(v), 6), 1e-6) for v in std)


def mixup_of(settings: Settings, classes: int) -> Mixup | None:
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

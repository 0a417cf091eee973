# SPDX-License-Identifier: Apache-2.0
"""Learning rate of each update, by timm's scheduler."""

from __future__ import annotations

import torch
from timm.scheduler import CosineLRScheduler

from .settings import Settings


def peak_lr(settings: Settings, world: int) -> float:
    """lr, scaled linearly by the images of one update if scale_lr; warm-up and minimum are never scaled."""
    images = settings.batch_size * settings.accumulate * world
    return settings.lr * images / settings.lr_batch if settings.scale_lr else settings.lr


class Schedule:
    """lr(update): linear warm-up, then a cosine whose clock began with the warm-up, or the peak.

    schedule_steps "update" moves at each update, "epoch" at each epoch; "authors" as well, but epoch e has
    the value of epoch e - 1, because the published loop steps its scheduler after the epoch.
    """

    def __init__(self, settings: Settings, peak: float, updates_per_epoch: int) -> None:
        self.when, self.per_epoch = settings.schedule_steps, updates_per_epoch
        units = updates_per_epoch if self.when == "update" else 1
        self.peak, self.constant = peak, settings.schedule == "constant"
        self.warmup = round(settings.warmup_epochs * units)
        self.warmup_lr = settings.warmup_lr
        carrier = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=peak)
        self.cosine = CosineLRScheduler(
            carrier,
            t_initial=max(settings.epochs * units, 2),  # timm warns of 1, which has one value anyway
            lr_min=settings.min_lr,
            warmup_t=self.warmup,
            warmup_lr_init=settings.warmup_lr,
        )

    def __call__(self, update: int) -> float:
        epoch = update // self.per_epoch
        time = {"update": update, "epoch": epoch, "authors": max(epoch - 1, 0)}[self.when]
        if self.constant and time >= self.warmup:
            return self.peak
        return float(self.cosine._get_lr(time)[0])

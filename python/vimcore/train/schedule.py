# SPDX-License-Identifier: Apache-2.0
"""Learning rate of each update: `Schedule` of recipes, by timm's scheduler, and `cosine_lr` of `fit`.

Needs neither torch nor timm until a `Schedule` is made.
"""

from __future__ import annotations

import math

from ..tasks.settings import Settings

NEAR = 0.9  # of the peak: where a warm-up over a tenth of the run ends, the cosine has 0.98 of it


def peak_lr(settings: Settings, world: int) -> float:
    """lr, scaled linearly by the images of one update if scale_lr; warm-up and minimum are never scaled."""
    images = settings.batch_size * settings.accumulate * world
    return settings.lr * images / settings.lr_batch if settings.scale_lr else settings.lr


def bounded_warmup(warmup: float, epochs: int, steps: str = "update") -> float:
    """Epochs of warm-up: `warmup`, or a tenth of the run where that is shorter.

    Args:
        steps: when the learning rate moves, see Settings.schedule_steps. By epochs, only whole ones fit; and
            the authors' clock stands still for one of them.
    """
    tenth = {"update": epochs / 10, "epoch": epochs // 10, "authors": max(epochs // 10 - 1, 0)}[steps]
    return min(warmup, float(tenth))


def cosine_lr(step: int, steps: int, warmup_steps: int, lr: float, min_lr: float) -> float:
    """Learning rate of step 0 .. steps - 1: linear warm-up to ``lr``, then a cosine down to ``min_lr``."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


class Schedule:
    """lr(update): linear warm-up, then a cosine whose clock began with the warm-up, or the peak.

    schedule_steps "update" moves at each update, "epoch" at each epoch; "authors" as well, but epoch e has
    the value of epoch e - 1, because the published loop steps its scheduler after the epoch.

    "poly" and "steps" are mmsegmentation's and detectron2's, by updates t of T: peak * (1 - t / T)^poly_power
    down to min_lr, and a tenth of the peak after each milestone; warm-up over W updates multiplies them by
    1 - (1 - t / W)(1 - warmup_factor).

    Args:
        updates: T; default: whole epochs.
    """

    def __init__(
        self, settings: Settings, peak: float, updates_per_epoch: int, updates: int | None = None
    ) -> None:
        updates = updates or updates_per_epoch * settings.epochs
        self.when, self.per_epoch = settings.schedule_steps, updates_per_epoch
        units = updates_per_epoch if self.when == "update" else 1
        self.peak, self.kind, self.updates = peak, settings.schedule, updates
        self.warmup = round(settings.warmup_epochs * units)
        if settings.warmup_updates is not None:
            self.warmup = settings.warmup_updates
            if settings.updates is None:
                self.warmup = min(self.warmup, updates // 10)
        if settings.warmup_share is not None:
            length = updates if self.when == "update" else settings.epochs
            self.warmup = round(settings.warmup_share * length)
        self.warmup_lr, self.min_lr, self.factor = settings.warmup_lr, settings.min_lr, settings.warmup_factor
        self.power = settings.poly_power
        self.milestones = [round(share * updates) for share in settings.milestones]
        if self.kind in ("cosine", "constant"):
            self._cosine(updates if self.when == "update" else settings.epochs)

    def _cosine(self, length: int) -> None:
        import torch
        from timm.scheduler import CosineLRScheduler

        carrier = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=self.peak)
        self.cosine = CosineLRScheduler(
            carrier,
            t_initial=max(length, 2),  # timm warns of 1, which has one value anyway
            lr_min=self.min_lr,
            warmup_t=self.warmup,
            warmup_lr_init=self.warmup_lr,
        )

    def __call__(self, update: int) -> float:
        return self._at(self._time(update))

    def highest(self, updates: int) -> float:
        """The largest learning rate of a run of so many updates: it grows, and then falls."""
        last = self._time(updates - 1)
        times = (0, self.warmup - 1, self.warmup, last, last // 2)
        return max(self._at(min(max(time, 0), last)) for time in times)

    @property
    def constant(self) -> bool:
        """Whether it stays at its peak after the warm-up."""
        return self.kind == "constant"

    def _time(self, update: int) -> int:
        epoch = update // self.per_epoch
        return {"update": update, "epoch": epoch, "authors": max(epoch - 1, 0)}[self.when]

    def _at(self, time: int) -> float:
        if self.kind in ("poly", "steps"):
            return self._by_updates(time)
        if self.constant and time >= self.warmup:
            return self.peak
        return float(self.cosine._get_lr(time)[0])

    def _by_updates(self, time: int) -> float:
        if self.kind == "poly":
            left = (1 - time / self.updates) ** self.power
            lr = (self.peak - self.min_lr) * left + self.min_lr
        else:
            lr = self.peak * 0.1 ** sum(time >= milestone for milestone in self.milestones)
        if time < self.warmup:
            lr *= 1 - (1 - time / self.warmup) * (1 - self.factor)
        return lr


def described(settings: Settings, images: int, peak: float) -> str:
    """Given, scaled and peak learning rate and the rule, for an update of so many images."""
    if settings.scale_lr:
        rule = f"lr {settings.lr:g} x {images} images an update / lr_batch {settings.lr_batch} = {peak:.3g} "
        rule += "at its peak; --no-scale-lr takes lr as it is"
    else:
        rule = f"lr {peak:.3g} at its peak, as given: scale_lr is off"
    return f"learning rate: {rule}"


def _warmup_flag(settings: Settings) -> str:
    if settings.warmup_share is not None:
        return f"--warmup-share, {settings.warmup_share:g} of the run"
    if settings.warmup_updates is not None:
        return f"--warmup-updates, {settings.warmup_updates}"
    return f"--warmup-epochs, {settings.warmup_epochs:g} of {settings.epochs} epochs"


def warnings(settings: Settings, schedule: Schedule, updates: int) -> list[str]:
    """What of so many updates would teach little though every setting is in its range."""
    found = []
    peak, highest = schedule.peak, schedule.highest(updates)
    if highest < NEAR * peak:
        found.append(
            f"the learning rate never reaches its peak of {peak:.3g}: the highest in {updates} updates is "
            f"{highest:.3g}; {_warmup_flag(settings)}, sets it"
        )
    if not schedule.constant and settings.min_lr > peak:
        found.append(
            f"min_lr {settings.min_lr:g} is above the peak of {peak:.3g}, so the learning rate rises to the "
            "end; --min-lr sets it"
        )
    initial = settings.ema**updates
    if settings.ema and not settings.ema_ramp and initial > 0.5:
        found.append(
            f"after {updates} updates the averaged weights are still {100 * initial:.0f} % the initial ones; "
            "--ema-ramp lets a young average forget faster"
        )
    return found

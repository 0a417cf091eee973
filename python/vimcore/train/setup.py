# SPDX-License-Identifier: Apache-2.0
"""What a run needs before its first update: data, network, optimizer, loaders, log, and its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..data.batches import evaluation_loader, training_loader
from ..data.picture_files import passed_over_text
from ..data.sampling import EpochSampler, derive_seed, seed_all
from ..tasks.settings import Settings
from ..tasks.task import Data, Task
from ..utils import distributed
from ..utils.files import write_text
from .checkpoint import read_checkpoint
from .ema import Ema
from .folder import CHECKPOINT, CONFIG, leftovers
from .lock import Lock
from .log import RunLog
from .loop import Loop
from .optimizer import create_optimizer
from .schedule import Schedule, described, peak_lr, warnings
from .signals import Signals
from .state import State
from .track import chosen, open_trackers


class Setup:
    """Of one process.

    Args:
        resume: go on from the checkpoint in the folder.
        notes: on the settings, to be told and recorded.
        stop: a signal ends the set-up, but not what follows its `setting_up`.
        verbose: print all settings, not only those that are not as they are without a preset.

    Raises:
        ValueError, OSError: settings, data or files do not fit, or another process writes this run.
    """

    def __init__(
        self,
        task: Task,
        folder: Path,
        device: torch.device,
        resume: bool,
        notes: Sequence[str],
        lock: Lock,
        stop: Signals,
        verbose: bool = False,
    ) -> None:
        self.folder, self.device, self.verbose = folder, device, verbose
        self.rank, self.world = distributed.rank(), distributed.world()
        tracked = chosen(task.settings.track)
        if self.rank == 0 and (resume or (folder / lock.NAME).exists()):
            lock.take()  # before anything of the run is read
        if resume and not (folder / CHECKPOINT).exists():
            raise ValueError(f"{folder}: no {CHECKPOINT} yet; start the run again with --out {folder}")
        saved = read_checkpoint(folder / CHECKPOINT) if resume else None
        self._refuse_another(resume)

        self.data = task.data()
        self.settings = settings = task.settings
        seed_all(derive_seed("weights", settings.seed))
        model, of_weights = task.build()
        model.to(device)
        self._build(task, self.data, model)
        settings = self.settings  # whole: the number of epochs may have followed from the data
        if saved is not None:
            self.state.restore(folder, saved, settings, task.metrics)

        pin = device.type == "cuda"
        self.batches = training_loader(
            self.data.train, self.sampler, self.data.collate, settings.workers, pin
        )
        self.valid_batches = self.validation(pin)
        notes = [*notes, *warnings(settings, self.schedule, self.updates)]
        in_folder: list[str] = []  # told, but no part of the log, which the settings decide
        trackers = []
        stop.setting_up = False
        if self.rank == 0:
            lock.take()
            self._refuse_another(resume)  # another may have begun and ended meanwhile
            in_folder = [*lock.notes, *leftovers(folder)]
            write_text(folder / CONFIG, settings.to_toml())
            trackers = open_trackers(tracked, folder, vars(settings), self.state.loop.step)
        self.log = RunLog(
            folder,
            self.updates,
            self.state.loop.step,
            whole_epoch=saved is None or saved["done"] == 0,
            writes=self.rank == 0,
            resumed=resume,
            trackers=trackers,
        )
        self._log_setup(of_weights, notes, in_folder)

    def _refuse_another(self, resume: bool) -> None:
        if not resume and (self.folder / CHECKPOINT).exists():
            folder = self.folder
            raise ValueError(f"{folder}: holds a run; go on with --resume {folder}, or name another --out")

    def _build(self, task: Task, data: Data, model: nn.Module) -> None:
        """The order of the images, the schedule, and what a checkpoint holds."""
        settings = self.settings
        count = len(data.train)  # type: ignore[arg-type]
        self.sampler = EpochSampler(
            count, settings.batch_size, self.rank, self.world, settings.seed, settings.repeats
        )
        self.per_update = settings.batch_size * settings.accumulate * self.world
        per_epoch = len(self.sampler) // settings.accumulate
        if per_epoch == 0:
            what = f"{count} images to learn from do not fill one update of {self.per_update}"
            raise ValueError(f"batch_size: {what}; lower it")
        self.updates = settings.updates or per_epoch * settings.epochs
        if settings.updates is not None:
            self.settings = settings = settings.merged({"epochs": -(-self.updates // per_epoch)})
        peak = peak_lr(settings, self.world)
        self.schedule = Schedule(settings, peak, per_epoch, self.updates)
        optimizer = create_optimizer(model, settings, peak, task.layers(), task.layer_decay())
        ema = Ema(model, settings.ema, settings.ema_ramp) if settings.ema else None
        loop = Loop(
            self._wrap_ddp(model),
            optimizer,
            self.schedule,
            task.loss,
            ema=ema,
            clip=settings.clip_grad,
            precision=getattr(torch, settings.precision),
            constrain=lambda: task.constrain(model),
        )
        identity = {"images": data.fingerprint, "per_update": self.per_update}
        self.state = State(model, optimizer, loop, ema, per_epoch, self.updates, identity)

    def _wrap_ddp(self, model: nn.Module) -> nn.Module:
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)

    def validation(self, pin: bool = False) -> DataLoader[Any]:
        """A new loader of the validation data."""
        size = self.data.valid_batch_size or self.settings.batch_size
        return evaluation_loader(self.data.valid, size, self.data.collate, self.settings.workers, pin)

    def _warmup(self) -> dict[str, Any]:
        """Its length in the unit that counts."""
        names = ("warmup_share", "warmup_updates", "warmup_epochs")
        name = next(name for name in names if getattr(self.settings, name) is not None)
        return {name: getattr(self.settings, name)}

    def _log_setup(self, of_weights: list[str], notes: list[str], in_folder: list[str]) -> None:
        s, step = self.settings, self.state.loop.step
        count = sum(p.numel() for p in self.state.model.parameters())
        text = [
            s.to_toml() if self.verbose else f"settings: {self.folder / CONFIG}; {_differing(s)}",
            self.data.about,
            f"{count:,} parameters on {self.device}, {self.world} process{'es' if self.world > 1 else ''}, "
            f"{self.per_update} images an update, {self.state.updates_per_epoch} updates an epoch",
            described(s, self.per_update, self.schedule.peak),
            *of_weights,
        ]
        if self.data.passed_over:
            text.append(f"vimcore: {passed_over_text(self.data.passed_over)}")
        if step:
            length = "epochs" if s.updates is None else "updates"
            ended = f": the run had ended; --{length} with more than {getattr(s, length)} makes it longer"
            text.append(
                f"continued after update {step} of {self.updates}{ended if step == self.updates else ''}"
            )
        for line in [*text, *(f"vimcore: {note}" for note in [*notes, *in_folder])]:
            self.log.say(line)
        self.log.start(
            lr=s.lr,
            scale_lr=s.scale_lr,
            lr_batch=s.lr_batch,
            images_per_update=self.per_update,
            peak_lr=self.schedule.peak,
            **self._warmup(),
            epochs=s.epochs,
            updates=self.updates,
            notes=notes,
            **({"samples": self.data.samples} if self.data.samples else {}),
        )


def _differing(settings: Settings) -> str:
    """The settings that have not the values of their task without a preset."""
    plain = type(settings)(task=settings.task)
    found = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != getattr(plain, field.name):
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            found.append(f"{field.name} {shown}")
    return ", ".join(found) or "all as they are by default"

# SPDX-License-Identifier: Apache-2.0
"""`vimcore train`: a run from its settings to its files, or on from its checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.batches import channels_of, eval_transform, grouped, input_of, mixup_of, training_batches
from ..data.classes import Images, Sample, Validation, passed_over, training_and_validation
from ..data.digits import jiggle
from ..data.picture_files import passed_over_text
from ..data.sampling import Order, mix, seed_all
from ..io import load_model, save_model
from ..tasks.classification import Scores, answers, loader, measure
from ..tasks.settings import Settings, read_toml
from ..utils import distributed
from ..utils.files import listed, write_text
from .checkpoint import read_checkpoint, write_checkpoint
from .lock import Lock, remove_leftovers
from .log import Watch, peak_memory
from .loop import Average, Batch, Loop, NonFiniteError, parameter_groups
from .network import build, choose_device
from .restore import Expected, check
from .schedule import Schedule, described, peak_lr, warnings
from .signals import Signals, Stopped, Stuck, signals

CONFIG, CHECKPOINT, LOG = "config.toml", "checkpoint.pt", "log.jsonl"
BEST, LAST, LAST_EMA = "best.safetensors", "last.safetensors", "last_ema.safetensors"
# What may be another when a run goes on: none of it changes the result, or only how long the run is watched.
MACHINE = ("device", "threads", "workers", "checkpoint_every", "eval_every", "log_every")


def train(
    settings: Settings, folder: Path, resume: bool = False, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """A whole run, alone or as one of the processes of torchrun.

    Args:
        notes: on the settings, to be told and recorded.

    Returns:
        The summary that `vimcore train --json` prints.

    Raises:
        ValueError, OSError: settings, data or files do not fit, or another process writes this run.
        NonFiniteError: a loss or gradient was not finite; the last checkpoint is as it was.
        Stopped: by a signal, after a checkpoint.
    """
    device = choose_device(settings.device, settings.precision, distributed.local_rank())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    lock = Lock(folder)
    with distributed.process_group(device.type == "cuda"), signals() as stop:
        try:
            run = Run(settings, folder, device, resume, notes, lock, stop)
            try:
                return run.whole()
            finally:
                run.watch.close()
        except Stuck:
            stop.end()
            begun = folder if (folder / CHECKPOINT).exists() else None
            raise Stopped(stop.number, begun, stop.place) from None
        finally:
            lock.release()


class Run:
    """Data, network, optimiser and place in the schedule of a run."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        device: torch.device,
        resume: bool,
        notes: Sequence[str],
        lock: Lock,
        stop: Signals,
    ) -> None:
        self.folder, self.device, self.stop = folder, device, stop
        self.rank, self.world = distributed.rank(), distributed.world()
        if self.rank == 0 and (resume or (folder / lock.NAME).exists()):
            lock.take()  # before anything of the run is read
        if resume and not (folder / CHECKPOINT).exists():
            raise ValueError(f"{folder}: no {CHECKPOINT} yet; start the run again with --out {folder}")
        saved = read_checkpoint(folder / CHECKPOINT) if resume else None
        self._refuse_another(resume)

        if settings.data is None:
            raise ValueError("data: name a folder of class folders, a CSV or TSV list, or digits")
        train, self.valid, about = training_and_validation(settings.data, settings.val, settings.val_fraction)
        self.passed_over = passed_over(train, self.valid)
        channels = channels_of(settings, train)
        seed_all(mix("weights", settings.seed))
        self.model, of_weights = build(settings, channels, train.classes)
        height, width = self.model.config["img_size"]
        self.input = input_of(settings, train, channels, (height, width))
        found = {"in_chans": channels, "mean": tuple(self.input.mean), "std": tuple(self.input.std)}
        self.settings = settings = settings.merged(found)
        self.model.to(device)
        self.precision: torch.dtype = getattr(torch, settings.precision)
        self.order = Order(
            len(train), settings.batch_size, self.rank, self.world, settings.seed, settings.repeats
        )
        self.updates_per_epoch = len(self.order) // settings.accumulate
        per_update = settings.batch_size * settings.accumulate * self.world
        if self.updates_per_epoch == 0:
            count = f"{len(train)} images to learn from"
            raise ValueError(f"batch_size: {count} do not fill one update of {per_update}; lower it")
        self.updates = self.updates_per_epoch * settings.epochs
        self.peak = peak_lr(settings, self.world)
        groups = parameter_groups(self.model, settings.weight_decay, settings.decay)
        self.average = Average(self.model, settings.ema, settings.ema_ramp) if settings.ema else None
        self.optimizer = torch.optim.AdamW(groups, lr=self.peak, betas=(0.9, 0.999), eps=1e-8)
        schedule = Schedule(settings, self.peak, self.updates_per_epoch)
        self.loop = Loop(
            self._together(self.model),
            self.optimizer,
            schedule,
            label_smoothing=settings.label_smoothing,
            average=self.average,
            clip=settings.clip_grad,
            precision=self.precision,
        )
        self.mixup = mixup_of(settings, len(train.classes))
        self.per_update = per_update
        self.identity: dict[str, Any] = {"images": train.fingerprint(), "per_update": per_update}
        self.epoch, self.done = 0, 0  # epochs finished; updates of the current one
        self.seen, self.lr = torch.empty(0), 0.0  # of the last update
        self.best: dict[str, Any] = {}
        self.faults: dict[str, str] = {}  # of this process
        if saved is not None:
            self._restore(saved)

        pin = device.type == "cuda"
        self.batches = training_batches(settings, self.input, train, self.order, pin)
        shape = (channels, height, width)
        self.validation = Validation(self.valid, eval_transform(self.input, self.valid), shape)
        self.valid_batches = loader(self.validation, settings.batch_size, settings.workers, pin)
        notes = [*notes, *warnings(settings, schedule, self.updates)]
        in_folder: list[str] = []  # told, but no part of the log, which the settings decide
        stop.setting_up = False
        if self.rank == 0:
            lock.take()
            self._refuse_another(resume)  # another may have begun and ended meanwhile
            in_folder = [*lock.notes, *_leftovers(folder)]
            write_text(folder / CONFIG, settings.to_toml())
        whole_epoch = self.done == 0
        self.watch = Watch(folder, self.updates, self.loop.step, whole_epoch, self.rank == 0, resume)
        self._introduce(train, about, of_weights, notes, in_folder)

    # ---- setting up ----------------------------------------------------------------------------------------

    def _together(self, model: nn.Module) -> nn.Module:
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)

    def _refuse_another(self, resume: bool) -> None:
        if not resume and (self.folder / CHECKPOINT).exists():
            folder = self.folder
            raise ValueError(f"{folder}: holds a run; go on with --resume {folder}, or name another --out")

    def _introduce(
        self, train: Images, about: str, of_weights: list[str], notes: list[str], in_folder: list[str]
    ) -> None:
        s = self.settings
        count = sum(p.numel() for p in self.model.parameters())
        text = [
            s.to_toml(),
            f"{len(train)} images of {len(train.classes)} classes to learn from, {len(self.valid)} {about}",
            f"{count:,} parameters on {self.device}, {self.world} process{'es' if self.world > 1 else ''}, "
            f"{self.per_update} images an update, {self.updates_per_epoch} updates an epoch",
            described(s, self.per_update, self.peak),
            *of_weights,
        ]
        if self.passed_over:
            text.append(f"vimcore: {passed_over_text(self.passed_over)}")
        if self.loop.step:
            text.append(f"continued after update {self.loop.step} of {self.updates}")
        for line in [*text, *(f"vimcore: {note}" for note in [*notes, *in_folder])]:
            self.watch.say(line)
        self.watch.start(
            lr=s.lr,
            scale_lr=s.scale_lr,
            lr_batch=s.lr_batch,
            images_per_update=self.per_update,
            peak_lr=self.peak,
            warmup_epochs=s.warmup_epochs,
            epochs=s.epochs,
            updates=self.updates,
            notes=notes,
        )

    def _restore(self, saved: dict[str, Any]) -> None:
        """Takes over a checkpoint; ValueError names what in it is not of this run."""
        average, optimizer = self.average, self.optimizer
        expected = Expected(
            model=self.model.state_dict(),
            average=None if average is None else average.values,
            optimizer=optimizer.state_dict(),
            scaler=self.loop.scaler.state_dict(),
            parameters=[p for group in optimizer.param_groups for p in group["params"]],
            epochs=self.settings.epochs,
            updates_per_epoch=self.updates_per_epoch,
            identity=self.identity,
        )
        check(self.folder / CHECKPOINT, saved, expected)
        if saved["best"] and not (self.folder / BEST).is_file():
            raise ValueError(f"{self.folder / BEST}: not there, but the checkpoint names it as the best")
        self.model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        self.loop.scaler.load_state_dict(saved["scaler"])
        if average is not None:
            for value, kept in zip(average.values, saved["average"]):
                value.copy_(kept)
        self.loop.step = saved["step"]
        self.epoch, self.done, self.best = saved["epoch"], saved["done"], saved["best"]

    # ---- running -------------------------------------------------------------------------------------------

    def whole(self) -> dict[str, Any]:
        """Runs to the end, or to a signal."""
        begin, first = time.perf_counter(), self.loop.step
        while self.epoch < self.settings.epochs:
            try:
                self._epoch()
                self.epoch, self.done = self.epoch + 1, 0
                self.watch.faults(distributed.union(self.faults))
                if self.epoch % self.settings.eval_every == 0 or self.epoch == self.settings.epochs:
                    self._validate()
                self._save()
            except NonFiniteError as error:
                raise self._explained(error) from None
            self._stop_if(self._agreed())
        seconds = time.perf_counter() - begin
        distributed.leave()
        return self._finish(seconds, self.loop.step - first) if self.rank == 0 else {}

    def _epoch(self) -> None:
        try:
            self._updates()
        except Stuck:  # between two updates: they are not lost
            self.stop.end()
            self._save()
            when = f"after update {self.loop.step}, {self.stop.place}"
            raise Stopped(self.stop.number, self.folder, when) from None

    def _updates(self) -> None:
        """Those of the epoch that are not done."""
        settings = self.settings
        self.model.train()
        self.order.begin(self.epoch, self.done * settings.accumulate)
        clock, images = time.perf_counter(), 0
        rate = 0.0
        for samples in grouped(self.stop.waited(self.batches), settings.accumulate):
            if self.done == self.updates_per_epoch:
                break  # what is left over does not fill an update
            seed_all(mix("update", settings.seed, self.loop.step, self.rank))
            batches = [self._batch(sample) for sample in samples]
            update = self.loop.update(batches)
            self.seen, self.lr = batches[-1][0], update.lr
            self.done += 1
            images += self.per_update
            step, memory = self.loop.step, peak_memory(self.device)
            rate = images / (time.perf_counter() - clock)
            self.watch.step(self.epoch + 1, settings.epochs, update.loss, update.lr, rate, memory)
            if step % settings.log_every == 0 or self.done == self.updates_per_epoch:
                self.watch.record(
                    "step",
                    step=step,
                    epoch=round(step / self.updates_per_epoch, 6),
                    loss=update.loss,
                    lr=update.lr,
                    images_per_second=round(rate, 3),
                    grad_norm=update.grad_norm,
                    memory=memory,
                )
                clock, images = time.perf_counter(), 0
            stop = self._agreed()
            last = self.done == self.updates_per_epoch  # validation may take long
            if stop or last or step % settings.checkpoint_every == 0:
                self._save()
            self._stop_if(stop)

    def _batch(self, sample: Sample) -> Batch:
        self.faults |= sample.faults
        self.watch.faults(sample.faults)
        images = sample.images.to(self.device, non_blocking=True)
        labels = sample.labels.to(self.device, non_blocking=True)
        if self.settings.augment == "jiggle":
            images = jiggle(images.cpu(), torch.default_generator).to(self.device)
        if self.mixup is not None:
            mixed: tuple[Tensor, Tensor] = self.mixup(images, labels)
            return mixed
        return images, labels

    def _agreed(self) -> int:
        """The signal to stop for, the same in all processes; 0: none."""
        mine = self.stop.number
        if self.world == 1:
            return mine
        count, total = distributed.sums([float(mine > 0), float(mine)])
        return round(total / count) if count else 0

    def _stop_if(self, number: int) -> None:
        if number and self.epoch < self.settings.epochs:
            raise Stopped(number, self.folder, f"after update {self.loop.step}")

    def _validate(self) -> None:
        found: dict[str, Scores] = {}
        found["raw"], faults = self._measure()
        if self.average is not None:
            with self.average.swapped():
                found["ema"], faults = self._measure()
                self._keep_best("ema", found["ema"])
        self._keep_best("raw", found["raw"])
        self.watch.faults(distributed.union(faults))
        step = self.loop.step
        for weights, s in found.items():
            self.watch.record(
                "eval", epoch=self.epoch, step=step, loss=s.loss, top1=s.top1, top5=s.top5, weights=weights
            )
        line = ", ".join(f"{w} {100 * s.top1:.2f} % (loss {s.loss:.4f})" for w, s in found.items())
        self.watch.say(f"epoch {self.epoch}/{self.settings.epochs}: validation {line}")

    def _measure(self) -> tuple[Scores, dict[str, str]]:
        return measure(self.model, self.stop.waited(self.valid_batches), self.device, self.precision)

    # ---- files ---------------------------------------------------------------------------------------------

    def _keep_best(self, weights: str, scores: Scores) -> None:
        """Writes the model as the best so far, if it is; equal ones do not replace it."""
        if self.best and scores.top1 <= self.best["top1"]:
            return
        self.best = {"top1": scores.top1, "top5": scores.top5, "epoch": self.epoch, "weights": weights}
        self._write(BEST)

    def _write(self, name: str) -> None:
        if self.rank == 0:
            preprocess = None if self.valid.arrays else self.input.preprocess
            save_model(self.model, self.folder / name, self.valid.classes, preprocess)

    def _save(self) -> None:
        """Checkpoint, then the last weights: all by the writing process, others go on.

        Raises:
            NonFiniteError: the weights are not worth keeping; the checkpoint stays as it was.
        """
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise NonFiniteError("largest weight", math.inf, self.loop.step - 1, self.lr, self.seen)
        if self.rank:
            return
        content = {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.values,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.loop.scaler.state_dict(),
            "step": self.loop.step,
            "epoch": self.epoch,
            "done": self.done,
            "best": self.best,
            "identity": self.identity,
        }
        write_checkpoint(self.folder / CHECKPOINT, content)
        self._write(LAST)
        if self.average is not None:
            with self.average.swapped():
                self._write(LAST_EMA)

    def _finish(self, seconds: float, steps: int) -> dict[str, Any]:
        """eval.npz of the best weights; the summary."""
        best = load_model(self.folder / BEST, device=self.device)
        batches = loader(self.validation, self.settings.batch_size, self.settings.workers)
        found = answers(best, self.stop.waited(batches), self.device, self.precision)
        found.save(self.folder / "eval.npz", self.valid)
        images = steps * self.per_update
        return {
            "out": str(self.folder),
            "epochs": self.settings.epochs,
            "updates": self.loop.step,
            "best": self.best,
            "seconds": round(seconds, 2),
            "images_per_second": round(images / seconds, 2),
            "skipped": len(self.watch.skipped),
            **({"passed_over": self.passed_over} if self.passed_over else {}),
        }

    def _explained(self, error: NonFiniteError) -> FloatingPointError:
        """The health of the network at the batch that did it, on stderr and in RUN/health.txt."""
        kept = self.folder / CHECKPOINT
        last = f"the last good checkpoint is {kept}" if kept.exists() else "there is no checkpoint yet"
        if self.rank == 0:
            from ..analysis.health import health

            report = str(health(self.model, error.images[:8]))
            write_text(self.folder / "health.txt", report + "\n")
            self.watch.say(report)
        text = f"{error}; {last}; {self.folder / 'health.txt'} tells where it began"
        return FloatingPointError(text)


def _leftovers(folder: Path) -> list[str]:
    """Takes away what a killed run left half written, and says so."""
    names = remove_leftovers(folder, (CONFIG, CHECKPOINT, LOG, "health.txt"))
    return [f"removed half-written files of a killed process: {', '.join(names)}"] if names else []


def resumed(folder: Path, changes: dict[str, Any]) -> Settings:
    """The settings of a run that goes on; ValueError for changes that would make it another run."""
    fixed = sorted(set(changes) - set(MACHINE))
    if fixed:
        raise ValueError(f"{', '.join(fixed)}: cannot change when a run goes on; {', '.join(MACHINE)} can")
    path = str(folder / CONFIG)
    found = read_toml(path)
    try:
        settings = Settings().merged(found)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    missing = [name for name, value in vars(settings).items() if name not in found and value is not None]
    if missing:  # the value that it has by default may not be the one that the run began with
        raise ValueError(f"{path}: not there, though the run began with them: {listed(missing)}")
    return settings.merged(changes)

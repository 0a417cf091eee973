# SPDX-License-Identifier: Apache-2.0
"""The engine of `vimcore train`: a run of any task, from its settings or on from its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..data.batches import evaluation_loader, grouped, training_loader
from ..data.picture_files import passed_over_text
from ..data.sampling import EpochSampler, derive_seed, seed_all
from ..tasks.task import Scores, Task
from ..utils import distributed
from ..utils.files import write_text
from .checkpoint import read_checkpoint
from .device import choose_device, peak_memory
from .ema import Ema
from .folder import BEST, CHECKPOINT, CONFIG, HEALTH, LAST, LAST_EMA, leftovers
from .lock import Lock
from .log import RunLog
from .loop import Loop, NonFiniteError
from .optimizer import create_optimizer
from .schedule import Schedule, described, peak_lr, warnings
from .signals import Signals, Stopped, Stuck, signals
from .state import State
from .track import chosen, open_trackers

Diagnose = Callable[[nn.Module, Any], str]  # of a model and the batch that broke it


def train(
    task: Task,
    folder: Path,
    resume: bool = False,
    notes: Sequence[str] = (),
    diagnose: Diagnose | None = None,
) -> dict[str, Any]:
    """A run from begin to end, alone or as one of the processes of torchrun.

    Args:
        notes: on the settings, to be told and recorded.
        diagnose: what is wrong with a network whose loss is not finite; goes to RUN/health.txt.

    Returns:
        The summary that `vimcore train --json` prints.

    Raises:
        ValueError, OSError: settings, data or files do not fit, or another process writes this run.
        NonFiniteError: a loss or gradient was not finite; the last checkpoint is as it was.
        Stopped: by a signal, after a checkpoint.
    """
    settings = task.settings
    device = choose_device(settings.device, settings.precision, distributed.local_rank())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    lock = Lock(folder)
    with distributed.process_group(device.type == "cuda"), signals() as stop:
        try:
            run = Run(task, folder, device, resume, notes, lock, stop)
            try:
                return run.run()
            except NonFiniteError as error:
                raise run.explained(error, diagnose) from None
            finally:
                run.log.close()
        except Stuck:
            stop.end()
            begun = folder if (folder / CHECKPOINT).exists() else None
            raise Stopped(stop.number, begun, stop.place) from None
        finally:
            lock.release()


class Run:
    """Data, network, optimizer and place in the schedule of a run."""

    def __init__(
        self,
        task: Task,
        folder: Path,
        device: torch.device,
        resume: bool,
        notes: Sequence[str],
        lock: Lock,
        stop: Signals,
    ) -> None:
        self.task, self.folder, self.device, self.stop = task, folder, device, stop
        self.rank, self.world = distributed.rank(), distributed.world()
        tracked = chosen(task.settings.track)
        if self.rank == 0 and (resume or (folder / lock.NAME).exists()):
            lock.take()  # before anything of the run is read
        if resume and not (folder / CHECKPOINT).exists():
            raise ValueError(f"{folder}: no {CHECKPOINT} yet; start the run again with --out {folder}")
        saved = read_checkpoint(folder / CHECKPOINT) if resume else None
        self._refuse_another(resume)

        self.data = data = task.data()
        self.settings = settings = task.settings
        self.precision: torch.dtype = getattr(torch, settings.precision)
        seed_all(derive_seed("weights", settings.seed))
        self.model, of_weights = task.build()
        self.model.to(device)
        count = len(data.train)  # type: ignore[arg-type]
        self.sampler = EpochSampler(
            count, settings.batch_size, self.rank, self.world, settings.seed, settings.repeats
        )
        self.per_update = settings.batch_size * settings.accumulate * self.world
        per_epoch = len(self.sampler) // settings.accumulate
        if per_epoch == 0:
            what = f"{count} images to learn from do not fill one update of {self.per_update}"
            raise ValueError(f"batch_size: {what}; lower it")
        self.updates = per_epoch * settings.epochs
        self.peak = peak_lr(settings, self.world)
        schedule = Schedule(settings, self.peak, per_epoch)
        optimizer = create_optimizer(self.model, settings, self.peak, task.layers())
        self.ema = Ema(self.model, settings.ema, settings.ema_ramp) if settings.ema else None
        self.loop = Loop(
            self._wrap_ddp(self.model),
            optimizer,
            schedule,
            task.loss,
            ema=self.ema,
            clip=settings.clip_grad,
            precision=self.precision,
        )
        identity = {"images": data.fingerprint, "per_update": self.per_update}
        self.state = State(self.model, optimizer, self.loop, self.ema, per_epoch, identity)
        self.errors: dict[str, str] = {}  # files that this process could not read
        if saved is not None:
            self.state.restore(folder, saved, settings, task.metrics)

        pin = device.type == "cuda"
        self.batches = training_loader(data.train, self.sampler, data.collate, settings.workers, pin)
        self.valid_batches = self._validation(pin)
        notes = [*notes, *warnings(settings, schedule, self.updates)]
        in_folder: list[str] = []  # told, but no part of the log, which the settings decide
        trackers = []
        stop.setting_up = False
        if self.rank == 0:
            lock.take()
            self._refuse_another(resume)  # another may have begun and ended meanwhile
            in_folder = [*lock.notes, *leftovers(folder)]
            write_text(folder / CONFIG, settings.to_toml())
            trackers = open_trackers(tracked, folder, vars(settings), self.loop.step)
        self.log = RunLog(
            folder,
            self.updates,
            self.loop.step,
            whole_epoch=self.state.done == 0,
            writes=self.rank == 0,
            resumed=resume,
            trackers=trackers,
        )
        self._log_setup(of_weights, notes, in_folder)

    # ---- setting up ----------------------------------------------------------------------------------------

    def _wrap_ddp(self, model: nn.Module) -> nn.Module:
        if self.world == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids)

    def _validation(self, pin: bool = False) -> Any:
        size = self.data.valid_batch_size or self.settings.batch_size
        return evaluation_loader(self.data.valid, size, self.data.collate, self.settings.workers, pin)

    def _refuse_another(self, resume: bool) -> None:
        if not resume and (self.folder / CHECKPOINT).exists():
            folder = self.folder
            raise ValueError(f"{folder}: holds a run; go on with --resume {folder}, or name another --out")

    def _log_setup(self, of_weights: list[str], notes: list[str], in_folder: list[str]) -> None:
        s = self.settings
        count = sum(p.numel() for p in self.model.parameters())
        text = [
            s.to_toml(),
            self.data.about,
            f"{count:,} parameters on {self.device}, {self.world} process{'es' if self.world > 1 else ''}, "
            f"{self.per_update} images an update, {self.state.updates_per_epoch} updates an epoch",
            described(s, self.per_update, self.peak),
            *of_weights,
        ]
        if self.data.passed_over:
            text.append(f"vimcore: {passed_over_text(self.data.passed_over)}")
        if self.loop.step:
            text.append(f"continued after update {self.loop.step} of {self.updates}")
        for line in [*text, *(f"vimcore: {note}" for note in [*notes, *in_folder])]:
            self.log.say(line)
        self.log.start(
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

    # ---- running -------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """To the end, or to a signal."""
        begin, first, state = time.perf_counter(), self.loop.step, self.state
        while state.epoch < self.settings.epochs:
            self._epoch()
            state.epoch, state.done = state.epoch + 1, 0
            self.log.errors(distributed.union(self.errors))
            if state.epoch % self.settings.eval_every == 0 or state.epoch == self.settings.epochs:
                self._validate()
            self._save()
            self._stop_if(self._stop_signal())
        seconds = time.perf_counter() - begin
        distributed.destroy_process_group()
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
        settings, state = self.settings, self.state
        self.model.train()
        self.sampler.set_epoch(state.epoch, state.done * settings.accumulate)
        clock, images = time.perf_counter(), 0
        for group in grouped(self.stop.waited(self.batches), settings.accumulate):
            if state.done == state.updates_per_epoch:
                break  # what is left over does not fill an update
            seed_all(derive_seed("update", settings.seed, self.loop.step, self.rank))
            batches = [self._prepare(batch) for batch in group]
            update = self.loop.update(batches)
            state.last = (batches[-1], update.lr)
            state.done += 1
            images += self.per_update
            step, memory = self.loop.step, peak_memory(self.device)
            rate = images / (time.perf_counter() - clock)
            self.log.step(state.epoch + 1, settings.epochs, update.loss, update.lr, rate, memory)
            last = state.done == state.updates_per_epoch
            if step % settings.log_every == 0 or last:
                self.log.record(
                    "step",
                    step=step,
                    epoch=round(step / state.updates_per_epoch, 6),
                    loss=update.loss,
                    **update.logged,
                    lr=update.lr,
                    images_per_second=round(rate, 3),
                    grad_norm=update.grad_norm,
                    memory=memory,
                )
                clock, images = time.perf_counter(), 0
            stop = self._stop_signal()
            if stop or last or step % settings.checkpoint_every == 0:  # validation may take long
                self._save()
            self._stop_if(stop)

    def _prepare(self, batch: Any) -> Any:
        self.errors |= batch.errors
        self.log.errors(batch.errors)
        return self.task.prepare(batch, self.device)

    def _stop_signal(self) -> int:
        """The signal to stop for, the same in all processes; 0: none."""
        mine = self.stop.number
        if self.world == 1:
            return mine
        count, total = distributed.sums([float(mine > 0), float(mine)])
        return round(total / count) if count else 0

    def _stop_if(self, number: int) -> None:
        if number and self.state.epoch < self.settings.epochs:
            raise Stopped(number, self.folder, f"after update {self.loop.step}")

    def _validate(self) -> None:
        found = {"raw": self._evaluate(self.model)}
        if self.ema is not None:
            found["ema"] = self._evaluate(self.ema.model)
            self._keep_best("ema", self.ema.model, found["ema"])
        self._keep_best("raw", self.model, found["raw"])
        self.log.errors(distributed.union(found["raw"].errors))
        epoch, step = self.state.epoch, self.loop.step
        for weights, scores in found.items():
            self.log.record("eval", epoch=epoch, step=step, **scores.values, weights=weights)
        line = ", ".join(f"{weights} {scores.text}" for weights, scores in found.items())
        self.log.say(f"epoch {epoch}/{self.settings.epochs}: validation {line}")

    def _evaluate(self, model: nn.Module) -> Scores:
        return self.task.evaluate(model, self.stop.waited(self.valid_batches), self.device, self.precision)

    # ---- files ---------------------------------------------------------------------------------------------

    def _keep_best(self, weights: str, model: nn.Module, scores: Scores) -> None:
        """Writes the model as the best so far, if it is."""
        metrics, state = self.task.metrics, self.state
        if state.improves(metrics[0], scores.values):
            figures = {metric.name: scores.values[metric.name] for metric in metrics}
            state.best = {**figures, "epoch": state.epoch, "weights": weights}
            if self.rank == 0:
                self.task.save(model, self.folder / BEST)

    def _save(self) -> None:
        """Checkpoint, then the last weights: all by the writing process, others go on.

        Raises:
            NonFiniteError: the weights are not worth keeping; the checkpoint stays as it was.
        """
        self.state.require_finite()
        if self.rank == 0:
            self.state.write(self.folder / CHECKPOINT)
            self.task.save(self.model, self.folder / LAST)
            if self.ema is not None:
                self.task.save(self.ema.model, self.folder / LAST_EMA)

    def _finish(self, seconds: float, steps: int) -> dict[str, Any]:
        """The task's report on the best weights; the summary."""
        best = self.task.load(self.folder / BEST, self.device)
        batches = self.stop.waited(self._validation())
        self.task.report(best, batches, self.device, self.precision, self.folder)
        return {
            "out": str(self.folder),
            "epochs": self.settings.epochs,
            "updates": self.loop.step,
            "best": self.state.best,
            "seconds": round(seconds, 2),
            "images_per_second": round(steps * self.per_update / seconds, 2),
            "skipped": len(self.log.skipped),
            **({"passed_over": self.data.passed_over} if self.data.passed_over else {}),
        }

    def explained(self, error: NonFiniteError, diagnose: Diagnose | None) -> FloatingPointError:
        """The error with where to look; what is wrong with the network, on stderr and in RUN/health.txt."""
        kept = self.folder / CHECKPOINT
        last = f"the last good checkpoint is {kept}" if kept.exists() else "there is no checkpoint yet"
        if diagnose is None:
            return FloatingPointError(f"{error}; {last}")
        if self.rank == 0:
            report = diagnose(self.model, error.batch)
            write_text(self.folder / HEALTH, report + "\n")
            self.log.say(report)
        return FloatingPointError(f"{error}; {last}; {self.folder / HEALTH} tells where it began")

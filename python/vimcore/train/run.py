# SPDX-License-Identifier: Apache-2.0
"""The engine of `vimcore train`: a run of any task, from its settings or on from its checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.batches import grouped
from ..data.sampling import derive_seed, seed_all
from ..tasks.task import Scores, Task
from ..utils import distributed
from ..utils.files import write_text
from .device import choose_device, peak_memory
from .folder import BEST, CHECKPOINT, HEALTH, LAST, LAST_EMA
from .lock import Lock
from .loop import NonFiniteError
from .setup import Setup
from .signals import Signals, Stopped, Stuck, signals

Diagnose = Callable[[nn.Module, Any], str]  # of a model and the batch that broke it


def train(
    task: Task,
    folder: Path,
    resume: bool = False,
    notes: Sequence[str] = (),
    diagnose: Diagnose | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """A run from begin to end, alone or as one of the processes of torchrun.

    Args:
        notes: on the settings, to be told and recorded.
        diagnose: what is wrong with a network whose loss is not finite; goes to RUN/health.txt.
        verbose: also print all settings.

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
            setup = Setup(task, folder, device, resume, notes, lock, stop, verbose)
            run = Run(task, setup, stop)
            try:
                return run.run()
            except NonFiniteError as error:
                raise run.explained(error, diagnose) from None
            finally:
                setup.log.close()
        except Stuck:
            stop.end()
            begun = folder if (folder / CHECKPOINT).exists() else None
            raise Stopped(stop.number, begun, stop.place) from None
        finally:
            lock.release()


class Run:
    """Goes through the updates of a run, evaluates, and writes its files."""

    def __init__(self, task: Task, setup: Setup, stop: Signals) -> None:
        self.task, self.setup, self.stop = task, setup, stop
        self.folder, self.device, self.settings = setup.folder, setup.device, setup.settings
        self.state, self.loop, self.log = setup.state, setup.state.loop, setup.log
        self.precision = self.loop.precision
        self.errors: dict[str, str] = {}  # files that this process could not read

    def run(self) -> dict[str, Any]:
        """To the end, or to a signal."""
        begin, first, state = time.perf_counter(), self.loop.step, self.state
        while state.epoch < self.settings.epochs:
            self._epoch()
            state.epoch, state.done = state.epoch + 1, 0
            self.log.errors(distributed.union(self.errors))
            if self._is_validated(state.epoch):
                self._validate()
            self._save()
            self._stop_if(self._stop_signal())
        seconds = time.perf_counter() - begin
        distributed.destroy_process_group()
        return self._finish(seconds, self.loop.step - first) if self.setup.rank == 0 else {}

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
        self.state.model.train()
        self.setup.sampler.set_epoch(state.epoch, state.done * settings.accumulate)
        clock, images = time.perf_counter(), 0
        for group in grouped(self.stop.waited(self.setup.batches), settings.accumulate):
            if state.done == state.to_do:
                break  # what is left over does not fill an update
            seed_all(derive_seed("update", settings.seed, self.loop.step, self.setup.rank))
            batches = [self._prepare(batch) for batch in group]
            update = self.loop.update(batches)
            state.last = (batches[-1], update.lr)
            state.done += 1
            images += self.setup.per_update
            step, memory = self.loop.step, peak_memory(self.device)
            rate = images / (time.perf_counter() - clock)
            last = state.done == state.to_do
            logged = step % settings.log_every == 0 or last
            self.log.step(state.epoch + 1, settings.epochs, update.loss, update.lr, rate, memory, logged)
            if logged:
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
            validates = last and self._is_validated(state.epoch + 1)  # which may take long
            if stop or validates or step % settings.checkpoint_every == 0:
                self._save()
            self._stop_if(stop)

    def _prepare(self, batch: Any) -> Any:
        self.errors |= batch.errors
        self.log.errors(batch.errors)
        return self.task.prepare(batch, self.device)

    def _stop_signal(self) -> int:
        """The signal to stop for, the same in all processes; 0: none."""
        mine = self.stop.number
        if self.setup.world == 1:
            return mine
        count, total = distributed.sums([float(mine > 0), float(mine)])
        return round(total / count) if count else 0

    def _stop_if(self, number: int) -> None:
        if number and self.state.epoch < self.settings.epochs:
            raise Stopped(number, self.folder, f"after update {self.loop.step}")

    def _is_validated(self, epoch: int) -> bool:
        """Whether so many epochs are followed by a validation."""
        return epoch % self.settings.eval_every == 0 or epoch == self.settings.epochs

    def _validate(self) -> None:
        found = {"raw": self._evaluate(self.state.model)}
        if self.state.ema is not None:
            found["ema"] = self._evaluate(self.state.ema.model)
            self._keep_best("ema", self.state.ema.model, found["ema"])
        self._keep_best("raw", self.state.model, found["raw"])
        self.log.errors(distributed.union(found["raw"].errors))
        epoch, step = self.state.epoch, self.loop.step
        for weights, scores in found.items():
            self.log.record("eval", epoch=epoch, step=step, **scores.values, weights=weights)
        line = ", ".join(f"{weights} {scores.text}" for weights, scores in found.items())
        self.log.say(f"epoch {epoch}/{self.settings.epochs}: validation {line}")

    def _evaluate(self, model: nn.Module) -> Scores:
        return self.task.evaluate(
            model, self.stop.waited(self.setup.valid_batches), self.device, self.precision
        )

    # ---- files ---------------------------------------------------------------------------------------------

    def _keep_best(self, weights: str, model: nn.Module, scores: Scores) -> None:
        """Writes the model as the best so far, if it is."""
        metrics, state = self.task.metrics, self.state
        if state.improves(metrics[0], scores.values):
            figures = {metric.name: scores.values[metric.name] for metric in metrics}
            state.best = {**figures, "epoch": state.epoch, "weights": weights}
            if self.setup.rank == 0:
                self.task.save(model, self.folder / BEST)

    def _save(self) -> None:
        """Checkpoint, then the last weights: all by the writing process, others go on.

        Raises:
            NonFiniteError: the weights are not worth keeping; the checkpoint stays as it was.
        """
        self.state.require_finite()
        if self.setup.rank == 0:
            self.state.write(self.folder / CHECKPOINT)
            self.task.save(self.state.model, self.folder / LAST)
            if self.state.ema is not None:
                self.task.save(self.state.ema.model, self.folder / LAST_EMA)

    def _finish(self, seconds: float, steps: int) -> dict[str, Any]:
        """The task's report on the best weights; the summary."""
        best = self.task.load(self.folder / BEST, self.device)
        batches = self.stop.waited(self.setup.validation())
        self.task.report(best, batches, self.device, self.precision, self.folder)
        return {
            "out": str(self.folder),
            "epochs": self.settings.epochs,
            "updates": self.loop.step,
            "best": self.state.best,
            "seconds": round(seconds, 2),
            "images_per_second": round(steps * self.setup.per_update / seconds, 2),
            "skipped": len(self.log.skipped),
            **({"passed_over": self.setup.data.passed_over} if self.setup.data.passed_over else {}),
        }

    def explained(self, error: NonFiniteError, diagnose: Diagnose | None) -> FloatingPointError:
        """The error with where to look; what is wrong with the network, on stderr and in RUN/health.txt."""
        kept = self.folder / CHECKPOINT
        last = f"the last good checkpoint is {kept}" if kept.exists() else "there is no checkpoint yet"
        if diagnose is None:
            return FloatingPointError(f"{error}; {last}")
        if self.setup.rank == 0:
            report = diagnose(self.state.model, error.batch)
            write_text(self.folder / HEALTH, report + "\n")
            self.log.say(report)
        return FloatingPointError(f"{error}; {last}; {self.folder / HEALTH} tells where it began")

# SPDX-License-Identifier: Apache-2.0
"""What a run changes as it goes, to a checkpoint and back: weights, averages, optimizer, its place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..tasks.settings import Settings
from ..tasks.task import Metric
from .checkpoint import write_checkpoint
from .ema import Ema
from .folder import BEST, CHECKPOINT
from .loop import Loop, NonFiniteError
from .restore import Expected, check, cut_short


class State:
    """Of a run.

    Args:
        identity: what a run that goes on must have in common with the one that began.

    Attributes:
        epoch, done: epochs finished; updates of the current one.
        updates: of the whole run, whose last epoch may be a part of one.
        best: of the best weights, their metrics, epoch and kind.
        last: batch and learning rate of the last update.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loop: Loop,
        ema: Ema | None,
        updates_per_epoch: int,
        updates: int,
        identity: Mapping[str, Any],
    ) -> None:
        self.model, self.optimizer, self.loop, self.ema = model, optimizer, loop, ema
        self.updates_per_epoch, self.updates, self.identity = updates_per_epoch, updates, identity
        self.epoch, self.done = 0, 0
        self.best: dict[str, Any] = {}
        self.last: tuple[Any, float] = (None, 0.0)

    @property
    def to_do(self) -> int:
        """Updates of the current epoch."""
        return min(self.updates_per_epoch, self.updates - self.epoch * self.updates_per_epoch)

    def write(self, path: Path) -> None:
        """The checkpoint."""
        content = {
            "model": self.model.state_dict(),
            "average": None if self.ema is None else self.ema.values,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.loop.scaler.state_dict(),
            "step": self.loop.step,
            "epoch": self.epoch,
            "done": self.done,
            "best": self.best,
            "identity": dict(self.identity),
        }
        write_checkpoint(path, content)

    def restore(
        self, folder: Path, saved: dict[str, Any], settings: Settings, metrics: Sequence[Metric]
    ) -> None:
        """Takes over a checkpoint; ValueError names what in it is not of this run."""
        expected = Expected(
            model=self.model.state_dict(),
            average=None if self.ema is None else self.ema.values,
            optimizer=self.optimizer.state_dict(),
            scaler=self.loop.scaler.state_dict(),
            parameters=[p for group in self.optimizer.param_groups for p in group["params"]],
            epochs=settings.epochs,
            updates=self.updates,
            updates_per_epoch=self.updates_per_epoch,
            identity=self.identity,
            metrics=metrics,
            by_updates=settings.updates is not None,
            adamw=type(self.optimizer) is torch.optim.AdamW,
        )
        check(folder / CHECKPOINT, saved, expected)
        if saved["best"] and not (folder / BEST).is_file():
            raise ValueError(f"{folder / BEST}: not there, but the checkpoint names it as the best")
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.loop.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            self.ema.load(saved["average"])
        self.loop.step = saved["step"]
        self.epoch, self.done, self.best = saved["epoch"], saved["done"], saved["best"]
        if self.loop.step < self.updates and cut_short(saved, self.updates_per_epoch):
            self.epoch, self.done = divmod(self.loop.step, self.updates_per_epoch)

    def improves(self, metric: Metric, values: Mapping[str, float]) -> bool:
        """Whether these scores are the best so far; equal ones are not."""
        return not self.best or metric.improves(values[metric.name], self.best[metric.name])

    def require_finite(self) -> None:
        """Raises NonFiniteError where the weights are not worth keeping."""
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            batch, lr = self.last
            raise NonFiniteError("largest weight", math.inf, self.loop.step - 1, lr, batch)

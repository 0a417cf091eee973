# SPDX-License-Identifier: Apache-2.0
"""Averaged weights, by torch's AveragedModel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Ema:
    """Exponential moving average of a model's weights, which starts from them; buffers are the model's.

    Args:
        decay: how much of it stays at each update.
        ramp: let a young average, mostly initial weights, forget faster: its decay grows with the updates.
    """

    def __init__(self, model: nn.Module, decay: float, ramp: bool = False) -> None:
        self.source, self.decay, self.ramp = model, decay, ramp
        self.average = AveragedModel(model, multi_avg_fn=self._take_in)
        self.step = 0

    @property
    def model(self) -> nn.Module:
        """The model with the averaged weights."""
        return self.average.module

    @property
    def values(self) -> list[Tensor]:
        """The averaged weights, those that are trained."""
        return [p.detach() for p in self.model.parameters() if p.requires_grad]

    def update(self, step: int) -> None:
        """Takes in the weights that update number `step`, from 0, has made."""
        self.step = step
        self.average.n_averaged.fill_(step + 1)  # at 0 torch would take the weights as they are
        self.average.update_parameters(self.source)

    def _take_in(self, values: Sequence[Tensor], weights: Sequence[Tensor], _: Tensor | int) -> None:
        decay = min(self.decay, (1 + self.step) / (10 + self.step)) if self.ramp else self.decay
        get_ema_multi_avg_fn(decay)(values, weights, 0)

    @torch.no_grad()
    def load(self, values: Sequence[Tensor]) -> None:
        """Goes on from these averaged weights."""
        for value, kept in zip(self.values, values):
            value.copy_(kept)
        for own, buffer in zip(self.model.buffers(), self.source.buffers()):
            own.copy_(buffer)

    @torch.no_grad()
    def write(self) -> None:
        """Leaves the average in the source."""
        for parameter, value in zip(self.source.parameters(), self.model.parameters()):
            parameter.copy_(value)

# SPDX-License-Identifier: Apache-2.0
"""One update of the weights, for any loss: accumulation, clipping, precision, the check for nan."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..utils.distributed import mean
from .ema import Ema

Loss = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Tensor]]]  # a scalar, and more scalars to log


class NonFiniteError(FloatingPointError):
    """Loss or gradient is inf or nan; the weights are still those of the update before.

    Attributes:
        step: updates made before.
        batch: the one that did it.
    """

    def __init__(self, what: str, value: float, step: int, lr: float, batch: Any) -> None:
        super().__init__(f"the {what} is {value} in update {step + 1}, at a learning rate of {lr:.3g}")
        self.what, self.value, self.lr, self.step, self.batch = what, value, lr, step, batch

    @property
    def images(self) -> Tensor:
        """Those of the batch."""
        found: Tensor = self.batch.images if hasattr(self.batch, "images") else self.batch[0]
        return found


@dataclass(frozen=True)
class Update:
    """What one update saw: mean loss, learning rate, norm of the gradient, means of what the loss logs."""

    loss: float
    lr: float
    grad_norm: float
    logged: dict[str, float] = field(default_factory=dict)


class Loop:
    """Makes updates.

    Args:
        model: maybe wrapped in DistributedDataParallel.
        lr: learning rate of update 0, 1, ...; a parameter group may scale it by its `lr_scale`.
        loss: of model and batch.
        constrain: keeps weights in their range after an update.
        clip: largest norm of the gradient.
        precision: type of activations under autocast; float16, on CUDA, brings a gradient scaler.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr: Callable[[int], float],
        loss: Loss,
        *,
        ema: Ema | None = None,
        clip: float | None = None,
        precision: torch.dtype = torch.float32,
        constrain: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.optimizer, self.lr, self.loss, self.ema = model, optimizer, lr, loss, ema
        self.clip = math.inf if clip is None else clip
        self.precision, self.constrain = precision, constrain
        self.scaler = torch.amp.GradScaler("cuda", enabled=precision == torch.float16)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.step = 0

    def update(self, batches: Sequence[Any]) -> Update:
        """One update from one or several batches of equal size, each a forward and backward pass.

        Raises:
            NonFiniteError: before anything was changed.
        """
        lr = self.lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        total, logged = 0.0, Counter[str]()
        for i, batch in enumerate(batches):
            with self._no_exchange() if i + 1 < len(batches) else contextlib.nullcontext():
                with torch.autocast(self.device.type, self.precision, self.precision != torch.float32):
                    loss, further = self.loss(self.model, batch)
                value = mean(loss.item())  # of all processes: they stop together
                if not math.isfinite(value):
                    raise NonFiniteError("loss", value, self.step, lr, batch)
                self.scaler.scale(loss / len(batches)).backward()
            total += value
            logged.update({name: mean(scalar.item()) for name, scalar in further.items()})
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        if not math.isfinite(norm) and not self.scaler.is_enabled():  # a scaler leaves such an update out
            raise NonFiniteError("gradient's norm", norm, self.step, lr, batches[-1])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.constrain is not None:
            self.constrain()
        if self.ema is not None:
            self.ema.update(self.step)
        self.step += 1
        means = {name: value / len(batches) for name, value in logged.items()}
        return Update(total / len(batches), lr, norm, means)

    def _clip(self) -> float:
        """Norm of the gradient before it was shortened."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(torch.stack(torch._foreach_norm(grads)).norm())
        if norm > self.clip:
            torch._foreach_mul_(grads, self.clip / norm)
        return norm

    def _no_exchange(self) -> contextlib.AbstractContextManager[None]:
        model = self.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()

# SPDX-License-Identifier: Apache-2.0
"""One update of the weights, and what it needs: parameter groups, averaged weights, the check for nan."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..utils.distributed import mean

Batch = tuple[Tensor, Tensor]  # images (B, C, H, W); class indices (B,) int64 or class shares (B, classes)


class NonFiniteError(FloatingPointError):
    """Loss or gradient is inf or nan; the weights are still those of the update before.

    Attributes:
        step: updates made before.
        images: the batch that did it.
    """

    def __init__(self, what: str, value: float, step: int, lr: float, images: Tensor) -> None:
        super().__init__(f"the {what} is {value} in update {step + 1}, at a learning rate of {lr:.3g}")
        self.what, self.value, self.lr, self.step, self.images = what, value, lr, step, images


@dataclass(frozen=True)
class Update:
    """What one update saw: mean loss, learning rate, norm of the gradient, right answers (hard targets)."""

    loss: float
    lr: float
    grad_norm: float
    right: int


def parameter_groups(
    model: nn.Module, weight_decay: float, decay: str = "authors"
) -> list[dict[str, object]]:
    """Two AdamW groups: with decay and without.

    Never decayed: tensors of one dimension, biases, and what ``model.no_weight_decay()`` names (tokens,
    position table). decay="authors" decays A_log like any matrix, as the published training did; "mamba"
    exempts A_log and A_b_log.
    """
    if decay not in ("authors", "mamba"):
        raise ValueError(f"decay: expected 'authors' or 'mamba', got {decay!r}")
    named: Callable[[], Iterable[str]] = getattr(model, "no_weight_decay", tuple)
    exempt = set(named())
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = name.rsplit(".", 1)[-1]
        is_log = decay == "mamba" and leaf in ("A_log", "A_b_log")
        if parameter.ndim <= 1 or leaf == "bias" or name in exempt or is_log:
            free.append(parameter)
        else:
            decayed.append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


class Average:
    """Running average of a model's weights.

    Args:
        decay: how much of it stays at each update.
        ramp: let a young average, mostly initial weights, forget faster: its decay grows with the updates.
    """

    def __init__(self, model: nn.Module, decay: float, ramp: bool = False) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.values = [p.detach().clone() for p in self.parameters]
        self.decay, self.ramp = decay, ramp

    def update(self, step: int) -> None:
        """Takes in the weights that update number ``step``, from 0, has made."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.ramp else self.decay
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """While the context lasts, the model holds the average."""
        kept = [p.detach().clone() for p in self.parameters]
        self.write()
        try:
            yield
        finally:
            self._copy(kept)

    def write(self) -> None:
        """Leaves the average in the model."""
        self._copy(self.values)

    @torch.no_grad()
    def _copy(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)


class Loop:
    """Makes updates.

    Args:
        model: maybe wrapped in DistributedDataParallel.
        lr: learning rate of update 0, 1, ...
        clip: largest norm of the gradient.
        precision: type of activations under autocast on CUDA; float16 brings a gradient scaler.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr: Callable[[int], float],
        *,
        label_smoothing: float = 0.0,
        average: Average | None = None,
        clip: float | None = None,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.optimizer, self.lr = model, optimizer, lr
        self.label_smoothing, self.average = label_smoothing, average
        self.clip = math.inf if clip is None else clip
        self.precision = precision
        self.scaler = torch.amp.GradScaler("cuda", enabled=precision == torch.float16)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.step = 0

    def update(self, batches: Sequence[Batch]) -> Update:
        """One update from one or several batches of equal size, each a forward and backward pass.

        Raises:
            NonFiniteError: before anything was changed.
        """
        lr = self.lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        total, right = 0.0, 0
        for i, (images, target) in enumerate(batches):
            with self._no_exchange() if i + 1 < len(batches) else contextlib.nullcontext():
                with torch.autocast(images.device.type, self.precision, self.precision != torch.float32):
                    logits = self.model(images)
                    loss = self._loss(logits, target)
                value = mean(loss.item())  # of all processes: they stop together
                if not math.isfinite(value):
                    raise NonFiniteError("loss", value, self.step, lr, images)
                self.scaler.scale(loss / len(batches)).backward()
            total += value
            if target.ndim == 1:
                right += int((logits.detach().argmax(1) == target).sum())
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        if not math.isfinite(norm) and not self.scaler.is_enabled():  # a scaler leaves such an update out
            raise NonFiniteError("gradient's norm", norm, self.step, lr, batches[-1][0])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.step)
        self.step += 1
        return Update(total / len(batches), lr, norm, right)

    def _clip(self) -> float:
        """Norm of the gradient before it was shortened."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = float(torch.stack(torch._foreach_norm(grads)).norm())
        if norm > self.clip:
            torch._foreach_mul_(grads, self.clip / norm)
        return norm

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        smoothing = self.label_smoothing if target.ndim == 1 else 0.0  # shares are smoothed already
        return F.cross_entropy(logits, target, label_smoothing=smoothing)

    def _no_exchange(self) -> contextlib.AbstractContextManager[None]:
        model = self.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()

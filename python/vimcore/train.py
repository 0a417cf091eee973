# SPDX-License-Identifier: Apache-2.0
"""A small training loop for classification: AdamW, cosine with warm-up, averaged weights, progress bar."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

Data = tuple[torch.Tensor, torch.Tensor]  # images (N, C, H, W) float32 and labels (N,) int64
Augment = Callable[[torch.Tensor, torch.Generator], torch.Tensor]


@dataclass
class History:
    """What happened, one entry per epoch in each list; ``seconds`` for the whole run."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    valid_loss: list[float] = field(default_factory=list)
    valid_accuracy: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy and share of right answers; logits (N, classes) of every image."""

    loss: float
    accuracy: float
    logits: torch.Tensor


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


def cosine_lr(step: int, steps: int, warmup_steps: int, lr: float, min_lr: float) -> float:
    """Learning rate of step 0 .. steps - 1: linear warm-up to ``lr``, then a cosine down to ``min_lr``."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, batch_size: int = 128) -> Evaluation:
    """Loss and accuracy of ``model`` in eval mode on ``data``; its mode is restored afterwards."""
    images, labels = data
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(
            f"[evaluate] data: expected as many labels as images, got {len(images)} and {len(labels)}"
        )
    was_training = model.training
    model.eval()
    try:
        logits = torch.cat([model(images[i : i + batch_size]) for i in range(0, len(images), batch_size)])
    finally:
        model.train(was_training)
    loss = F.cross_entropy(logits.double(), labels).item()
    return Evaluation(loss, (logits.argmax(1) == labels).double().mean().item(), logits)


def fit(
    model: nn.Module,
    train: Data,
    valid: Data | None = None,
    *,
    epochs: int,
    batch_size: int = 64,
    lr: float = 1e-3,
    min_lr: float = 1e-5,
    weight_decay: float = 0.05,
    warmup: float = 5,
    seed: int = 0,
    label_smoothing: float = 0.0,
    ema: float | None = None,
    augment: Augment | None = None,
    decay: str = "authors",
    progress: bool = True,
) -> History:
    """Trains ``model`` in place and leaves it in eval mode.

    The same seed gives the same weights bit for bit, whatever the number of threads: shuffling and
    augmentation draw from a generator of their own, dropout and drop path from torch's, which is seeded here
    and put back afterwards.

    Args:
        train, valid: images (N, C, H, W) float32 as the network takes them, and labels (N,) int64.
        epochs, warmup: passes over the training images; the first ``warmup`` of them raise the learning rate.
        ema: decay of a running average of the weights; the average is what is validated and left in the
            model.
        augment: changes a batch of images, drawing only from the generator it is given.
        decay: "authors" or "mamba", see :func:`parameter_groups`.
        progress: a bar with loss and accuracy on stderr.

    Raises:
        ValueError: an option or shape is out of range.
        FloatingPointError: the loss stopped being finite; names epoch and step.
    """
    images, labels = train
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"[fit] epochs and batch_size: expected at least 1, got {epochs} and {batch_size}")
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(
            f"[fit] train: expected as many labels as images, got {len(images)} and {len(labels)}"
        )
    if ema is not None and not 0.0 <= ema < 1.0:
        raise ValueError(f"[fit] ema: expected 0 <= ema < 1 or None, got {ema}")
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay, decay), lr=lr)
    steps_per_epoch = math.ceil(len(images) / batch_size)
    steps = epochs * steps_per_epoch
    warmup_steps = min(round(warmup * steps_per_epoch), steps)
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    average = None if ema is None else [p.detach().clone() for p in parameters]
    history = History()
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]), _progress_bar(steps, progress) as bar:
        torch.manual_seed(seed)
        step = 0
        for epoch in range(epochs):
            model.train()
            order = torch.randperm(len(images), generator=generator)
            total, right = 0.0, 0
            for begin in range(0, len(images), batch_size):
                index = order[begin : begin + batch_size]
                batch, target = images[index], labels[index]
                if augment is not None:
                    batch = augment(batch, generator)
                rate = cosine_lr(step, steps, warmup_steps, lr, min_lr)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                logits = model(batch)
                loss = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"[fit] the loss is {value} in epoch {epoch + 1}, step {step + 1} of {steps}, "
                        f"at a learning rate of {rate:.3g}; a lower one or a longer warm-up usually helps"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                if average is not None and ema is not None:
                    # A young average would mostly hold the initial weights: its decay grows with the steps
                    # taken.
                    torch._foreach_lerp_(
                        average, [p.detach() for p in parameters], 1 - min(ema, (1 + step) / (10 + step))
                    )
                total += value * len(index)
                right += int((logits.detach().argmax(1) == target).sum())
                step += 1
                bar.update(epoch + 1, epochs, value, None)
            history.loss.append(total / len(images))
            history.accuracy.append(right / len(images))
            history.lr.append(rate)
            if valid is not None:
                with _swapped(parameters, average):
                    result = evaluate(model, valid)
                history.valid_loss.append(result.loss)
                history.valid_accuracy.append(result.accuracy)
            bar.update(
                epoch + 1, epochs, total / len(images), (history.valid_accuracy or history.accuracy)[-1], 0
            )
    if average is not None:
        with torch.no_grad():
            for parameter, mean in zip(parameters, average):
                parameter.copy_(mean)
    model.eval()
    history.seconds = time.perf_counter() - start
    return history


class _swapped:
    """While the context lasts, the parameters hold the averaged weights (where there are any)."""

    def __init__(self, parameters: list[nn.Parameter], average: list[torch.Tensor] | None) -> None:
        self.parameters, self.average = parameters, average

    def __enter__(self) -> None:
        if self.average is not None:
            self.kept = [p.detach().clone() for p in self.parameters]
            self._write(self.average)

    def __exit__(self, *_: object) -> None:
        if self.average is not None:
            self._write(self.kept)

    @torch.no_grad()
    def _write(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)


class _progress_bar:
    """tqdm on stderr, or nothing."""

    def __init__(self, steps: int, enabled: bool) -> None:
        self.bar = None
        self.accuracy = ""
        if enabled:
            from tqdm import tqdm

            self.bar = tqdm(total=steps, unit="step", dynamic_ncols=True, mininterval=0.2, leave=True)

    def __enter__(self) -> _progress_bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, epoch: int, epochs: int, loss: float, accuracy: float | None, steps: int = 1) -> None:
        if self.bar is None:
            return
        if accuracy is not None:
            self.accuracy = f", accuracy {100 * accuracy:.1f} %"
        self.bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
        self.bar.set_postfix_str(f"loss {loss:.3f}{self.accuracy}", refresh=steps == 0)
        self.bar.update(steps)

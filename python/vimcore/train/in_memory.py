# SPDX-License-Identifier: Apache-2.0
"""`fit`, the engine's loop for a classifier and images in memory: AdamW, cosine, averages, progress bar."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..tasks.classification.evaluation import cross_entropy, logits_of
from ..utils.precision import check_precision
from .ema import Ema
from .loop import Loop, NonFiniteError
from .optimizer import parameter_groups
from .schedule import bounded_warmup, cosine_lr

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


def _tensors(what: str, data: Any) -> Data:
    """Images and labels as tensors.

    Raises:
        ValueError: they are something else.
    """
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise ValueError(
            f"{what}: expected images and labels, got {type(data).__name__}; a folder or a loader is read by "
            "`vimcore train`, or by a loop of your own"
        )
    images, labels = (torch.as_tensor(part) for part in data)
    if not images.is_floating_point() or labels.is_floating_point() or labels.ndim != 1:
        raise ValueError(
            f"{what}: expected normalised images (N, C, H, W) of a floating-point type and labels (N,) of an "
            f"integer one, got {tuple(images.shape)} {images.dtype} and {tuple(labels.shape)} {labels.dtype}"
        )
    return images, labels.long()


def evaluate(model: nn.Module, data: Data, batch_size: int = 128, precision: str = "float32") -> Evaluation:
    """Loss and accuracy of ``model`` in eval mode on ``data``; its mode is restored afterwards.

    Args:
        precision: type of activations, "float32", "bfloat16" or, on CUDA, "float16".
    """
    images, labels = data = _tensors("[evaluate] data", data)
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(
            f"[evaluate] data: expected as many labels as images, got {len(images)} and {len(labels)}"
        )
    check_precision("[evaluate] precision", precision, images.device.type)
    logits = torch.cat(list(logits_of(model, images.split(batch_size), getattr(torch, precision))))
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
    warmup: float | None = None,
    seed: int = 0,
    label_smoothing: float = 0.0,
    ema: float | None = None,
    augment: Augment | None = None,
    decay: str = "authors",
    progress: bool = True,
    precision: str = "float32",
) -> History:
    """Trains ``model`` in place and leaves it in eval mode.

    The same seed gives the same weights bit for bit, whatever the number of threads: shuffling and
    augmentation draw from a generator of their own, dropout and drop path from torch's, which is seeded here
    and put back afterwards.

    Args:
        train, valid: images (N, C, H, W) float32 as the network takes them, and labels (N,) integers; tensors
            or NumPy arrays.
        epochs, warmup: passes over the training images; the first ``warmup`` of them raise the learning rate
            (default: 5, at most a tenth of ``epochs``).
        ema: decay of a running average of the weights; the average is what is validated and left in the
            model.
        augment: changes a batch of images, drawing only from the generator it is given.
        decay: "authors" or "mamba", see :func:`parameter_groups`.
        progress: a bar with loss and accuracy on stderr.
        precision: type of activations, "float32", "bfloat16" or, on CUDA, "float16"; weights, their gradients
            and the optimizer stay in float32.

    Raises:
        ValueError: an option or shape is out of range.
        FloatingPointError: the loss stopped being finite; names epoch and step.
        vimcore.Error: this CPU has no unit for bfloat16.
    """
    images, labels = train = _tensors("[fit] train", train)
    if valid is not None:
        valid = _tensors("[fit] valid", valid)
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"[fit] epochs and batch_size: expected at least 1, got {epochs} and {batch_size}")
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(
            f"[fit] train: expected as many labels as images, got {len(images)} and {len(labels)}"
        )
    if ema is not None and not 0.0 <= ema < 1.0:
        raise ValueError(f"[fit] ema: expected 0 <= ema < 1 or None, got {ema}")
    if warmup is None:
        warmup = bounded_warmup(5, epochs)
    if not 0 <= warmup < math.inf:
        raise ValueError(f"[fit] warmup: expected 0 or more epochs, got {warmup}")
    if warmup > epochs:
        warnings.warn(
            f"[fit] warmup: {warmup:g} epochs do not fit into {epochs}: the learning rate rises to the end",
            stacklevel=2,
        )
    check_precision("[fit] precision", precision, images.device.type)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay, decay), lr=lr)
    steps_per_epoch = math.ceil(len(images) / batch_size)
    steps = epochs * steps_per_epoch
    warmup_steps = min(round(warmup * steps_per_epoch), steps)
    generator = torch.Generator().manual_seed(seed)
    average = None if ema is None else Ema(model, ema, ramp=True)

    def loss(model: nn.Module, batch: Data) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        images, target = batch
        logits = model(images)
        right = (logits.detach().argmax(1) == target).sum()
        return cross_entropy(logits, target, label_smoothing), {"right": right}

    def rate(step: int) -> float:
        return cosine_lr(step, steps, warmup_steps, lr, min_lr)

    loop = Loop(model, optimizer, rate, loss, ema=average, precision=getattr(torch, precision))
    history = History()
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]), _progress_bar(steps, progress) as bar:
        torch.manual_seed(seed)
        for epoch in range(epochs):
            model.train()
            order = torch.randperm(len(images), generator=generator)
            total, right = 0.0, 0
            for begin in range(0, len(images), batch_size):
                index = order[begin : begin + batch_size]
                batch, target = images[index], labels[index]
                if augment is not None:
                    batch = augment(batch, generator)
                try:
                    update = loop.update([(batch, target)])
                except NonFiniteError as error:
                    raise FloatingPointError(
                        f"[fit] the {error.what} is {error.value} in epoch {epoch + 1}, "
                        f"step {error.step + 1} of {steps}, at a learning rate of {error.lr:.3g}; "
                        "a lower one or a longer warm-up usually helps"
                    ) from None
                total += update.loss * len(index)
                right += round(update.logged["right"])
                bar.update(epoch + 1, epochs, update.loss, None)
            history.loss.append(total / len(images))
            history.accuracy.append(right / len(images))
            history.lr.append(update.lr)
            if valid is not None:
                result = evaluate(model if average is None else average.model, valid, precision=precision)
                history.valid_loss.append(result.loss)
                history.valid_accuracy.append(result.accuracy)
            bar.update(
                epoch + 1, epochs, total / len(images), (history.valid_accuracy or history.accuracy)[-1], 0
            )
    if average is not None:
        average.write()
    model.eval()
    history.seconds = time.perf_counter() - start
    return history


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

# SPDX-License-Identifier: Apache-2.0
"""Loss, top-1 and top-5 of a classifier, and its predictions image by image. Needs torch alone."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ...utils.distributed import sums


class Labelled(Protocol):
    """Images (B, C, H, W), classes (B,), places (B,) in the data set; place -1: could not be read."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    errors: dict[str, str]


@dataclass(frozen=True)
class Accuracy:
    """Mean cross-entropy, shares of right predictions, images that counted; files that could not be read."""

    loss: float
    top1: float
    top5: float
    images: int
    errors: dict[str, str]


@dataclass(frozen=True)
class Outputs:
    """Of every image that could be read.

    Attributes:
        labels, indices: (N,) true class, place in the data set.
        probabilities: (N, classes) float32.
        loss: (N,) cross-entropy of each.
        errors: files that could not be read.
    """

    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    loss: NDArray[np.float64]
    seconds: float
    errors: dict[str, str]

    def accuracy(self) -> Accuracy:
        """The figures over all images."""
        ranks = ranks_of(torch.from_numpy(self.probabilities), torch.from_numpy(self.labels)).numpy()
        shares = float((ranks < 1).mean()), float((ranks < 5).mean())
        return Accuracy(float(self.loss.mean()), *shares, len(self.labels), self.errors)


def ranks_of(scores: Tensor, labels: Tensor) -> Tensor:
    """(N,) how many classes come before the true one, those of equal score in order; nan is before all."""
    own = scores.gather(1, labels[:, None])
    before = torch.arange(scores.shape[1], device=scores.device)[None] < labels[:, None]
    return (~(scores <= own) | ((scores == own) & before)).sum(1)


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    """Mean over a batch.

    Args:
        target: classes (B,), or shares of them (B, classes), as mixup leaves them: smoothed already.
        label_smoothing: share of the target spread over all classes.
    """
    return F.cross_entropy(logits, target, label_smoothing=label_smoothing if target.ndim == 1 else 0.0)


def logits_of(
    model: nn.Module, batches: Iterable[Tensor], precision: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    """Logits (B, classes) of batches of images, in eval mode; the model's mode is restored afterwards.

    Args:
        precision: of autocast; float32: none. Logits are float32 or wider anyway: losses are sums of them.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for images in batches:
                with torch.autocast(images.device.type, precision, precision != torch.float32):
                    logits = model(images) if len(images) else images.new_zeros(0, 1)
                yield logits.float() if logits.itemsize < 4 else logits
    finally:
        model.train(was_training)


def accuracy(
    model: nn.Module,
    batches: Iterable[Labelled],
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> Accuracy:
    """Over the shares of all processes; the errors are those of this one's."""
    found = [0.0, 0.0, 0.0, 0.0]  # images, loss, top-1, top-5
    errors: dict[str, str] = {}
    for labels, _, logits in _readable(model, batches, device, precision, errors):
        labels = labels.to(device)
        ranks = ranks_of(logits, labels)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        figures = torch.stack([loss, (ranks < 1).sum().double(), (ranks < 5).sum().double()])
        found = [a + b for a, b in zip(found, [float(len(labels)), *figures.tolist()])]
    count, *rest = sums(found)
    if not count:
        raise RuntimeError("none of the images to validate on could be read")
    loss_mean, top1, top5 = (value / count for value in rest)
    return Accuracy(loss_mean, top1, top5, int(count), errors)


def outputs(
    model: nn.Module,
    batches: Iterable[Labelled],
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> Outputs:
    """Image by image, kept."""
    labels, indices, probabilities, losses = [], [], [], []
    errors: dict[str, str] = {}
    seconds, begin = 0.0, time.perf_counter()
    for truth, index, logits in _readable(model, batches, device, precision, errors):
        labels.append(truth.numpy())
        indices.append(index.numpy())
        probabilities.append(logits.softmax(1).float().cpu().numpy())
        losses.append(F.cross_entropy(logits, truth.to(device), reduction="none").cpu().numpy())
        seconds = time.perf_counter() - begin
    if not labels:
        raise RuntimeError("none of the images could be read")
    return Outputs(
        np.concatenate(labels),
        np.concatenate(indices),
        np.concatenate(probabilities),
        np.concatenate(losses),
        seconds,
        errors,
    )


def _readable(
    model: nn.Module,
    batches: Iterable[Labelled],
    device: torch.device,
    precision: torch.dtype,
    errors: dict[str, str],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Classes and places of the images that could be read, their logits in float64 on the device."""
    kept: list[tuple[Tensor, Tensor]] = []

    def images() -> Iterator[Tensor]:
        for batch in batches:
            errors.update(batch.errors)
            good = batch.indices >= 0
            everything = bool(good.all())
            kept.append(
                (batch.labels, batch.indices) if everything else (batch.labels[good], batch.indices[good])
            )
            pictures = batch.images if everything else batch.images[good]
            yield pictures.to(device, non_blocking=True)

    for logits in logits_of(model, images(), precision):
        labels, indices = kept.pop()
        if len(labels):
            yield labels, indices, logits.double()

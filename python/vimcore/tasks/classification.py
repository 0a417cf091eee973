# SPDX-License-Identifier: Apache-2.0
"""How good a network is: loss, top-1, top-5, per class, confusion, images a second."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.classes import Images, Sample, Validation, collate
from ..utils.distributed import rank, sums, world
from ..utils.files import atomic


@dataclass(frozen=True)
class Scores:
    """Mean cross-entropy, shares of right answers, images that counted."""

    loss: float
    top1: float
    top5: float
    images: int


@dataclass(frozen=True)
class Answers:
    """What a network says about every image that could be read.

    Attributes:
        labels, indices: (N,) true class, place in the data set.
        probabilities: (N, classes) float32.
        loss: (N,) cross-entropy of each.
    """

    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    loss: NDArray[np.float64]
    seconds: float
    faults: dict[str, str]

    @property
    def predictions(self) -> NDArray[np.int64]:
        """(N,) most probable class."""
        return self.probabilities.argmax(1)

    def scores(self) -> Scores:
        """The figures over all images."""
        ranks = _ranks(torch.from_numpy(self.probabilities), torch.from_numpy(self.labels)).numpy()
        return Scores(
            float(self.loss.mean()), float((ranks < 1).mean()), float((ranks < 5).mean()), len(self.labels)
        )

    def confusion(self) -> NDArray[np.int64]:
        """(classes, classes): how often row was taken for column."""
        classes = self.probabilities.shape[1]
        pairs = self.labels * classes + self.predictions
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    def save(self, path: Path, images: Images) -> None:
        """An .npz file of labels, predictions, probabilities, names of the classes and files."""
        files = [images.files[i] if images.files else "" for i in self.indices]
        with atomic(path) as file:
            np.savez(
                file,
                labels=self.labels,
                predictions=self.predictions,
                probabilities=self.probabilities,
                names=np.array(images.classes, dtype=np.str_),
                files=np.array(files, dtype=np.str_),
            )


def loader(images: Validation, batch_size: int, workers: int, pin: bool = False) -> DataLoader[Sample]:
    """Batches of this process's share of the images, in order."""
    return DataLoader(
        images,
        batch_sampler=_share(len(images.images), batch_size),
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=one_thread,
        pin_memory=pin,
    )


def _share(count: int, batch_size: int) -> list[list[int]]:
    mine = range(rank(), count, world())
    return [list(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]


def one_thread(_: int) -> None:
    """Loader processes leave the cores to each other."""
    torch.set_num_threads(1)


def _ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """(N,) how many classes come before the true one, those of equal score in order; nan is before all."""
    own = scores.gather(1, labels[:, None])
    before = torch.arange(scores.shape[1], device=scores.device)[None] < labels[:, None]
    return (~(scores <= own) | ((scores == own) & before)).sum(1)


def _logits(
    model: nn.Module, batches: Iterable[Sample], device: torch.device, precision: torch.dtype
) -> Iterator[tuple[Sample, Tensor]]:
    """Samples that could be read, and their logits in float64 on the device."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for sample in batches:
                good = sample.indices >= 0
                if not bool(good.all()):
                    sample = Sample(
                        sample.images[good], sample.labels[good], sample.indices[good], sample.faults
                    )
                images = sample.images.to(device, non_blocking=True)
                with torch.autocast(device.type, precision, precision != torch.float32):
                    logits = model(images) if len(images) else images.new_zeros(0, 1)
                yield sample, logits.double()
    finally:
        model.train(was_training)


def measure(
    model: nn.Module,
    batches: Iterable[Sample],
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> tuple[Scores, dict[str, str]]:
    """Scores over the shares of all processes, and the files of this one's that could not be read."""
    found = [0.0, 0.0, 0.0, 0.0]  # images, loss, top-1, top-5
    faults: dict[str, str] = {}
    for sample, logits in _logits(model, batches, device, precision):
        faults.update(sample.faults)
        if len(sample.labels):
            labels = sample.labels.to(device)
            ranks = _ranks(logits, labels)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            figures = torch.stack([loss, (ranks < 1).sum().double(), (ranks < 5).sum().double()])
            found = [a + b for a, b in zip(found, [float(len(labels)), *figures.tolist()])]
    count, *rest = sums(found)
    if not count:
        raise RuntimeError("none of the images to validate on could be read")
    loss_mean, top1, top5 = (value / count for value in rest)
    return Scores(loss_mean, top1, top5, int(count)), faults


def answers(
    model: nn.Module,
    batches: Iterable[Sample],
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> Answers:
    """The answer for every image, kept."""
    labels, indices, probabilities, losses = [], [], [], []
    faults: dict[str, str] = {}
    seconds, begin = 0.0, time.perf_counter()
    for sample, logits in _logits(model, batches, device, precision):
        faults.update(sample.faults)
        if len(sample.labels):
            labels.append(sample.labels.numpy())
            indices.append(sample.indices.numpy())
            probabilities.append(logits.softmax(1).float().cpu().numpy())
            losses.append(F.cross_entropy(logits, sample.labels.to(device), reduction="none").cpu().numpy())
        seconds = time.perf_counter() - begin
    if not labels:
        raise RuntimeError("none of the images could be read")
    return Answers(
        np.concatenate(labels),
        np.concatenate(indices),
        np.concatenate(probabilities),
        np.concatenate(losses),
        seconds,
        faults,
    )


def per_class(found: Answers, classes: Sequence[str]) -> list[tuple[str, int, float, str]]:
    """Of each class: name, images, share of right answers (nan without images), what it is taken for."""
    rows = []
    for i, row in enumerate(found.confusion()):
        count = int(row.sum())
        wrong = row.copy()
        wrong[i] = 0
        taken = f"{classes[int(wrong.argmax())]} ({int(wrong.max())})" if wrong.any() else ""
        rows.append((classes[i], count, float(row[i]) / count if count else math.nan, taken))
    return rows

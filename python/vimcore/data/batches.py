# SPDX-License-Identifier: Apache-2.0
"""Loaders of batches: for training in a sampler's order, for evaluation each process its share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..utils.distributed import rank, world
from .sampling import EpochSampler

T = TypeVar("T")
Collate = Callable[[Sequence[Any]], Any]


def training_loader(
    dataset: Dataset[Any], sampler: EpochSampler, collate: Collate, workers: int, pin: bool = False
) -> DataLoader[Any]:
    """Batches of samples by (index, seed), in the sampler's order."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_one_thread,
        persistent_workers=workers > 0,
        pin_memory=pin,
    )


def evaluation_loader(
    dataset: Dataset[Any], batch_size: int, collate: Collate, workers: int, pin: bool = False
) -> DataLoader[Any]:
    """Batches of this process's share of the samples, in order."""
    return DataLoader(
        dataset,
        batch_sampler=_share(len(dataset), batch_size),  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_one_thread,
        pin_memory=pin,
    )


def grouped(batches: Iterable[T], size: int) -> Iterator[list[T]]:
    """Batches by `size`; what is left over is left out."""
    group: list[T] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []


def _share(count: int, batch_size: int) -> list[list[int]]:
    mine = range(rank(), count, world())
    return [list(mine[i : i + batch_size]) for i in range(0, len(mine), batch_size)]


def _one_thread(_: int) -> None:
    """Loader processes leave the cores to each other."""
    torch.set_num_threads(1)

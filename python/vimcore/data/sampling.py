# SPDX-License-Identifier: Apache-2.0
"""Which image comes when, and every random number of a run.

Nothing carries a random state from step to step: each sample and each update has a seed that follows from the
run's seed, the epoch and its place in it. So a run goes on bit for bit from any update, loader processes
change no result, and sample k of an epoch is the same for any number of training processes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DistributedSampler, Sampler

Key = tuple[int, int]  # index of an image, seed of its augmentation


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that follows from the parts."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_all(seed: int) -> None:
    """Seeds Python, numpy and torch, CUDA included where it is in use.

    Not by torch.manual_seed, which makes a stack trace for every kind of device that is not in use: longer
    than decoding a small image.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  timm draws from the global generators
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


class EpochSampler(Sampler[list[Key]]):
    """Batches of one process and epoch, full ones only; a new order for each epoch.

    Args:
        images: how many there are.
        batch_size: of one process.
        rank, world: this process and how many; together they see what one process with batches of
            world * batch_size sees.
        repeats: how often an image stands in the order, next to itself; as many images an epoch as ever.
    """

    def __init__(self, images: int, batch_size: int, rank: int, world: int, seed: int, repeats: int) -> None:
        self.batch_size, self.rank, self.world, self.seed = batch_size, rank, world, seed
        self.indices: RepeatAugSampler | DistributedSampler[int]
        if repeats > 1:
            self.indices = RepeatAugSampler(range(images), world, rank, num_repeats=repeats)
        else:
            self.indices = DistributedSampler(range(images), world, rank, drop_last=True)  # type: ignore[arg-type]
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next iteration is over this epoch, from batch `start` on."""
        self.epoch, self.start = epoch, start
        self.indices.set_epoch(derive_seed("order", self.seed, epoch))

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self.indices) // self.batch_size

    def __iter__(self) -> Iterator[list[Key]]:
        order = list(self.indices)
        for batch in range(self.start, len(self)):
            places = range(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield [(order[i], self._sample_seed(i * self.world + self.rank)) for i in places]

    def _sample_seed(self, place: int) -> int:
        return derive_seed("sample", self.seed, self.epoch, place)

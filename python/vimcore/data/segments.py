# SPDX-License-Identifier: Apache-2.0
"""Batches of images with masks: augmented by (index, seed) for training, by index in their own size else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .classes import GIVE_UP
from .joint import Joint
from .masks import ClassIndexError
from .pairs import Pairs
from .sampling import Key
from .transforms import UnreadableError


@dataclass
class Segments:
    """Images with masks of class indices.

    Attributes:
        images: (C, h, w) float32 each, normalised; for training all of one size.
        masks: (H, W) uint8 each; for evaluation in the size of the file.
        indices: places in the data set.
        errors: files that could not be read, and why.
        fault: what stops the run; "": nothing. The processes that load only report it.
    """

    images: list[Tensor]
    masks: list[Tensor]
    indices: list[int]
    errors: dict[str, str] = field(default_factory=dict)
    fault: str = ""


class Training(Dataset[Segments]):
    """Augmented pairs by (index, seed); one that cannot be read is replaced by the next one that can."""

    def __init__(self, pairs: Pairs, joint: Joint) -> None:
        self.pairs, self.joint = pairs, joint

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Key) -> Segments:
        index, seed = key
        found = Segments([], [], [])
        for i in range(min(GIVE_UP, len(self.pairs))):
            at = (index + i) % len(self.pairs)
            try:
                chance = np.random.default_rng(seed)
                image, mask = self.joint.training(*self.pairs.pair(at, seed), chance)
            except UnreadableError as error:
                found.errors[self.pairs.name(at)] = str(error)
            except ClassIndexError as error:
                found.fault = str(error)
                return found
            else:
                found.images, found.masks, found.indices = [image], [mask], [at]
                return found
        name, reason = next(reversed(found.errors.items()))
        found.fault = f"{len(found.errors)} images in a row cannot be used, the last: {name}: {reason}"
        return found


class Validation(Dataset[Segments]):
    """Pairs by index; of one that cannot be read there is only the reason."""

    def __init__(self, pairs: Pairs, joint: Joint) -> None:
        self.pairs, self.joint = pairs, joint

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Segments:
        found = Segments([], [], [])
        try:
            image, mask = self.pairs.pair(index)
            found.images, found.masks = [self.joint.evaluation(image)], [torch.from_numpy(mask)]
            found.indices = [index]
        except UnreadableError as error:
            found.errors[self.pairs.name(index)] = str(error)
        except ClassIndexError as error:
            found.fault = str(error)
        return found


def collate(samples: Sequence[Segments]) -> Segments:
    """One batch of samples."""
    found = Segments([], [], [])
    for sample in samples:
        found.images += sample.images
        found.masks += sample.masks
        found.indices += sample.indices
        found.errors.update(sample.errors)
        found.fault = found.fault or sample.fault
    return found

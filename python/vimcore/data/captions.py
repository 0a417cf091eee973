# SPDX-License-Identifier: Apache-2.0
"""Images with captions: lists, folders with a text beside each picture, digits in colours."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from ..utils.files import printable
from .classes import ARRAY, VALIDATION_NAMES, Images, Sample
from .coloured_digits import NAME, coloured_digits
from .lists import LISTS, read_list
from .picture_files import SUFFIXES, passed_over_text, read_file, walk
from .sampling import Key, derive_seed

TEXT = ".txt"
LAYOUTS = (
    "expected a CSV or TSV list with the columns path and caption, or a folder of pictures with a .txt each"
)
_LONGEST = 1 << 20  # bytes of a text beside a picture

Encode = Callable[[str], Tensor]  # a text to tokens (context,)


@dataclass(frozen=True)
class Captioned:
    """Images, with labels that mean nothing, and of each its captions, of which there is one at least."""

    images: Images
    captions: Sequence[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, index: NDArray[np.int64]) -> Captioned:
        """Those with these indices, in this order."""
        return replace(self, images=self.images.subset(index), captions=[self.captions[i] for i in index])

    def fingerprint(self) -> str:
        """Tells whether a run goes on with the data that it began with."""
        found = hashlib.blake2b(self.images.fingerprint().encode(), digest_size=8)
        for captions in self.captions:
            found.update("\0".join((*captions, "")).encode(errors="surrogateescape"))
        return found.hexdigest()


@dataclass
class CaptionedSample:
    """Images of one batch with a text each, or one image.

    Attributes:
        tokens: of the texts.
        texts: numbers that stand for the texts.
        captions: (..., K) those of all captions of each image, some several times.
        indices: places in the data set.
    """

    images: Tensor
    tokens: Tensor
    texts: Tensor
    captions: Tensor
    indices: Tensor
    errors: dict[str, str] = field(default_factory=dict)


class CaptionedTraining(Dataset[CaptionedSample]):
    """Augmented images by (index, seed), each with one of its captions.

    Args:
        inner: the images, as `vimcore.data.classes.Training` gives them.
    """

    def __init__(self, inner: Dataset[Sample], captions: Sequence[tuple[str, ...]], encode: Encode) -> None:
        self.inner, self.captions, self.encode = inner, captions, encode
        self.most = max(map(len, captions), default=0)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, key: Key) -> CaptionedSample:
        found = self.inner[key]
        captions = self.captions[int(found.indices)]
        chosen = derive_seed("caption", key[1]) % len(captions)
        numbers = torch.tensor([_number(captions[i % len(captions)]) for i in range(self.most)])
        tokens = self.encode(captions[chosen])
        return CaptionedSample(found.images, tokens, numbers[chosen], numbers, found.indices, found.errors)


def _number(text: str) -> int:
    """That stands for a text, of 63 bits."""
    data = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(data, "little") >> 1


def collate(samples: Sequence[CaptionedSample]) -> CaptionedSample:
    """One batch of samples."""
    return CaptionedSample(
        torch.stack([sample.images for sample in samples]),
        torch.stack([sample.tokens for sample in samples]),
        torch.stack([sample.texts for sample in samples]),
        torch.stack([sample.captions for sample in samples]),
        torch.stack([sample.indices for sample in samples]),
        {name: reason for sample in samples for name, reason in sample.errors.items()},
    )


# ---- where they come from ----------------------------------------------------------------------------------


def open_captioned(path: str) -> Captioned:
    """The images of a list (path, caption), or of a folder, at any depth, with a .txt beside each.

    Rows of the same path, and lines of a text, are captions of one image.

    Raises:
        ValueError, OSError: there are none, or kinds are mixed.
    """
    found = _of_list(path) if path.lower().endswith(LISTS) else _of_folder(path)
    if len({name.lower().endswith(ARRAY) for name in found.images.files}) > 1:
        raise ValueError(f"{path}: expected pictures or .npy files, found both")
    return found


def training_and_validation(data: str, val: str | None, fraction: float) -> tuple[Captioned, Captioned, str]:
    """Images to learn from, images to validate on, and a sentence about where these come from."""
    if data == NAME:
        if val not in (None, NAME):
            raise ValueError(f"val: {NAME} has validation images of its own, got {val}")
        train, valid = (Captioned(*coloured_digits(held_out)) for held_out in (False, True))
        return train, valid, "validated on held-out digits in all colours"
    if os.path.isdir(os.path.join(data, "train")):
        beside = [os.path.join(data, name) for name in VALIDATION_NAMES]
        val = val or next((name for name in beside if os.path.isdir(name)), None)
        data = os.path.join(data, "train")
    found = open_captioned(data)
    if val is not None:
        return found, open_captioned(val), f"validated on {val}"
    count = round(len(found) * fraction)
    held = np.zeros(len(found), bool)
    held[((np.arange(count) + 0.5) * len(found) / max(count, 1)).astype(int)] = True  # spread evenly
    if not held.any() or held.all():
        raise ValueError(f"{data}: val_fraction={fraction} holds out {count} of {len(found)} images")
    text = f"validated on every {round(1 / fraction)}th image, held out of {data}"
    return found.subset(np.flatnonzero(~held)), found.subset(np.flatnonzero(held)), text


def _of_list(path: str) -> Captioned:
    rows = read_list(path, "caption")
    if not rows:
        raise ValueError(f"{path}: no rows below the columns' names, so no images")
    captions: dict[str, list[str]] = {}
    for name, caption in rows:
        captions.setdefault(os.path.join(os.path.dirname(path), name), []).append(caption)
    files = list(captions)
    images = Images(files, np.zeros(len(files), np.int64), [])
    return Captioned(images, [tuple(dict.fromkeys(captions[name])) for name in files])


def _of_folder(path: str) -> Captioned:
    if not os.path.isdir(path):
        raise ValueError(f"{path}: {LAYOUTS}")
    passed_over = Counter[str]()
    files: list[str] = []
    captions: list[tuple[str, ...]] = []
    texts = set[str]()
    stems = set[str]()
    for name in walk(path, (*SUFFIXES, ARRAY, TEXT), passed_over):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() == TEXT:
            texts.add(stem)
            continue
        stems.add(stem)
        lines = _lines(stem + TEXT) if os.path.exists(stem + TEXT) else ()
        if lines:
            files.append(name)
            captions.append(lines)
        else:
            passed_over["images without a caption"] += 1
    if alone := len(texts - stems):
        passed_over["texts without an image"] = alone
    if not files:
        more = f"; {passed_over_text(passed_over)}" if passed_over else ""
        raise ValueError(f"{path}: no images with captions: {LAYOUTS}{more}")
    return Captioned(Images(files, np.zeros(len(files), np.int64), [], passed_over=passed_over), captions)


def _lines(path: str) -> tuple[str, ...]:
    """The captions in a text, without repetitions."""
    try:
        text = read_file(path, _LONGEST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{printable(path)}: expected UTF-8, got byte {error.object[error.start]:#04x}; save it as UTF-8"
        ) from None
    return tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))

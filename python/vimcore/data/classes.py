# SPDX-License-Identifier: Apache-2.0
"""Images with labels: folders, lists, the embedded digits; what cannot be read is skipped and counted."""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from .._core import Error
from ..utils.files import listed, printable
from .clip_files import find_clips, frames_of_clip, read_clip
from .digits import load_digits, picture, split_digits
from .lists import LISTS, read_list
from .picture_files import (
    FORMATS_TEXT,
    SUFFIXES,
    is_hidden,
    kind_of,
    passed_over_text,
    read_file,
    reason,
    walk,
)
from .pictures import decode
from .sampling import Key, seed_all
from .sources import Source, is_source
from .transforms import Transform, UnreadableError

ARRAY = ".npy"
VALIDATION_NAMES = ("val", "valid", "validation")
GIVE_UP = 100  # images in a row that cannot be read


@dataclass(frozen=True)
class Images:
    """Files, or pictures in memory (N, H, W, 3), or places in a source, with their classes.

    Attributes:
        labels: index into `classes` of each image.
        passed_over: files that lay between them, by kind.
        frames: of the clips that the files are: folders of pictures, or arrays (T, H, W, C); 0: images.
        random_frames: Python's generator draws which frame of each part of a clip is seen.
    """

    files: Sequence[str]
    labels: NDArray[np.int64]
    classes: list[str]
    pixels: NDArray[np.uint8] | None = None
    passed_over: Mapping[str, int] = field(default_factory=dict)
    source: Source | None = None
    places: NDArray[np.int64] | None = None
    frames: int = 0
    random_frames: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def arrays(self) -> bool:
        """Whether these are numpy files and not pictures."""
        return not self.frames and self.source is None and bool(self.files) and _is_array(self.files[0])

    def read(self, index: int) -> NDArray[Any]:
        """(H, W, 3) uint8 of a picture, (C, H, W) of a numpy file, (T, H, W, 3) uint8 of a clip.

        Raises:
            UnreadableError: it is missing, damaged, or no such array.
        """
        if self.pixels is not None:
            return self.pixels[index]
        name = self.files[index]
        try:
            if self.frames:
                return read_clip(name, self.frames, random.randrange if self.random_frames else None)
            if self.source is not None and self.places is not None:
                return self.source.read(int(self.places[index]))
            if not _is_array(name):
                return decode(read_file(name), "")
            array = np.load(io.BytesIO(read_file(name, None)), allow_pickle=False)
        except (Error, EOFError, OSError, ValueError, MemoryError) as error:
            raise UnreadableError(reason(error)) from error
        if not isinstance(array, np.ndarray) or array.ndim != 3:
            shape = getattr(array, "shape", type(array).__name__)
            raise UnreadableError(f"expected an array (C, H, W), got {shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UnreadableError("it holds values that are not finite")
        return array

    def subset(self, index: NDArray[np.int64]) -> Images:
        """Those with these indices, in this order."""
        files = [self.files[i] for i in index] if self.files else []
        pixels = None if self.pixels is None else self.pixels[index]
        places = None if self.places is None else self.places[index]
        return replace(self, files=files, labels=self.labels[index], pixels=pixels, places=places)

    def relabelled(self, classes: Sequence[str]) -> Images:
        """The same images under a longer or reordered list of classes; ValueError names what is not in it."""
        strange = sorted(set(self.classes) - set(classes))
        if strange:
            raise ValueError(
                f"classes that the network does not have: {listed(strange)}; it has {listed(classes)}"
            )
        place = {name: i for i, name in enumerate(classes)}
        to = np.array([place[name] for name in self.classes], np.int64)
        return replace(self, labels=to[self.labels], classes=list(classes))

    def fingerprint(self) -> str:
        """Tells whether a run goes on with the images that it began with."""
        found = hashlib.blake2b(np.ascontiguousarray(self.labels).tobytes(), digest_size=8)
        names = "\n".join([*self.classes, *map(os.path.basename, self.files)])
        found.update(names.encode(errors="surrogateescape"))
        return found.hexdigest()


@dataclass
class Sample:
    """Images of one batch, or one image: classes and places in the data set; place -1: could not be read."""

    images: Tensor
    labels: Tensor
    indices: Tensor
    errors: dict[str, str] = field(default_factory=dict)


class Training(Dataset[Sample]):
    """Augmented images by (index, seed); one that cannot be read is replaced by the next one that can."""

    def __init__(self, images: Images, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> Sample:
        index, seed = key
        errors: dict[str, str] = {}
        for i in range(min(GIVE_UP, len(self.images))):
            at = (index + i) % len(self.images)
            seed_all(seed)
            image = _attempt(self.images, at, self.transform, errors)
            if image is not None:
                return Sample(image, torch.tensor(int(self.images.labels[at])), torch.tensor(at), errors)
        name, reason = next(reversed(errors.items()))
        raise RuntimeError(f"{len(errors)} images in a row cannot be read, the last: {name}: {reason}")


class Validation(Dataset[Sample]):
    """Images by index; one that cannot be read is zeros with place -1."""

    def __init__(self, images: Images, transform: Transform, shape: tuple[int, ...]) -> None:
        self.images, self.transform, self.shape = images, transform, shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        errors: dict[str, str] = {}
        image = _attempt(self.images, index, self.transform, errors)
        label = torch.tensor(int(self.images.labels[index]))
        if image is None:
            return Sample(torch.zeros(self.shape), label, torch.tensor(-1), errors)
        return Sample(image, label, torch.tensor(index), errors)


def _attempt(images: Images, index: int, transform: Transform, errors: dict[str, str]) -> Tensor | None:
    """The image, or None and the reason among the errors."""
    try:
        return transform(images.read(index))
    except UnreadableError as error:
        errors[images.files[index] if images.files else f"image {index}"] = str(error)
        return None


def collate(samples: Sequence[Sample]) -> Sample:
    """One batch of samples."""
    errors = {name: reason for sample in samples for name, reason in sample.errors.items()}
    return Sample(
        torch.stack([sample.images for sample in samples]),
        torch.stack([sample.labels for sample in samples]),
        torch.stack([sample.indices for sample in samples]),
        errors,
    )


# ---- where images come from --------------------------------------------------------------------------------


def _is_array(name: str) -> bool:
    return name.lower().endswith(ARRAY)


def open_images(
    path: str, split: str = "train", frames: int = 0, without_labels: str | None = None
) -> Images:
    """The images of a folder of class folders, a list of paths and labels, "digits", or a source of timm's.

    Args:
        split: of a source that has several and whose name says none.
        frames: of clips, which are then looked for in place of images; 0: images.
        without_labels: the class of all images of a list that has no labels; None: it must have some.

    Raises:
        ValueError, OSError: there are none, or kinds are mixed.
    """
    if frames:
        return _clips(path, frames)
    if path == "digits":
        return _digits()
    if is_source(path):
        source = Source(path, split)
        files, labels, classes = source.contents()
        return Images(files, labels, classes, source=source, places=np.arange(len(files)))
    is_list = path.lower().endswith(LISTS)
    found = _of_list(path, without_labels) if is_list else _folder(path)
    if not len(found):
        if is_list:
            raise ValueError(f"{path}: no rows below the columns' names, so no images")
        raise ValueError(
            f"{path}: no images in class folders ({FORMATS_TEXT}, .npy)"
            + (f"; {passed_over_text(found.passed_over)}" if found.passed_over else "")
        )
    if len({_is_array(name) for name in found.files}) > 1:
        raise ValueError(f"{path}: expected pictures or .npy files, found both")
    for name in found.classes:
        if printable(name) != name:
            raise ValueError(f"{path}: the name of class {printable(name)} is not UTF-8: rename its folder")
    return found


def training_and_validation(
    data: str, val: str | None, fraction: float, frames: int = 0
) -> tuple[Images, Images, str]:
    """Images to learn from, images to validate on, and a sentence about where these come from.

    Args:
        frames: as for `open_images`.
    """
    if os.path.isdir(os.path.join(data, "train")):
        beside = [os.path.join(data, name) for name in VALIDATION_NAMES]
        val = val or next((name for name in beside if os.path.isdir(name)), None)
        data = os.path.join(data, "train")
    train = open_images(data, frames=frames)
    if val is not None:
        valid = open_images(val, "validation", frames)
        try:
            return train, valid.relabelled(train.classes), f"validated on {val}"
        except ValueError as error:
            raise ValueError(f"{val}: {error}") from None
    if data == "digits":
        learn, held_out = split_digits(train.labels)
        return train.subset(learn), train.subset(held_out), "validated on the held-out fifth"
    held = np.zeros(len(train), bool)
    for label in range(len(train.classes)):  # spread evenly over the files of each class: no draw is needed
        of_class = np.flatnonzero(train.labels == label)
        count = round(len(of_class) * fraction)
        held[of_class[((np.arange(count) + 0.5) * len(of_class) / max(count, 1)).astype(int)]] = True
    if not held.any() or held.all():
        raise ValueError(
            f"{data}: val_fraction={fraction} holds out {int(held.sum())} of {len(train)} images"
        )
    text = f"validated on every {round(1 / fraction)}th image of each class, held out of {data}"
    return train.subset(np.flatnonzero(~held)), train.subset(np.flatnonzero(held)), text


def passed_over(*images: Images) -> dict[str, int]:
    """What was passed over in all of them, by kind; parts of the same folder count once."""
    total = Counter[str]()
    for counts in {id(part.passed_over): part.passed_over for part in images}.values():
        total.update(counts)
    return dict(sorted(total.items()))


def _pictures(folder: str, passed_over: Counter[str]) -> Iterator[str]:
    return walk(folder, (*SUFFIXES, ARRAY), passed_over)


def _folder(path: str, find: Callable[[str, Counter[str]], Iterable[str]] = _pictures) -> Images:
    """Class folders, what `find` finds at any depth below them."""
    with os.scandir(path) as entries:
        folders = {entry.name: entry.is_dir() for entry in entries if not is_hidden(entry.name)}
    classes = sorted(name for name, is_folder in folders.items() if is_folder)
    outside = Counter(kind_of(name) for name, is_folder in folders.items() if not is_folder)
    passed_over = Counter({f"{kind} outside class folders": count for kind, count in outside.items()})
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files += find(os.path.join(path, name), passed_over)
        labels += [label] * (len(files) - len(labels))
    empty = [name for i, name in enumerate(classes) if i not in set(labels)]
    if files and empty:
        raise ValueError(f"{path}: class folders without images: {listed(empty)}")
    return Images(files, np.array(labels, np.int64), classes, passed_over=passed_over)


def _clips(path: str, frames: int) -> Images:
    """Class folders of clips, or a list of clips and labels."""
    if path == "digits" or is_source(path):
        raise ValueError(
            f"{path}: images, but the network takes clips; name a folder of class folders of clips"
        )
    found = _of_list(path) if path.lower().endswith(LISTS) else _folder(path, find_clips)
    if not len(found):
        raise ValueError(
            f"{path}: no clips in class folders: folders of pictures, or .npy files (T, H, W, C)"
        )
    for name in found.files:  # what does not fit is told before the run, which would pass over it
        frames_of_clip(name, frames)
    return replace(found, frames=frames)


def _of_list(path: str, without_labels: str | None = None) -> Images:
    """A list of paths, relative to it, and labels."""
    rows = read_list(path, default=without_labels)
    names = {label for _, label in rows}
    classes = sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)
    place = {name: i for i, name in enumerate(classes)}
    folder = os.path.dirname(path)
    files = [os.path.join(folder, name) for name, _ in rows]
    return Images(files, np.array([place[label] for _, label in rows], np.int64), classes)


def _digits() -> Images:
    """The embedded digits as pictures of 32 x 32."""
    digits, labels = load_digits()
    pixels = np.stack([np.repeat(picture(digit)[:, :, None], 3, 2) for digit in digits])
    return Images([], labels, [str(digit) for digit in range(10)], pixels)

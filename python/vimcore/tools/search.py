# SPDX-License-Identifier: Apache-2.0
"""`vimcore search`: the pictures of folders that are nearest to a sentence or to a picture."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..data.named_files import read_input
from ..data.picture_files import STDIN, SUFFIXES, find_images, read_file, reason
from ..data.pictures import network_input
from ..results import NOT_FINITE
from .embedders import Embedder, unit
from .search_index import Index, Stamp, checksum, stamp_of

WRITTEN_EVERY = 2000  # new pictures: what a killed search has computed is not lost


@dataclass(frozen=True)
class Hit:
    """A picture that was found, and the cosine of its vector and the query's."""

    image: str
    score: float


@dataclass
class Library:
    """The pictures of a search.

    Attributes:
        images: files whose vectors are known.
        vectors: (N, D) of length 1.
        errors: files that cannot be read, and why.
        passed_over: files in folders that are no pictures, by suffix.
        reused: how many vectors came from an index.
        notes: what a user should know.
    """

    images: list[str]
    vectors: NDArray[np.float32]
    errors: dict[str, str] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)
    reused: int = 0
    notes: list[str] = field(default_factory=list)


def query_vector(embedder: Embedder, query: str) -> tuple[NDArray[np.float32], str, list[str]]:
    """The vector of a picture file or a sentence, "picture" or "sentence", and notes.

    Raises:
        ValueError: the picture cannot be read; there is no such file and the weights know no sentences.
    """
    looks_like_file = query == STDIN or query.lower().endswith(SUFFIXES)
    if os.path.isfile(query) or looks_like_file:
        try:
            image = network_input(read_input(query), "", embedder.steps)
        except (_core.Error, OSError, ValueError, MemoryError) as error:
            raise ValueError(f"query: {query}: {reason(error)}") from None
        vector = unit(embedder.vectors(image[None]))[0]
        kind, notes = "picture", list[str]()
    elif not embedder.reads_text:
        raise ValueError(
            f"query: {query!r:.200} is no file, and these weights know no sentences; give a picture, or "
            "weights of `vimcore train --task clip`"
        )
    elif not query.strip():
        raise ValueError("query: expected a sentence or a picture, got nothing")
    else:
        (vector, notes), kind = embedder.text(query), "sentence"
    if not np.isfinite(vector).all():
        raise ValueError(f"query: {NOT_FINITE}")
    return vector, kind, notes


def collect(
    embedder: Embedder,
    weights: str,
    paths: Sequence[str],
    dim: int,
    *,
    variant: str = "",
    batch: int = 8,
    cached: bool = True,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Library:
    """The vectors of all pictures, those of folders from an index where they are known.

    Args:
        weights: their file.
        paths: picture files and folders.
        dim: of the vectors.
        variant: of the vectors of these weights, such as the size of the images.
        batch: pictures that are computed at once.
        cached: read and write indices.
        watch: is told how many pictures are done, of how many.
    """
    library = Library([], np.empty((0, 0), np.float32))
    digest = checksum(weights, embedder.dtype) + variant if cached else ""
    work: list[tuple[str, Index | None]] = []
    indices: list[tuple[Index, set[str]]] = []
    for path in dict.fromkeys(paths):
        found = list(find_images([path], library.passed_over))
        index = None
        if cached and os.path.isdir(path):
            index = Index(digest, path, dim)
            library.notes += index.notes
            indices.append((index, set(found)))
        work += [(image, index) for image in found]
    work = list(
        {image: (image, index) for image, index in work}.values()
    )  # a picture named twice counts once
    known: dict[str, NDArray[np.float32]] = {}
    waiting: list[tuple[str, Stamp | None, Index | None, NDArray[np.float32]]] = []
    fresh = 0

    def compute() -> None:
        if not waiting:
            return
        vectors = unit(embedder.vectors(np.stack([image for *_, image in waiting])))
        for (path, stamp, index, _), vector in zip(waiting, vectors):
            if not np.isfinite(vector).all():
                library.errors[path] = NOT_FINITE
                continue
            known[path] = vector
            if index is not None and stamp is not None and stamp_of(path) == stamp:
                index.put(path, stamp, vector)
        waiting.clear()

    try:
        for done, (path, index) in enumerate(work):
            watch(done, len(work))
            stamp = stamp_of(path)
            kept = index.get(path, stamp) if index is not None and stamp is not None else None
            if kept is not None:
                known[path] = kept
                library.reused += 1
                continue
            try:
                waiting.append((path, stamp, index, network_input(read_file(path), "", embedder.steps)))
            except (_core.Error, OSError, ValueError, MemoryError) as error:
                library.errors[path] = reason(error)
                continue
            if len(waiting) == batch:
                compute()
                fresh += batch
                if fresh >= WRITTEN_EVERY:
                    fresh = 0
                    _write(indices, library, whole=False)
        compute()
        watch(len(work), len(work))
        _write(indices, library, whole=True)
    except BaseException:
        _write(indices, library, whole=False)
        raise
    library.images = [path for path, _ in work if path in known]
    if library.images:
        library.vectors = np.stack([known[path] for path in library.images])
    return library


def _write(indices: list[tuple[Index, set[str]]], library: Library, whole: bool) -> None:
    """The indices; a search goes on without one that cannot be written.

    Args:
        whole: every picture was looked at: what is gone is forgotten.
    """
    for index, seen in indices:
        try:
            index.write(seen if whole else None)
        except (_core.Error, OSError) as error:
            library.notes.append(f"{index.path}: the index cannot be kept: {error}")


def nearest(library: Library, vector: NDArray[np.float32], count: int, query: str | None = None) -> list[Hit]:
    """The nearest pictures, the nearest first; of equally near ones the one that was named first.

    Args:
        query: a picture file, which is not among them.
    """
    if not library.images:
        return []
    scores = library.vectors @ vector
    order = np.argsort(-scores, kind="stable")
    own = os.path.realpath(query) if query is not None else None
    hits = (Hit(library.images[i], float(scores[i])) for i in order)
    kept = (hit for hit in hits if own is None or os.path.realpath(hit.image) != own)
    return [hit for hit, _ in zip(kept, range(count))]

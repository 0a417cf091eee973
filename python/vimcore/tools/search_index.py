# SPDX-License-Identifier: Apache-2.0
"""Vectors of pictures kept between searches: by weights, folder, and size and time of each file.

An index is a safetensors file in the user's cache; whatever is wrong with it, it is made again.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _core

KEY, FORMAT = "vimcore.index", "1"
_CHUNK = 1 << 22  # bytes


class Stamp(NamedTuple):
    """Size in bytes and time of the last change in ns: another one, another file."""

    size: int
    time: int


def stamp_of(path: str) -> Stamp | None:
    """None: there is no such file."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return Stamp(facts.st_size, facts.st_mtime_ns)


def cache_folder() -> Path:
    """`vimcore/search` of the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and os.path.isabs(base) else Path.home() / ".cache") / "vimcore" / "search"


def checksum(path: str, dtype: str = "float32") -> str:
    """Of a file's bytes, and of the type of activations: vectors of another type are other vectors."""
    found = hashlib.blake2b(digest_size=16, key=b"" if dtype == "float32" else dtype.encode())
    with open(path, "rb") as file:
        while part := file.read(_CHUNK):
            found.update(part)
    return found.hexdigest()


class Index:
    """Of the pictures below one folder.

    Args:
        weights: checksum of their file.
        folder: as the user named it.
        dim: of the vectors.

    Attributes:
        notes: what a user should know of it.
        changed: whether there is something to write.
    """

    def __init__(self, weights: str, folder: str, dim: int) -> None:
        self.dim = dim
        self.folder = os.path.abspath(folder)
        key = os.fsencode("\0".join((_core.__version__, weights, self.folder)))
        name = hashlib.blake2b(key, digest_size=16).hexdigest()
        self.path = cache_folder() / f"{name}.safetensors"
        self.notes: list[str] = []
        self.changed = False
        self.kept: dict[str, tuple[Stamp, NDArray[np.float32]]] = {}
        if self.path.is_file():
            try:
                self.kept = self._read()
            except (_core.Error, OSError, ValueError) as error:
                self.notes.append(f"{self.path}: made again: {error}")

    def get(self, path: str, stamp: Stamp) -> NDArray[np.float32] | None:
        """The vector of a picture that has not changed since."""
        kept = self.kept.get(os.path.relpath(os.path.abspath(path), self.folder))
        return kept[1] if kept is not None and kept[0] == stamp else None

    def put(self, path: str, stamp: Stamp, vector: NDArray[np.float32]) -> None:
        """Keeps the vector of a picture."""
        self.kept[os.path.relpath(os.path.abspath(path), self.folder)] = stamp, vector
        self.changed = True

    def write(self, seen: set[str] | None = None) -> None:
        """Writes what is new.

        Args:
            seen: pictures that are there, all others are forgotten; None: none is.

        Raises:
            OSError, vimcore.Error: it cannot be written.
        """
        if seen is not None:
            there = {os.path.relpath(os.path.abspath(path), self.folder) for path in seen}
            gone = set(self.kept) - there
            self.kept = {name: kept for name, kept in self.kept.items() if name not in gone}
            self.changed = self.changed or bool(gone)
        if not self.changed or not self.kept:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {
            "names": np.frombuffer(os.fsencode("\0".join(self.kept)), np.uint8),
            "stamps": np.array([stamp for stamp, _ in self.kept.values()], np.int64),
            "vectors": np.stack([vector for _, vector in self.kept.values()]),
        }
        _core.write_safetensors(self.path, arrays, {KEY: FORMAT})
        self.changed = False

    def _read(self) -> dict[str, tuple[Stamp, NDArray[np.float32]]]:
        arrays, metadata = _core.read_safetensors(self.path)
        if metadata.get(KEY) != FORMAT or set(arrays) != {"names", "stamps", "vectors"}:
            raise ValueError("no index of this version")
        names, stamps, vectors = arrays["names"], arrays["stamps"], arrays["vectors"]
        found = os.fsdecode(names.tobytes()).split("\0") if names.dtype == np.uint8 else []
        count = len(found)
        if stamps.dtype != np.int64 or stamps.shape != (count, 2) or len(set(found)) != count:
            raise ValueError("names and stamps do not fit")
        if vectors.dtype != np.float32 or vectors.shape != (count, self.dim):
            raise ValueError("vectors do not fit")
        if not (np.abs(np.linalg.norm(vectors.astype(np.float64), axis=1) - 1) < 1e-3).all():
            raise ValueError("vectors are not of length 1")
        return {n: (Stamp(*map(int, s)), v) for n, s, v in zip(found, stamps, vectors)}

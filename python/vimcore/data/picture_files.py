# SPDX-License-Identifier: Apache-2.0
"""Which picture files a user means, what lies between them, and their bytes; the rules of vim-infer."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

SUFFIXES = (  # of formats that are decoded here or, beside vim-infer, by Pillow
    *(".avif", ".bmp", ".dib", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg"),
    *(".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"),
)
FORMATS_TEXT = "JPEG, PNG, PPM, PGM, WebP, TIFF, BMP, GIF, AVIF"
STDIN = "-"  # a picture on standard input
LARGEST = 2**31  # bytes of a picture file
SHOWN = 12  # kinds in a message


def find_images(paths: Iterable[str], passed_over: Counter[str] | None = None) -> Iterator[str]:
    """Files as given; folders are walked for pictures by suffix."""
    for path in paths:
        if path != STDIN and os.path.isdir(path):
            yield from walk(path, SUFFIXES, passed_over)
        else:
            yield path


def walk(folder: str, suffixes: tuple[str, ...], passed_over: Counter[str] | None = None) -> Iterator[str]:
    """Files with these suffixes, those of a folder before its subfolders', in the order of the names' bytes.

    A folder that cannot be read is among them, for whoever reads it to report. Links to folders are not
    followed, so that there are no circles.

    Args:
        passed_over: counts files of other kinds by suffix, and linked folders; hidden files are not counted.
    """
    counts = Counter[str]() if passed_over is None else passed_over
    waiting = [(folder, False)]
    while waiting:
        here, hidden = waiting.pop()
        try:
            with os.scandir(here) as entries:
                found = sorted(entries, key=lambda entry: os.fsencode(entry.name))
        except OSError:
            yield here
            continue
        folders = []
        for entry in found:
            is_folder, unseen = _is_folder(entry), hidden or is_hidden(entry.name)
            if is_folder and not entry.is_symlink():
                folders.append((entry.path, unseen))
            elif not is_folder and entry.name.lower().endswith(suffixes):
                yield entry.path
            elif not unseen:
                counts["linked folder" if is_folder else kind_of(entry.name)] += 1
        waiting += reversed(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: reading it says what is wrong
        return False


def is_hidden(name: str) -> bool:
    """Whether a file is of the system's own kind, which nobody misses."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini")


def kind_of(name: str) -> str:
    """The suffix in small letters."""
    suffix = os.path.splitext(os.fsencode(name))[1].lower()
    return os.fsdecode(suffix) if suffix else "no suffix"


def passed_over_text(counts: Mapping[str, int]) -> str:
    """One line, the most frequent kinds first."""
    order = sorted(counts, key=lambda kind: (-counts[kind], os.fsencode(kind)))
    text = ", ".join(f"{counts[kind]} {kind}" for kind in order[:SHOWN])
    more = sum(counts[kind] for kind in order[SHOWN:])
    return f"passed over: {text}" + (f", {more} of other kinds" if more else "")


def read_file(path: str, largest: int | None = LARGEST) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: it cannot be read, is larger, or is a pipe or device, which might never end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # not opened: that alone may have effects
        raise OSError(errno.EINVAL, "not a regular file", path)
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        facts = os.fstat(file.fileno())
        if not stat.S_ISREG(facts.st_mode):  # exchanged in between
            raise OSError(errno.EINVAL, "not a regular file", path)
        if largest is not None and facts.st_size > largest:
            raise OSError(errno.EFBIG, f"file is larger than {largest / 2**30:g} GiB", path)
        return file.read()


def reason(error: BaseException) -> str:
    """What is wrong with a file that was read or decoded under the name "", without the file's name."""
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).removeprefix("[decode_image] : ")

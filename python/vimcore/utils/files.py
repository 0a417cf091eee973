# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, and their names in messages. Needs no torch."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast


@contextlib.contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Gives an OSError that names no file, such as a full disk's, the name of this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name, replacing another, when everything is on the disk.

    Raises:
        OSError: names the file and the reason, also where the writer made something else of it.
    """
    if path.exists() and not path.is_file():  # as root one could replace /dev/null
        raise OSError(errno.EINVAL, "not a regular file, which no other may replace", str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(path), _Remembering(temporary) as raw:
            try:
                file = io.BufferedWriter(raw)  # type: ignore[type-var]
                yield cast(IO[bytes], file)
                file.flush()
            except Exception as error:  # torch.save turns a full disk into a RuntimeError about its own code
                if raw.error is None:
                    raise
                raise raw.error from error
            os.fsync(raw.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """A file of UTF-8, as `atomic` writes it."""
    with atomic(path) as file:
        file.write(text.encode())


def csv_row(cells: Sequence[str]) -> bytes:
    """A line of a CSV file, with quotes where they are needed; bytes of file names as they are."""
    quoted = ('"' + c.replace('"', '""') + '"' if any(x in c for x in ',"\r\n') else c for c in cells)
    return (",".join(quoted) + "\n").encode("utf-8", "surrogateescape")


class _Remembering(io.FileIO):
    """A file to write that keeps the error of a failed write."""

    error: OSError | None = None

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.error is not None:
            raise self.error  # a buffer that is dropped would try once more
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


# ---- names -------------------------------------------------------------------------------------------------


def listed(names: Sequence[str], separator: str = ", ", most: int = 12) -> str:
    """The first of many names or faults, and how many more there are."""
    text = separator.join(names[:most])
    if len(names) <= most:
        return text
    return f"{text}{' ' if separator == ', ' else separator}and {len(names) - most} more"


def printable(name: str) -> str:
    """A file name as text that can be printed: bytes that are no UTF-8 as \\xff, all else as it is."""
    return os.fsencode(name).decode(errors="backslashreplace")


# Unicode's categories Cc, Cf, Cs, Zl and Zp, but for soft hyphen and joiners, which belong to words; the same
# ranges as in cpp/tools/text.cpp.
_CODED = re.compile(
    "[\0-\x1f\x7f-\x9f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b\u200e\u200f\u2028-\u202e"
    "\u2060-\u2064\u2066-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff\U000110bd\U000110cd"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f]"
)


def literal(name: str) -> str:
    """A name as one line of text: characters that control, or that no text may hold, by their codes."""
    return _CODED.sub(lambda found: _code(found[0]), name)


def _code(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def shortened(name: str, length: int) -> str:
    """A name as one line of at most `length` characters."""
    text = literal(name)
    return text if len(text) <= length else text[: length - 1] + "\u2026"

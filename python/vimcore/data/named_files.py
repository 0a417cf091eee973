# SPDX-License-Identifier: Apache-2.0
"""What a user names as pictures: files, folders, patterns, lists, standard input; the rules of vim-infer."""

from __future__ import annotations

import glob
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator

from .picture_files import LARGEST, STDIN, find_images, read_file

HELP = (
    "picture files, folders, patterns such as 'photos/*.jpg', @FILE: a list of these, - : a picture on stdin"
)


def named(arguments: Iterable[str]) -> list[str]:
    """Files and folders: @FILE is read as a list of them (@- from standard input), patterns are expanded.

    A file that has a pattern for its name is itself; a pattern without a match stays, for whoever reads it to
    report.

    Raises:
        ValueError: standard input is named twice; a list cannot be read.
    """
    found: list[str] = []
    readers = 0
    for argument in arguments:
        readers += argument in (STDIN, "@" + STDIN)
        if readers > 1:
            raise ValueError("-: standard input can be read once")
        if argument.startswith("@"):
            for line in _lines(argument[1:]):
                found += _expanded(os.path.join(".", line) if line == STDIN else line)
        else:
            found += [STDIN] if argument == STDIN else _expanded(argument)
    return found


def pictures_of(arguments: Iterable[str], passed_over: Counter[str] | None = None) -> list[str]:
    """Picture files, those of folders among them; "-" is standard input.

    Args:
        passed_over: counts files in folders that are no pictures, by suffix.

    Raises:
        ValueError: as `named`.
    """
    return list(find_images(named(arguments), passed_over))


def _expanded(name: str) -> list[str]:
    if os.path.lexists(name) or not glob.has_magic(name):
        return [name]
    return sorted(glob.glob(name), key=os.fsencode) or [name]


def _lines(path: str) -> Iterator[str]:
    """Of a list, without empty ones."""
    try:
        content = read_stdin() if path == STDIN else read_file(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot read the list: {error.strerror}") from None
    for line in content.split(b"\n"):
        if name := line.removesuffix(b"\r"):
            yield os.fsdecode(name)


def read_stdin() -> bytes:
    """All of standard input.

    Raises:
        OSError: it is closed, or more than the largest picture.
    """
    if sys.stdin is None:
        raise OSError(None, "standard input is closed")
    data = sys.stdin.buffer.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise OSError(None, f"standard input holds more than {LARGEST / 2**30:g} GiB")
    return data


def read_input(path: str) -> bytes:
    """The bytes of a file, or of standard input.

    Raises:
        OSError: as `read_file` and `read_stdin`.
    """
    return read_stdin() if path == STDIN else read_file(path)

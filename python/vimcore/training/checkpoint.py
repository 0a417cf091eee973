# SPDX-License-Identifier: Apache-2.0
"""Files of a run, each written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch

FORMAT = 1


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name, replacing another, when everything is on the disk."""
    if path.exists() and not path.is_file():  # as root one could replace /dev/null
        raise OSError(errno.EINVAL, "not a regular file, which no other may replace", str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Everything that a run needs to go on."""
    with atomic(path) as file:
        torch.save({"format": FORMAT, **content}, file)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `write_checkpoint` wrote, on the CPU; nothing in the file is executed.

    Raises:
        OSError, ValueError: there is none, or it is damaged or of another version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: not a checkpoint, or damaged: {reason}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint that this version of vimcore can continue")
    return content


def write_text(path: Path, text: str) -> None:
    """A text file."""
    with atomic(path) as file:
        file.write(text.encode())


def rewrite_lines(path: Path, keep: Callable[[bytes], bool]) -> None:
    """Drops the lines of a file that `keep` refuses."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        with atomic(path) as file:
            file.writelines(line for line in lines if line.endswith(b"\n") and keep(line))

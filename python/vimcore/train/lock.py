# SPDX-License-Identifier: Apache-2.0
"""One process writes into the folder of a run, and finds it without leftovers."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
from pathlib import Path

from ..utils.files import literal, named

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<process>\d+)\.tmp|\.vimcore-(?P<other>\d+)-\d+\.tmp")
_NONE_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # file systems without locks
_held: set[int] = set()  # descriptors of this process


class Lock:
    """Held from `take` to `release`, or until the process ends, however it ends."""

    NAME = ".lock"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.descriptor = -1
        self.notes: list[str] = []  # to be told

    def take(self) -> None:
        """Takes it, if it is not held; makes the folder.

        Raises:
            ValueError: another process has it; names that.
            OSError: the folder cannot be written.
        """
        if self.descriptor >= 0:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / self.NAME
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with named(path):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno in _NONE_HERE:
                self.notes = [f"{path}: {error.strerror}: take care that no other process writes this run"]
                return
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise ValueError(
                f"{self.folder}: {literal(holder) or 'another process'} is writing this run; "
                "wait until it ends, stop it, or name another --out"
            ) from None
        self.descriptor = descriptor
        _held.add(descriptor)

    def release(self) -> None:
        """Gives it back; the file stays, since another process may be waiting for this very one."""
        if self.descriptor >= 0:
            _held.discard(self.descriptor)
            os.close(self.descriptor)
            self.descriptor = -1


def _forget() -> None:
    """In a forked child, such as a process that loads images: it must not keep the lock when we are gone."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget)


def remove_leftovers(folder: Path, own: tuple[str, ...]) -> list[str]:
    """Removes temporary files that processes left when they were killed; returns their names.

    Args:
        own: files that only the holder of the lock writes, so that a temporary one of them belongs to nobody.
    """
    removed = []
    for path in sorted(folder.iterdir()):
        found = _TEMPORARY.fullmatch(path.name)
        if not found or not path.is_file():
            continue
        if found["name"] in own or not _alive(int(found["process"] or found["other"])):
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed


def _alive(process: int) -> bool:
    if process == os.getpid():
        return False  # an earlier one of this number: this one has not written yet
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True

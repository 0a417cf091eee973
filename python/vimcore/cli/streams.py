# SPDX-License-Identifier: Apache-2.0
"""Standard output and error of a command, which may be closed, full, or a pipe whose reader has gone.

Results that cannot be written make the command fail; messages that cannot be written are dropped.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from ..utils.files import literal


class _Stream(io.FileIO):
    """Descriptor 1 or 2. A failed write is dropped; on 1 the first one raises, and is kept in `lost`."""

    lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        if self.lost is None:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = error
                if self.fileno() == 1:
                    raise
        return memoryview(data).nbytes


def _text(number: int, like: TextIO | None, errors: str) -> io.TextIOWrapper:
    """A text stream to a descriptor, buffered as `like`, or as a pipe without it."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Stream(number, "w", closefd=False)),
        getattr(like, "encoding", "utf-8"),
        errors,
        line_buffering=number == 2 or getattr(like, "line_buffering", False),
        write_through=getattr(like, "write_through", False),
    )


def _occupy() -> None:
    """Opens closed descriptors: else the next file opened would get their number. 1 is opened for reading."""
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)  # the lowest one that is free


@contextmanager
def standard_streams() -> Iterator[None]:
    """Within it, `sys.stdout` and `sys.stderr` exist, and writing to `sys.stderr` never fails.

    Streams that replaced them, such as those of a test, are kept. Warnings become messages, but for Pillow's
    about single pictures, of which it does not say which: they are read, or an error names them.
    """
    before = sys.stdout, sys.stderr
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    _occupy()
    if sys.stdout is None or sys.stdout is sys.__stdout__:
        sys.stdout = _text(1, sys.stdout, "surrogateescape")  # names of files as the system has them
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        sys.stderr = _text(2, sys.stderr, "backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
            warnings.showwarning = lambda message, *_: complain(f"warning: {message}")
            yield
    finally:
        sys.stdout, sys.stderr = before


def lost_output() -> OSError | None:
    """The error of a failed write to standard output; None if all was written."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return error
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.lost if isinstance(raw, _Stream) else None


def one_line(text: str) -> str:
    """A message of several lines as one line, as in vim-infer.

    Characters that control, and bytes of names that are not UTF-8, become their codes, see `literal`.
    """
    return literal(re.sub(r"(:?) *\n *", lambda found: ": " if found[1] else "; ", text.strip()))


def complain(text: str) -> None:
    """Prints a message on stderr, as one line."""
    print(f"vimcore: {one_line(text)}", file=sys.stderr, flush=True)

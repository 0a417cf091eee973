# SPDX-License-Identifier: Apache-2.0
"""Calls in child processes that begin with what this one has imported, torch included."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

LONGEST = 300  # seconds


def start(call: Callable[[], int | None], *, out: int = 1, err: int = 2, cwd: Path | None = None) -> int:
    """The number of a child process that makes the call and exits with what it returns.

    Args:
        out, err: files that take what the child writes.
    """
    child = os.fork()
    if child == 0:
        _become(call, out, err, cwd)
    return child


def _become(call: Callable[[], int | None], out: int, err: int, cwd: Path | None) -> NoReturn:
    status = 1
    try:
        signal.alarm(LONGEST)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        if cwd is not None:
            os.chdir(cwd)
        status = call() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # whatever happens, here are no further tests


def run(call: Callable[[], int | None], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """What the call wrote and returned, once it has ended."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = start(call, out=out.fileno(), err=err.fileno(), cwd=cwd)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess([], status, out.read(), err.read())


def run_script(path: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """As `python PATH ARGUMENTS` would."""

    def call() -> None:
        sys.argv = [str(path), *arguments]
        sys.path.insert(0, str(path.parent))
        runpy.run_path(str(path), run_name="__main__")

    return run(call, cwd)

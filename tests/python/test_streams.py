# SPDX-License-Identifier: Apache-2.0
"""Standard output and error that are closed, full, or left by their reader: no traceback, no silence."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from picture_kinds import tiff
from PIL import Image
from vim_infer import BINARY, picture
from vimcore.cli import main
from vimcore.cli.streams import one_line, standard_streams

FULL = "cannot write the results: No space left on device"
CLOSED = "cannot write the results: Bad file descriptor"
VIMCORE = (sys.executable, "-m", "vimcore")


def shell(words: tuple[str, ...], redirected: str, unbuffered: str = "") -> subprocess.CompletedProcess[str]:
    """Runs it with the shell's redirections."""
    command = ["sh", "-c", f'exec "$@" {redirected}', "sh", *words]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize(
    ("words", "redirected", "status", "message"),
    [
        (("plan",), ">&-", 1, CLOSED),
        (("plan", "--json"), ">/dev/full", 1, FULL),
        (("--help",), ">/dev/full", 1, FULL),
        (("plan", "--batch", "0"), ">&- 2>&-", 2, ""),
        (("plan", "--batch", "1"), "2>&-", 0, ""),
        (("plan", "--weights", "absent"), "2>/dev/full", 1, ""),
        (("plan", "--batch", "1"), ">&- 2>&-", 1, ""),
    ],
)
def test_vimcore(words: tuple[str, ...], redirected: str, status: int, message: str) -> None:
    done = shell((*VIMCORE, *words), redirected)
    assert done.returncode == status
    assert done.stderr == (f"vimcore: {message}\n" if message else "")
    assert bool(done.stdout) == (status == 0)


def test_without_buffers() -> None:
    done = shell((*VIMCORE, "--help"), ">/dev/full", unbuffered="1")
    assert (done.returncode, done.stderr) == (1, f"vimcore: {FULL}\n")


def test_vim_infer_says_the_same() -> None:
    for redirected, message in ((">&-", CLOSED), (">/dev/full", FULL)):
        done = shell((BINARY, "info"), redirected)
        assert (done.returncode, done.stderr) == (1, f"vim-infer: {message}\n")
    assert shell((BINARY, "info"), "2>&-").returncode == 0


@pytest.mark.slow
def test_no_message_lands_between_the_results(weights: Path, tmp_path: Path) -> None:
    for i in range(3):
        picture(30, 40, i).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"not a picture")
    words = ("predict", "--weights", str(weights), "--json", str(tmp_path))
    whole, deaf = (shell((*VIMCORE, *words), redirected) for redirected in ("", "2>&-"))
    assert whole.returncode == deaf.returncode == 1
    assert "1 of 3 images failed" in whole.stderr
    assert deaf.stdout == whole.stdout
    assert len([json.loads(line) for line in deaf.stdout.splitlines()]) == 3


def test_warnings_are_messages(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line; Pillow's about a picture that it reads are none."""
    data = tiff(np.zeros((4, 4, 3), np.uint8), 8)
    planes, long = struct.pack("<HHI", 284, 3, 1), struct.pack("<HHI", 305, 2, 1 << 31)
    assert planes in data
    (tmp_path / "odd.tif").write_bytes(data.replace(planes, long))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        with pytest.warns(UserWarning, match="larger than file"):
            Image.open(tmp_path / "odd.tif").load()
        main(["predict", "--weights", str(weights), str(tmp_path / "odd.tif")])
        assert "larger than file" not in capsys.readouterr().err
        with standard_streams():
            warnings.warn("new\nwords", stacklevel=1)
        assert capsys.readouterr().err == "vimcore: warning: new; words\n"
        assert warnings.showwarning is before


def test_one_line() -> None:
    assert (
        one_line("f does not fit:\n  missing: a\n  missing: b\n") == "f does not fit: missing: a; missing: b"
    )
    assert one_line("a\nb\tc\x1b[31m\x7f\udcff\u00e9") == "a; b\\tc\\x1b[31m\\x7f\\xff\u00e9"

# SPDX-License-Identifier: Apache-2.0
"""Training from folders and lists as they come: odd files, odd names, odd tables, reads that never end."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest
from train_helpers import ONCE, SMALL, folder, log
from vimcore.cli import main
from vimcore.data.classes import open_images, passed_over, training_and_validation
from vimcore.data.lists import read_list

# ---- folders -----------------------------------------------------------------------------------------------


def odd_folder(path: Path) -> Path:
    """Two classes of six pictures, and what else lies in such folders."""
    root = folder(path, digits=(0, 1), each=6)
    one = root / "digit 1"
    for name in ("a.jxl", "b.JXL", "c.psd", "notes", ".DS_Store", "Thumbs.db"):
        (one / name).write_bytes(b"x")
    (root / "labels.txt").write_text("x")
    (root / "loose.png").write_bytes((one / "000.png").read_bytes())
    (one / "link").symlink_to(root / "digit 0")
    return root


ODD = {
    ".jxl": 2,
    ".psd": 1,
    "no suffix": 1,
    "linked folder": 1,
    ".txt outside class folders": 1,
    ".png outside class folders": 1,
}


def test_files_passed_over_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, run = odd_folder(tmp_path / "x"), tmp_path / "run"
    found = open_images(str(root))
    assert (len(found), dict(found.passed_over)) == (12, ODD)
    train, valid, _ = training_and_validation(str(root), None, 0.5)
    assert passed_over(train, valid) == ODD
    train, valid, _ = training_and_validation(str(root), str(root), 0.5)
    assert passed_over(train, valid) == {kind: 2 * count for kind, count in ODD.items()}

    arguments = ["--data", str(root), "--val-fraction", "0.5", "--out", str(run), *SMALL, *ONCE]
    assert main(["train", *arguments, "--batch-size", "4", "--epochs", "1", "--json"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["passed_over"] == ODD
    assert "\nvimcore: passed over: 2 .jxl, 1 .png outside class folders, 1 .psd, " in error
    assert main(["eval", str(run / "best.safetensors"), "--data", str(root), "--json", "--workers", "0"]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["passed_over"] == ODD
    assert error.startswith("vimcore: passed over: 2 .jxl, ")
    assert main(["eval", str(run), "--data", str(root), "--out", str(tmp_path / "answers.csv")]) == 1
    assert "expected a name that ends with .npz" in capsys.readouterr().err

    (tmp_path / "none" / "class").mkdir(parents=True)
    (tmp_path / "none" / "class" / "a.jxl").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"no images in class folders .*; passed over: 1 \.jxl"):
        open_images(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'none'))}: no images"):  # its name once
        training_and_validation(str(root), str(tmp_path / "none"), 0.1)


@pytest.mark.slow
def test_pipes_sockets_and_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, run = folder(tmp_path / "x", digits=(0, 1), each=8), tmp_path / "run"
    one = os.fsencode(root / "digit 1")
    os.rename(one + b"/000.png", one + b"/\xff\xe9.png")
    os.mkfifo(one + b"/pipe.png")
    os.mkfifo(one + b"/\xffpipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(one + b"/socket.png")
    arguments = ["--data", str(root), "--val", str(root), "--out", str(run), *SMALL, *ONCE, "--epochs", "2"]
    assert main(["train", *arguments, "--batch-size", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["skipped"] == 3
    errors = {os.fsencode(line["file"]): line["error"] for line in log(run) if line["kind"] == "fault"}
    names = (b"pipe.png", b"\xffpipe.png", b"socket.png")
    assert errors == {one + b"/" + name: "not a regular file" for name in names}
    saved = np.load(run / "eval.npz")
    assert one + b"/\xff\xe9.png" in set(map(os.fsencode, saved["files"].tolist()))
    os.rename(one, one[:-1] + b"\xff")
    with pytest.raises(ValueError, match=r"the name of class digit \\xff is not UTF-8"):
        open_images(str(root))


# ---- lists -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["list.csv", "LIST.CSV", "list.tsv", "List.Tsv"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_lists(name: str, encoding: str, tmp_path: Path) -> None:
    tab = "\t" if name.lower().endswith("tsv") else ","
    rows = [
        ["label", "split", "path"],
        ["\u00fcber", "x", "a b.png"],
        ["10", "", "sub/\u2028.PNG"],
        ["9", "", '"c"'],
    ]
    text = "\r\n".join(tab.join(row) for row in rows).replace('"c"', '"q\ruoted"') + "\r\n\r\n"
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_list(str(tmp_path / name)) == [
        ("a b.png", "\u00fcber"),
        ("sub/\u2028.PNG", "10"),
        ("q\ruoted", "9"),
    ]
    found = open_images(str(tmp_path / name)) if "9" in text else None
    assert found is not None
    assert found.classes == ["10", "9", "\u00fcber"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,label\na.png,1\nb\xe9.png,2\n", r"line 3: expected UTF-8 or marked UTF-16, got byte 0xe9"),
        (b"\xff\xfep\x00a\x00t", r"line 1: expected UTF-8"),
        (b"path,label\na.png,1\n" + b"x" * 200_000 + b",1\n", r"line 3: field larger than field limit"),
        (b"path,label\na\x00.png,1\n", r"line 2: .*NUL"),
        (b"path,label\na.png\n", r"line 2: expected a path and a label, got \['a.png'\]"),
        (b"path,label\n\n\na.png,1\n,2\n", r"line 5: expected a path and a label"),
        (b"path,label\na,b.png,cat\n", r"line 2: expected 2 fields, got 3: .*quote a comma"),
        (b"path,label,path\n", r"expected the columns path and label, got"),
        (b"path\tlabel\na.png\t1\n", r"expected the columns path and label, got"),
        (b"", r"expected the columns path and label, got \[\]"),
        (b"path,label\n", r"no rows below the columns' names"),
    ],
)
def test_lists_that_are_wrong(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "list.CSV"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"list.CSV: {message}"):
        open_images(str(path))
    assert main(["train", "--data", str(path), "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"vimcore: {path}: ")
    assert error.count("\n") == 1


def test_a_list_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "list.csv")
    with pytest.raises(OSError, match="not a regular file"):
        open_images(str(tmp_path / "list.csv"))


def test_arrays_with_large_letters(tmp_path: Path) -> None:
    for label in "ab":
        (tmp_path / label).mkdir()
        np.save(tmp_path / label / "x.npy", np.zeros((2, 8, 8), np.float32))
        (tmp_path / label / "x.npy").rename(tmp_path / label / "X.NPY")
    found = open_images(str(tmp_path))
    assert found.arrays
    assert found.read(1).shape == (2, 8, 8)

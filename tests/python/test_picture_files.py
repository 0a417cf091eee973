# SPDX-License-Identifier: Apache-2.0
"""Folders as they come: what is read, what is passed over, what cannot be read; both programs alike."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from pathlib import Path

import pytest
import vimcore
from PIL import Image
from vim_infer import picture, run, same_as_python
from vimcore import _core
from vimcore.analysis.health import health_of_file
from vimcore.cli import main
from vimcore.data import picture_files
from vimcore.data.picture_files import find_images, passed_over_text, read_file, walk
from vimcore.data.pictures import network_input
from vimcore.tools.predict import predict

PASSED_OVER = {
    ".heic": 1,
    ".jxl": 3,
    ".psd": 1,
    "linked folder": 1,
    "no suffix": 2,
}
TEXT = "passed over: 3 .jxl, 2 no suffix, 1 .heic, 1 .psd, 1 linked folder"


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Three pictures, among them one with a name that is no UTF-8, and what else folders hold."""
    root = tmp_path / "odd"
    for name in ("sub/deeper", ".git", "empty"):
        (root / name).mkdir(parents=True)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", ".git/config", ".hidden.jxl"):
        (root / name).write_bytes(b"x")
    for name in (
        "a.jxl",
        "b.JxL",
        "sub/c.jxl",
        "sub/d.psd",
        "sub/deeper/e.heic",
        "README",
        "sub/Makefile",
    ):
        (root / name).write_bytes(b"x")
    (root / "sub" / "circle").symlink_to(root)
    picture(40, 50, 1).save(root / "one.png")
    picture(40, 50, 2).save(root / "sub" / "TWO.JPG")
    os.rename(root / "sub" / "TWO.JPG", os.fsencode(root / "sub") + b"/\xff\xe9.JPG")
    picture(40, 50, 3).save(root / "sub" / "deeper" / "z.ppm")
    return root


# ---- what is found -----------------------------------------------------------------------------------------


def test_what_is_passed_over(odd: Path) -> None:
    counts = Counter[str]()
    found = [os.path.relpath(name, odd) for name in find_images([str(odd)], counts)]
    assert found == ["one.png", "sub/\udcff\udce9.JPG", "sub/deeper/z.ppm"]
    assert counts == PASSED_OVER
    assert passed_over_text(counts) == TEXT
    assert list(find_images([str(odd / "a.jxl")], counts)) == [str(odd / "a.jxl")]  # named, so it is meant
    assert counts == PASSED_OVER


def test_many_kinds_are_told_in_one_line() -> None:
    counts = {f".{i:03d}": 1 + (i == 70) for i in range(100)}
    text = passed_over_text(counts)
    assert text.startswith("passed over: 2 .070, 1 .000, 1 .001, ")
    assert text.endswith(", 1 .010, 88 of other kinds")


def test_a_folder_that_cannot_be_read_stays(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(picture_files.os, "scandir", refuse)
    assert list(walk(str(odd), (".png",))) == [str(odd / "one.png"), str(odd / "sub")]


@pytest.mark.slow
def test_a_very_deep_folder(tmp_path: Path) -> None:
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1500):
            os.mkdir("d")
            os.chdir("d")
        Path("x.png").write_bytes(b"")
        os.chdir(tmp_path)
        (name,) = list(find_images(["d"]))
        assert name == "/".join("d" * 1500) + "/x.png"
        os.remove(name)
        os.removedirs(os.path.dirname(name))  # what removes the others is recursive
    finally:
        os.chdir(here)


# ---- both programs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [["--json"], ["--json", "--logits"]])
def test_both_programs_tell(
    form: list[str], weights: Path, odd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = same_as_python(capsys, "predict", "--weights", weights, *form, odd)
    assert (done.returncode, done.stderr) == (0, f"vim-infer: {TEXT}\n")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [os.path.relpath(line["image"], odd) for line in lines] == [
        "one.png",
        "sub/\udcff\udce9.JPG",
        "sub/deeper/z.ppm",
    ]
    assert "\\udcff\\udce9" in done.stdout
    assert ["passed_over" in line for line in lines] == [False, False, True]
    assert lines[-1]["passed_over"] == PASSED_OVER


def test_names_that_are_no_text_in_a_table(
    weights: Path, odd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "--weights", str(weights), str(odd / "sub")]) == 0
    out, error = capsys.readouterr()
    assert f"{odd}/sub/\\xff\\xe9.JPG\n" in out
    assert error == "vimcore: passed over: 1 .heic, 1 .jxl, 1 .psd, 1 linked folder, 1 no suffix\n"


def test_nothing_but_other_files(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "x" / "y" / "a.jxl").write_bytes(b"x")
    done = same_as_python(capsys, "predict", "--weights", weights, "--json", tmp_path / "x")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "vim-infer: passed over: 1 .jxl\n"
        "vim-infer: no pictures found (JPEG, PNG, PPM, PGM, WebP, TIFF, BMP, GIF, AVIF)\n"
    )


def test_turned_pictures_are_seen_upright(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight files of one scene, held and noted in eight ways: one answer."""
    scene = picture(33, 47, 5)
    back = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    for value, how in back.items():
        tags = Image.Exif()
        tags[0x0112] = value
        (scene if how is None else scene.transpose(how)).save(tmp_path / f"{value}.png", exif=tags)
    done = same_as_python(capsys, "predict", "--weights", weights, "--json", "--logits", tmp_path)
    assert done.returncode == 0
    assert len({str(json.loads(line)["logits"]) for line in done.stdout.splitlines()}) == 1


def test_what_is_no_regular_file(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is opened that might wait or never end."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "device.png").symlink_to("/dev/urandom")
    (tmp_path / "null.png").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
    done = same_as_python(capsys, "predict", "--weights", weights, "--json", tmp_path, "/dev/urandom")
    assert done.returncode == 1
    found = {
        os.path.basename(line["image"]): line["error"] for line in map(json.loads, done.stdout.splitlines())
    }
    assert found.pop("loop.png") == "Too many levels of symbolic links"
    assert set(found) == {"pipe.png", "device.png", "null.png", "socket.png", "urandom"}
    assert set(found.values()) == {"not a regular file"}
    with pytest.raises(OSError, match="not a regular file"):
        read_file(str(tmp_path))
    with open(tmp_path / "large.png", "wb") as file:
        file.truncate(2**31 + 1)
    done = same_as_python(capsys, "predict", "--weights", weights, "--json", tmp_path / "large.png")
    assert json.loads(done.stdout)["error"] == "file is larger than 2 GiB"


def test_no_reason_is_empty(weights: Path, odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(_core, "preprocess_image", fail)
    found = list(predict(vimcore.Runtime(weights), [str(odd / "one.png")]))
    assert [(line.image, line.error) for line in found] == [(str(odd / "one.png"), "out of memory")]


def test_errors_name_files_that_are_no_text(odd: Path) -> None:
    with pytest.raises(_core.Error, match=r"\[decode_image\] b\\xff\.png: neither JPEG"):
        network_input(b"x", "b\udcff.png", _core.Preprocess())


def test_health_tells_too(weights: Path, odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health", "--weights", str(weights), "--count", "3", "--json", str(odd)]) == 0
    out, error = capsys.readouterr()
    assert json.loads(out)["images"] == 3
    assert json.loads(out)["passed_over"] == PASSED_OVER
    assert error == f"vimcore: {TEXT}\n"
    assert main(["health", "--weights", str(weights), str(odd / "empty")]) == 1
    (odd / "empty" / "a.jxl").write_bytes(b"x")
    assert main(["health", "--weights", str(weights), str(odd / "empty")]) == 1
    assert capsys.readouterr().err.splitlines()[-2:] == [
        "vimcore: passed over: 1 .jxl",
        "vimcore: no pictures found (JPEG, PNG, PPM, PGM, WebP, TIFF, BMP, GIF, AVIF)",
    ]
    os.mkfifo(odd / "a.png")
    with pytest.raises(OSError, match="not a regular file"):
        health_of_file(str(weights), [str(odd)], 1)


# ---- vim-infer features ------------------------------------------------------------------------------------


def test_features_tell_too(weights: Path, odd: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    done = run("features", "--weights", weights, "--out", out, "--json", odd)
    assert json.loads(done.stdout)["passed_over"] == PASSED_OVER
    assert done.stderr == f"vim-infer: {TEXT}\n"
    _, metadata = _core.read_safetensors(str(out))
    assert "\\udcff\\udce9.JPG" in metadata["vimcore.images"]


@pytest.mark.parametrize("name", ["f.zip", "f.json", "plain", "f.safetensors.gz", "f.v2"])
def test_features_are_not_written_under_a_false_name(
    name: str, weights: Path, odd: Path, tmp_path: Path
) -> None:
    done = run("features", "--weights", weights, "--out", tmp_path / name, odd)
    assert (done.returncode, done.stdout) == (2, "")
    wanted = ".csv, .npy, .npz, .safetensors"
    assert f"--out: expected a name that ends with {wanted}, got '{tmp_path}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / name).exists()


def test_features_do_not_replace_a_pipe(weights: Path, odd: Path, tmp_path: Path) -> None:
    for name in ("f.safetensors", "F.SafeTensors", "f.NPZ"):
        assert run("features", "--weights", weights, "--out", tmp_path / name, odd).returncode == 0
    os.mkfifo(tmp_path / "pipe.npy")
    done = run("features", "--weights", weights, "--out", tmp_path / "pipe.npy", odd / "one.png")
    assert done.returncode == 1
    assert "pipe.npy: a device, pipe or socket, which no file may replace" in done.stderr
    assert (tmp_path / "pipe.npy").is_fifo()

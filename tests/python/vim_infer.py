# SPDX-License-Identifier: Apache-2.0
"""The binary vim-infer beside the Python command: how to call it, networks and pictures for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import vimcore
from PIL import Image
from vimcore.cli import main
from vimcore.io import save_model

LABELS = ["cat", 'a "dog"', "owl\\", "\u00fcber \U0001f600", "tab\t\x01\x7f"]


def find_binary() -> str:
    """The one that was installed with this Python's vimcore, or what VIM_INFER names."""
    beside = Path(sys.executable).parent / "vim-infer"
    named = os.environ.get("VIM_INFER") or (str(beside) if beside.exists() else shutil.which("vim-infer"))
    assert named, "vim-infer is not installed beside this Python"
    return named


BINARY = find_binary()


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [BINARY, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **options)  # type: ignore[call-overload, no-any-return]


def save(path: Path, labels: list[str] | None = None, **options: object) -> Path:
    torch.manual_seed(3)
    arguments = {
        "img_size": (24, 32),
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_classes": 5,
        **options,
    }
    model = vimcore.VisionMamba(**arguments)
    if arguments["num_classes"]:
        torch.nn.init.normal_(model.head.weight, std=2)
    save_model(model, path, labels)
    return path


def picture(height: int, width: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    planes = [
        127 + 90 * np.sin((c + 1) * x / 11 + y / (7 + c)) + rng.normal(0, 20, x.shape) for c in range(3)
    ]
    return Image.fromarray(np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8))


def make_pictures(folder: Path) -> None:
    """Every kind of file that is read, some that are not, and odd names."""
    (folder / "b" / "deep").mkdir(parents=True)
    (folder / "a.b").mkdir()
    for i, sampling in enumerate(["4:4:4", "4:2:2", "4:2:0"]):
        for progressive in (False, True):
            path = folder / "b" / f"{sampling.replace(':', '')}{progressive:d}.jpg"
            picture(40 + 9 * i, 70 - 5 * i, i).save(path, subsampling=sampling, progressive=progressive)
    picture(33, 44, 3).convert("L").save(folder / "b" / "grey.JPEG")
    picture(33, 44, 4).convert("CMYK").save(folder / "b" / "cmyk.jpg")
    picture(90, 31, 5).save(folder / "a.b" / "rgb.png")
    picture(24, 32, 6).convert("P").save(folder / "a.b" / "palette.PNG")
    picture(50, 50, 7).convert("L").save(folder / "a.b" / "grey.png")
    rgba = picture(50, 80, 8).convert("RGBA")
    rgba.putalpha(picture(50, 80, 9).convert("L"))
    rgba.save(folder / "a.b" / "alpha.png")
    picture(5, 6, 10).save(folder / "small.ppm")
    picture(30, 40, 11).convert("L").save(folder / "b" / "deep" / "grey.pgm")
    picture(30, 40, 12).save(folder / 'quote" \\ and\ttab \u00e9.png')
    whole = (folder / "b" / "4440.jpg").read_bytes()
    (folder / "b" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "b" / "text.png").write_text("not a picture")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("not looked at")
    (folder / "nowhere.png").symlink_to(folder / "absent")
    (folder / "b" / "circle").symlink_to(folder)


def same_as_python(
    capsys: pytest.CaptureFixture[str], *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Runs both commands with the same arguments; output, messages and status must agree."""
    done = run(*arguments)
    status = main([str(a) for a in arguments])
    out, error = capsys.readouterr()
    assert done.stdout == out
    assert done.stderr == error.replace("vimcore: ", "vim-infer: ")
    assert done.returncode == status
    return done

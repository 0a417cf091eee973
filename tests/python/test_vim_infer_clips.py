# SPDX-License-Identifier: Apache-2.0
"""vim-infer on clips: the same lines as `vimcore predict`, features, and files that are no clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import vimcore
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file
from vim_infer import picture, run, same_as_python, save
from vimcore.data.clip_files import find_clips, read_clip

FRAMES = 3


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"frames": FRAMES, "class_token": "head", "average_directions": False}
    return save(
        tmp_path_factory.mktemp("weights") / "clips.safetensors",
        ["run", "jump", "wave", "swim", "fall"],
        **options,
    )


def frames(count: int, seed: int, height: int = 33, width: int = 41) -> NDArray[np.uint8]:
    return np.stack([np.asarray(picture(height, width, seed + t)) for t in range(count)])


def write_frames(folder: Path, clip: NDArray[np.uint8], name: str = "frame{}.png", first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, frame in enumerate(clip, first):
        Image.fromarray(frame).save(folder / name.format(number))
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is read, and much that is not."""
    root = tmp_path_factory.mktemp("clips")
    write_frames(root / "b" / "of twelve", frames(12, 0), first=95)  # frame100 comes after frame99
    write_frames(root / "b" / "jpeg", frames(3, 20), "0{}.JPG")
    write_frames(root / "a.b", frames(3, 30), "x{}y07.ppm")
    np.save(root / "colour.npy", frames(6, 40))
    np.save(root / "b" / "grey.NPY", frames(3, 50)[..., :1])
    (root / "b" / "grey.NPY.npy").rename(root / "b" / "grey.NPY")
    write_frames(root / "bad" / "four", frames(4, 60))
    write_frames(root / "bad" / "sizes", frames(2, 70))
    write_frames(root / "bad" / "sizes", frames(1, 70, height=20), first=2)
    write_frames(root / "bad" / "damaged", frames(3, 80))
    (root / "bad" / "damaged" / "frame1.png").write_text("not a picture")
    np.save(root / "bad" / "flat.npy", frames(3, 90)[0])
    np.save(root / "bad" / "float.npy", frames(3, 90).astype(np.float32))
    np.save(root / "bad" / "bool.npy", frames(3, 90) > 99)
    np.save(root / "bad" / "empty.npy", frames(3, 90)[:, :0])
    (root / "notes.txt").write_text("not looked at")
    (root / "b" / "circle").symlink_to(root)
    return root


@pytest.mark.parametrize("options", [["--json", "--logits"], ["--topk", "2"]])
def test_the_same_as_python(
    weights: Path, clips: Path, options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    done = same_as_python(capsys, "predict", "--weights", weights, *options, clips)
    assert done.returncode == 1
    assert "7 of 12 clips failed" in done.stderr
    assert "bad/damaged: frame1.png: " in done.stderr
    named = [f"{clips / 'b' / 'jpeg'}//", clips / "colour.npy", clips / "notes.txt"]
    done = same_as_python(capsys, "predict", "--weights", weights, *options, *named)
    assert "notes.txt: a clip is a folder of pictures or a .npy file" in done.stderr
    (tmp_path / "nothing").mkdir()
    done = same_as_python(capsys, "predict", "--weights", weights, *options, tmp_path / "nothing")
    assert "no clips found" in done.stderr


def test_logits_and_features_are_those_of_the_module(weights: Path, clips: Path, tmp_path: Path) -> None:
    runtime, model = vimcore.Runtime(weights), vimcore.VisionMamba.load(weights).eval()
    names = [name for name in find_clips(str(clips)) if "/bad/" not in name]
    assert len(names) == 5
    pixels = [torch.from_numpy(runtime.clip_input(read_clip(name, FRAMES))) for name in names]
    with torch.no_grad():
        tokens = torch.cat([model.forward_features(clip) for clip in pixels]).numpy()
    for flags, expected in (([], tokens[:, 0]), (["--tokens"], tokens)):
        out = tmp_path / "features.safetensors"
        (tmp_path / "list.txt").write_text("\n".join(names))
        done = run("features", "--weights", weights, "--out", out, *flags, f"@{tmp_path / 'list.txt'}")
        assert done.returncode == 0, done.stderr
        assert "of 5 clips" in done.stdout
        np.testing.assert_allclose(load_file(out)["features"], expected, atol=1e-4)
    done = run("bench", "--weights", weights, "--batches", 1, "--seconds", 0, "--json", *names)
    assert done.returncode == 0, done.stderr
    assert '"images": 5, "failed": 0' in done.stdout


def _rewritten(header: bytes, version: int = 1) -> Callable[[bytes], bytes]:
    """A file with another header before the same values."""

    def change(whole: bytes) -> bytes:
        values = whole[10 + int.from_bytes(whole[8:10], "little") :]
        size = len(header).to_bytes(2 if version == 1 else 4, "little")
        return b"\x93NUMPY" + bytes([version, 0]) + size + header + values

    return change


SHAPE = b"'shape': (3, 33, 41, 3)"
BYTES = b"{'descr': '|u1', 'fortran_order': False"
BAD = {
    "text": (lambda _: b"not an array at all", "not a NumPy array"),
    "empty": (lambda _: b"", "not a NumPy array"),
    "cut header": (lambda whole: whole[:40], "not a NumPy array"),
    "cut values": (lambda whole: whole[:-1], "the file is cut off"),
    "version": (_rewritten(b"{}", 4), "not a NumPy array"),
    "long header": (lambda whole: whole[:8] + b"\xff\xff" + whole[10:], "not a NumPy array"),
    "no shape": (_rewritten(BYTES + b"}"), "not a NumPy array"),
    "twice": (_rewritten(b"{'descr': '|u1', 'descr': '|u1'}"), "not a NumPy array"),
    "open": (_rewritten(b"{'descr': '|u1"), "not a NumPy array"),
    "negative": (
        _rewritten(BYTES + b", 'shape': (-3, 33, 41, 3)}"),
        "not a NumPy array",
    ),
    "huge": (
        _rewritten(
            b"{'descr': '|u1', 'fortran_order': False, 'shape': (3, 1099511627776, 1099511627776, 3)}"
        ),
        "the file is cut off",
    ),
    "beyond": (
        _rewritten(BYTES + b", 'shape': (3, 99999999999999999999, 1, 3)}"),
        "not a NumPy array",
    ),
    "records": (
        _rewritten(b"{'descr': [('a', '|u1')], 'fortran_order': False, " + SHAPE + b"}"),
        "an array of records",
    ),
    "fortran": (
        _rewritten(b"{'descr': '|u1', 'fortran_order': True, " + SHAPE + b"}"),
        "numpy.ascontiguousarray",
    ),
    "control": (
        _rewritten(b"{'descr': '\x1b[2J\x8d', 'fortran_order': False, " + SHAPE + b"}"),
        "not a NumPy array",
    ),
    "objects": (_rewritten(b"{'descr': '|O', 'fortran_order': False, " + SHAPE + b"}"), "got |O"),
}


def test_files_that_are_no_arrays(weights: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "good.npy", frames(3, 0))
    whole = (tmp_path / "good.npy").read_bytes()
    for name, (change, _) in BAD.items():
        (tmp_path / f"{name}.npy").write_bytes(change(whole))
    for version in (2, 3):
        header = b"{" + SHAPE + b', "descr": "|u1", \'fortran_order\': False, }  \n'
        (tmp_path / f"version{version}.npy").write_bytes(_rewritten(header, version)(whole))
    (tmp_path / "folder.npy").mkdir()
    names = [*BAD, "good", "version2", "version3", "missing"]
    done = run("predict", "--weights", weights, *(tmp_path / f"{name}.npy" for name in names))
    assert done.returncode == 1
    told = dict(
        line.removeprefix("vim-infer: ").rsplit(".npy: ", 1) for line in done.stderr.splitlines()[:-1]
    )
    assert {Path(name).name for name in told} == {*BAD, "missing"}
    for name, (_, expected) in BAD.items():
        assert expected in told[str(tmp_path / name)], name
    assert told[str(tmp_path / "missing")] == "No such file or directory"
    results = [part.split("\n", 1)[1] for part in done.stdout.split(f"{tmp_path}/")[1:]]
    assert results == [results[0]] * 3

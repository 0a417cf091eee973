# SPDX-License-Identifier: Apache-2.0
"""Ninety kinds of picture files: the pixels of Pillow and torchvision, by every way into the package."""

from __future__ import annotations

import json
import random
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from picture_kinds import Kind, all_kinds, encode, refused, rgb, rgba, tiff
from PIL import Image
from test_images import MEAN, STD
from torchvision.transforms import v2
from vim_infer import run
from vimcore import _core
from vimcore.cli import main
from vimcore.data import objects, pairs
from vimcore.data.classes import open_images
from vimcore.data.picture_files import SUFFIXES, find_images
from vimcore.data.pictures import decode, network_input
from vimcore.data.pillow_pictures import decode_with_pillow
from vimcore.data.unlabelled import open_unlabelled

SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 3}
KINDS = all_kinds()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Pillow warns of odd tags."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders a and b, every kind in one of them."""
    root = tmp_path_factory.mktemp("kinds")
    for i, kind in enumerate(KINDS):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        (root / "ab"[i % 2] / f"{kind.name}{kind.suffix}").write_bytes(kind.data)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    vimcore.VisionMamba(**SIZES).save(path)
    return str(path)


# ---- pixels ------------------------------------------------------------------------------------------------


def test_there_are_many() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 90
    assert {kind.suffix.lower() for kind in KINDS} == set(SUFFIXES)


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_pixels_and_input(kind: Kind) -> None:
    """Equal pixels; the network's input as torchvision makes it of them."""
    found = decode(kind.data, "a")
    np.testing.assert_array_equal(found, kind.pixels)
    assert found.flags.c_contiguous
    steps = v2.Compose([v2.Resize(18, v2.InterpolationMode.BICUBIC), v2.CenterCrop(16)])
    image = steps(Image.fromarray(found))
    want = (np.asarray(image).astype(np.float64) / 255 - MEAN) / STD
    got = network_input(kind.data, "a", _core.Preprocess(resize=18, crop=16))
    np.testing.assert_allclose(got.transpose(1, 2, 0), want, atol=2e-6)


def test_core_and_pillow_agree() -> None:
    """Where both decode: a build without libjpeg and libpng sees the same."""
    for kind in KINDS:
        assert kind.core == (_core.picture_kind(kind.data) in ("JPEG", "PNG", "PPM/PGM"))
        if kind.core:
            np.testing.assert_array_equal(_core.decode_image(kind.data, "a"), kind.pixels)
        else:
            with pytest.raises(
                _core.Error, match=r"\[decode_image\] a: .* in Python alone, with Pillow; conv"
            ):
                _core.decode_image(kind.data, "a")
        if _core.picture_kind(kind.data) != "PPM/PGM":
            np.testing.assert_array_equal(decode_with_pillow(kind.data, "a"), kind.pixels)


def test_a_build_without_libjpeg_and_libpng(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "build_info", lambda: {"jpeg": False, "png": False})
    monkeypatch.setattr(_core, "decode_image", None)
    for kind in KINDS:
        if kind.name.startswith(("jpeg", "png")):
            np.testing.assert_array_equal(decode(kind.data, "a"), kind.pixels)


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    for name in ("webp", "tiff-L", "bmp-L", "gif", "pgm-text"):
        kind = next(kind for kind in KINDS if kind.name == name)
        with pytest.raises(
            _core.Error, match=rf"a: {_core.picture_kind(kind.data)} needs Pillow; .*\[demo\]"
        ):
            decode(kind.data, "a")


# ---- ways into the package ---------------------------------------------------------------------------------


def test_training_reads_them(folder: Path) -> None:
    images = open_images(str(folder))
    assert len(images) == len(KINDS)
    known = {f"{kind.name}{kind.suffix}": kind.pixels for kind in KINDS}
    for i, file in enumerate(images.files):
        np.testing.assert_array_equal(images.read(i), known[Path(file).name])


def test_commands_and_runtime_agree(folder: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    """vimcore predict, Runtime.predict; vim-infer the same, or it says what it does not read."""
    files = list(find_images([str(folder)]))
    assert main(["predict", "--weights", weights, "--json", "--logits", str(folder)]) == 0
    by_command = {line["image"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(by_command) == files
    found = vimcore.Runtime(weights).predict(files)
    for one in found:
        assert np.allclose(by_command[one.image]["logits"], one.logits, atol=1e-6)
    done = run("predict", "--weights", weights, "--json", "--logits", folder)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["image"] for line in lines] == files
    core = {f"{kind.name}{kind.suffix}" for kind in KINDS if kind.core}
    for line in lines:
        if Path(line["image"]).name in core:
            assert np.allclose(line["logits"], by_command[line["image"]]["logits"], atol=1e-6)
        else:
            assert line["error"].endswith(
                "which vimcore reads in Python alone, with Pillow; convert it to PNG or JPEG"
            )
    assert done.returncode == 1
    assert "passed over" not in done.stderr


def test_other_tasks_read_them(folder: Path, tmp_path: Path) -> None:
    """Segmentation, detection, pretraining: images with masks beside them, or alone."""
    known = {f"{kind.name}{kind.suffix}": kind.pixels for kind in KINDS}
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for kind in KINDS:
        (tmp_path / "images" / f"{kind.name}{kind.suffix}").write_bytes(kind.data)
        mask = np.zeros(kind.pixels.shape[:2], np.uint8)
        Image.fromarray(mask).save(tmp_path / "masks" / f"{kind.name}.png")
    found, held, _ = pairs.training_and_validation(str(tmp_path), None, 0.5, pairs.Reading())
    assert len(found) + len(held) == len(KINDS)
    for i, file in enumerate(found.images.files):
        pixels, mask = found.pair(i)
        np.testing.assert_array_equal(pixels, known[Path(file).name])
        np.testing.assert_array_equal(objects.decoded(file), pixels)
        assert mask.shape == pixels.shape[:2]
    assert len(open_unlabelled(str(folder))) == len(KINDS)


@pytest.mark.slow
def test_search_and_explain(
    folder: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [f for f in find_images([str(folder)]) if f.endswith((".webp", ".tif", ".bmp", ".gif"))][::9]
    assert main(["search", "--weights", weights, "--no-cache", "--json", few[0], *few]) == 0
    found = [json.loads(line)["image"] for line in capsys.readouterr().out.splitlines()]
    assert sorted(found) == sorted(few[1:])
    out = tmp_path / "explained"
    assert main(["explain", "--weights", weights, "--what", "norms", "--out", str(out), few[0], few[-1]]) == 0
    assert len(list(out.rglob("*.png"))) >= 2


def test_pil_images_and_arrays_of_four_channels(weights: str) -> None:
    runtime = vimcore.Runtime(weights)
    want = runtime.embed(rgb())
    assert np.array_equal(runtime.embed(rgba()), want)
    assert np.array_equal(runtime.embed(np.asarray(rgba())), want)
    grey = np.arange(16 * 16, dtype=np.uint16).reshape(16, 16) * 257
    levels = Image.fromarray((grey // 257).astype(np.uint8))
    assert np.array_equal(runtime.embed(Image.fromarray(grey)), runtime.embed(levels))


# ---- what is not read --------------------------------------------------------------------------------------


def test_refused(tmp_path: Path, weights: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Both programs say the same, but where Pillow alone can know."""
    files = {name: tmp_path / name for name in refused()}
    for name, (data, text) in refused().items():
        files[name].write_bytes(data)
        with pytest.raises(_core.Error) as caught:
            decode(data, name)
        assert str(caught.value).startswith(f"[decode_image] {name}: ")
        assert text in str(caught.value)
    paths = [str(path) for path in files.values()]
    assert main(["predict", "--weights", weights, "--json", *paths]) == 1
    errors = {line["image"]: line["error"] for line in map(json.loads, capsys.readouterr().out.splitlines())}
    done = run("predict", "--weights", weights, "--json", *paths)
    for line in map(json.loads, done.stdout.splitlines()):
        if not line["image"].endswith(".tif"):
            assert line["error"] == errors[line["image"]]
    assert len(errors) == len(files)


def test_truncated() -> None:
    """Half a file is an error that names it, and no picture."""
    for kind in KINDS:
        if not kind.name.endswith("animated"):  # whose first frame lies in the first part
            with pytest.raises(_core.Error, match=r"\[decode_image\] half: "):
                decode(kind.data[: len(kind.data) * 2 // 5], "half")


@pytest.mark.slow
def test_damaged_files_never_crash() -> None:
    """Cut anywhere, bytes exchanged: pixels or an error of ours, whatever Pillow raises within."""
    draw = random.Random(7)
    read = errors = named = 0
    for kind in KINDS:
        for _ in range(25):
            data = bytearray(kind.data[: draw.choice([len(kind.data), draw.randrange(len(kind.data))])])
            for _ in range(draw.choice([1, 3, 10])):
                at = draw.choice([draw.randrange(len(data) or 1), draw.randrange(min(len(data), 200) or 1)])
                data[at : at + 1] = bytes([draw.choice([0, 1, 127, 255, draw.randrange(256)])])
            try:
                pixels = decode(bytes(data), "odd")
            except (_core.Error, MemoryError) as error:
                errors += 1
                named += isinstance(error, MemoryError) or "[decode_image] odd: " in str(error)
            else:
                assert pixels.dtype == np.uint8
                assert pixels.shape[2] == 3
                read += 1
    assert named == errors
    assert read > 100
    assert errors > 100


def test_bombs() -> None:
    """Files of a few bytes that claim gigabytes are refused before anything of that size is made."""
    gif = bytearray(encode(rgb(), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    bmp = bytearray(encode(rgb(), "BMP"))
    bmp[18:26] = struct.pack("<ii", 100_000, 100_000)
    wide = bytearray(encode(rgb(), "BMP"))
    wide[18:26] = struct.pack("<ii", 70_000, 1)
    large = bytearray(tiff(np.zeros((4, 4, 3), np.uint8), 8))
    for tag in (256, 257):
        at = large.index(struct.pack("<HHI", tag, 3, 1))
        large[at : at + 12] = struct.pack("<HHII", tag, 4, 1, 60_000)
    for data, text in (
        (gif, "exceeds limit of .*; PIL.Image.MAX_IMAGE_PIXELS sets the limit"),
        (bmp, "exceeds limit of .*; PIL.Image.MAX_IMAGE_PIXELS sets the limit"),
        (wide, "a side of 70000 pixels is longer than 65535"),
        (large, "exceeds limit of .*; PIL.Image.MAX_IMAGE_PIXELS sets the limit"),
        (b"P6 60000 60000 255 " + bytes(9), "truncated"),
        (b"P6 70000 7 255 " + bytes(9), "larger than 65535 a side"),
    ):
        with pytest.raises(_core.Error, match=r"\[decode_image\] bomb: .*" + text):
            decode(bytes(data), "bomb")


def test_nothing_else_of_pillow_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript would start another program."""
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(_core.Error, match="PostScript, which is not read"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a.eps")

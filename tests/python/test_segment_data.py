# SPDX-License-Identifier: Apache-2.0
"""Images with masks from folders and lists: what is read, what is passed over, what stops a run."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from vimcore.data.joint import Joint, JointAugment
from vimcore.data.masks import ClassIndexError, blended, mask_png, names_beside, overlay_jpeg, read_mask
from vimcore.data.pairs import Pairs, Reading, training_and_validation, validation
from vimcore.data.scenes import CLASSES, Scenes
from vimcore.data.segments import Training, Validation, collate
from vimcore.data.transforms import Input, UnreadableError

RAMP = np.arange(12, dtype=np.uint8).reshape(3, 4)


def save(path: Path, array: NDArray[Any], mode: str | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette([value for k in range(256) for value in (255 - k, k, 7)])
    (image.convert(mode) if mode == "1" else image).save(path, **options)
    return path


def data(path: Path, counts: dict[str, int], largest: int = 3, size: tuple[int, int] = (6, 8)) -> Path:
    """{part}/images/N.png and {part}/masks/N.png; values of masks from 0 to `largest`, and 255."""
    for part, count in counts.items():
        for n in range(count):
            mask = np.full(size, 255, np.uint8)
            mask[:, : largest + 1] = np.arange(largest + 1) if n == 0 else np.arange(largest + 1) % 2
            save(path / part / "images" / f"{n}.png", np.full((*size, 3), 10 * n, np.uint8))
            save(path / part / "masks" / f"{n}.png", mask)
    return path


def opened(path: Path | str, **options: Any) -> tuple[Pairs, Pairs, str]:
    return training_and_validation(str(path), options.pop("val", None), 0.25, Reading(**options))


# ---- masks -------------------------------------------------------------------------------------------------


def test_masks_are_written_with_a_byte_a_pixel() -> None:
    data = mask_png(np.zeros((5, 7), np.uint8), [[0, 0, 0], [1, 2, 3]])
    assert (data[24], data[25]) == (8, 3)  # bits, palette


@pytest.mark.parametrize("bits", [None, 4, 2])
def test_palette_masks_are_indices(tmp_path: Path, bits: int | None) -> None:
    array = RAMP % (2 ** (bits or 7))
    path = save(tmp_path / "m.png", array, "P", **({"bits": bits} if bits else {}))
    assert (read_mask(str(path)) == array).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_are_indices(tmp_path: Path, bits: int) -> None:
    """Of few bits, too, which Pillow stretches to 255 when it reads them."""
    import struct
    import zlib

    array = (RAMP.astype(int) % 2**bits).astype(np.uint8)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b""
    for row in array:
        digits = "".join(f"{value:0{bits}b}" for value in row)
        digits += "0" * (-len(digits) % 8)
        rows += b"\0" + bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))
    header = struct.pack(">IIBBBBB", 4, 3, bits, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    (tmp_path / "m.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert (read_mask(str(tmp_path / "m.png")) == array).all()


def test_masks_of_numpy_files(tmp_path: Path) -> None:
    np.save(tmp_path / "m.npy", RAMP.astype(np.int64))
    assert (read_mask(str(tmp_path / "m.npy")) == RAMP).all()


def test_reduced_zero_label(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", np.array([[0, 1, 2, 150, 254, 255]], np.uint8))
    assert read_mask(str(path), reduce_zero_label=True).tolist() == [[255, 0, 1, 149, 253, 255]]


def test_what_is_no_mask(tmp_path: Path) -> None:
    rgb = save(tmp_path / "rgb.png", np.zeros((3, 4, 3), np.uint8))
    deep = save(tmp_path / "deep.png", np.zeros((3, 4), np.uint16))
    jpeg = save(tmp_path / "jpeg.png", np.zeros((3, 4), np.uint8), format="JPEG")
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(save(tmp_path / "whole.png", RAMP).read_bytes()[:50])
    short = tmp_path / "short.png"
    short.write_bytes(b"\x89PNG\r\n\x1a\n")
    floats, large, wide = (tmp_path / f"{name}.npy" for name in ("floats", "large", "wide"))
    np.save(floats, np.zeros((3, 4)))
    np.save(large, np.array([[300]]))
    np.save(wide, np.zeros((2, 3, 4), np.uint8))
    for path, told in (
        (rgb, "got RGB of 8 bits; save the index"),
        (deep, "got grey of 16 bits"),
        (jpeg, "expected a PNG file"),
        (damaged, "truncated"),
        (short, "ends within its header"),
        (floats, "expected integers (H, W), got float64"),
        (large, "0 to 255, got 300"),
        (wide, "expected integers (H, W), got uint8 (2, 3, 4)"),
        (tmp_path / "missing.png", "No such file"),
    ):
        with pytest.raises(UnreadableError, match=re.escape(told)) as caught:
            read_mask(str(path))
        assert str(path) in str(caught.value)


def test_written_masks_and_overlays() -> None:
    palette = [(3 * k, 255 - k, k) for k in range(12)]
    with Image.open(io.BytesIO(mask_png(RAMP, palette))) as read:
        assert read.mode == "P"
        assert (np.asarray(read) == RAMP).all()
        assert (np.asarray(read.convert("RGB")) == np.array(palette)[RAMP]).all()
    picture = np.full((3, 4, 3), 101, np.uint8)
    assert (blended(picture, RAMP, palette) == (101 + np.array(palette)[RAMP]) // 2).all()
    assert overlay_jpeg(picture, RAMP, palette).startswith(b"\xff\xd8")


def test_names_of_classes(tmp_path: Path) -> None:
    assert names_beside(str(tmp_path)) is None
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tName\n1\t0.2\twall\n2\t0.1\tbuilding, edifice\n")
    assert names_beside(str(tmp_path), reduce_zero_label=True) == ["wall", "building"]
    assert names_beside(str(tmp_path)) == ["other", "wall", "building"]
    (tmp_path / "classes.txt").write_text("sky\n grün \n\n", encoding="utf-8")
    assert names_beside(str(tmp_path)) == ["sky", "grün"]
    for content, told in (("a\n\nb\n", "in every line"), ("", "in every line"), ("x\n" * 256, "at most 255")):
        (tmp_path / "classes.txt").write_text(content)
        with pytest.raises(ValueError, match=told):
            names_beside(str(tmp_path))


# ---- folders and lists -------------------------------------------------------------------------------------


def test_folders_of_images_and_masks(tmp_path: Path) -> None:
    data(tmp_path, {"train": 5, "val": 2})
    save(tmp_path / "train" / "masks" / "alone.png", RAMP)
    (tmp_path / "train" / "images" / "notes.txt").write_text("x")
    train, valid, about = opened(tmp_path)
    assert (len(train), len(valid)) == (5, 2)
    assert train.classes == valid.classes == ["0", "1", "2", "3"]
    assert train.images.passed_over == {".txt": 1, "masks without an image": 1}
    assert about == f"validated on {tmp_path / 'val'}"
    image, mask = train.pair(4)
    assert (image == 40).all()
    assert mask[0].tolist() == [0, 1, 0, 1, 255, 255, 255, 255]
    assert len(opened(tmp_path, val=str(tmp_path / "train"))[1]) == 5
    train, valid, about = opened(tmp_path / "train")
    assert (len(train), len(valid)) == (4, 1)
    assert "held out" in about
    assert train.fingerprint() != valid.fingerprint()
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    assert opened(tmp_path)[0].classes == list("abcde")
    assert validation(str(tmp_path), list("abcde"), False).images.files[0].endswith("val/images/0.png")
    with pytest.raises(ValueError, match="has the classes a, b, c, d, e, the network x"):
        validation(str(tmp_path), ["x"], False)
    with pytest.raises(ValueError, match="names 5, got 4"):
        opened(tmp_path, classes=4)


def test_ade20k_layout(tmp_path: Path) -> None:
    for part, count in (("training", 3), ("validation", 2)):
        for n in range(count):
            save(tmp_path / "images" / part / f"ADE_{n}.jpg", np.zeros((6, 8, 3), np.uint8))
            save(tmp_path / "annotations" / part / f"ADE_{n}.png", np.full((6, 8), 2 * n, np.uint8))
    train, valid, _ = opened(tmp_path, classes=150, reduce_zero_label=True)
    assert (len(train), len(valid), len(train.classes)) == (3, 2, 150)
    assert [int(train.pair(n)[1][0, 0]) for n in range(3)] == [255, 1, 3]
    assert valid.images.files[0].endswith("validation/ADE_0.jpg")
    assert opened(tmp_path, reduce_zero_label=True)[0].classes == list("0123")


def test_lists(tmp_path: Path) -> None:
    data(tmp_path, {"x": 4})
    rows = "".join(f"x/images/{n}.png,x/masks/{n}.png\n" for n in range(4))
    (tmp_path / "pairs.csv").write_text("path,mask\n" + rows)
    train, valid, _ = opened(tmp_path / "pairs.csv")
    assert (len(train), len(valid)) == (3, 1)
    assert train.pair(0)[1].shape == (6, 8)
    (tmp_path / "pairs.csv").write_text("path,label\nx/images/0.png,1\n")
    with pytest.raises(ValueError, match="expected the columns path and mask"):
        opened(tmp_path / "pairs.csv")


def test_scenes_as_data() -> None:
    train, valid, _ = opened("digits-scenes", scenes=7)
    assert (len(train), len(valid), train.classes) == (7, 200, list(CLASSES))
    assert (train.pair(0, seed=5)[0] == train.pair(3, seed=5)[0]).all()
    assert (train.pair(0, seed=5)[0] != train.pair(0, seed=6)[0]).any()
    assert (valid.pair(3)[0] == Scenes(held_out=True).draw(3).image).all()
    for options in ({"reduce_zero_label": True}, {"classes": 3}, {"val": "elsewhere"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            opened("digits-scenes", **options)


def test_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected ADE20K's images/training"):
        opened(tmp_path / "empty")
    with pytest.raises(OSError, match="missing"):
        opened(tmp_path / "missing")
    (tmp_path / "bare" / "images").mkdir(parents=True)
    (tmp_path / "bare" / "masks").mkdir()
    with pytest.raises(ValueError, match=r"no images \(JPEG"):
        opened(tmp_path / "bare")
    save(tmp_path / "bare" / "images" / "a.png", np.zeros((3, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="no masks"):
        opened(tmp_path / "bare")
    save(tmp_path / "bare" / "masks" / "a.png", RAMP)
    np.save(tmp_path / "bare" / "masks" / "a.npy", RAMP)
    with pytest.raises(ValueError, match="the same name without suffix"):
        opened(tmp_path / "bare")


# ---- samples -----------------------------------------------------------------------------------------------

PLAIN = JointAugment(None, (1.0, 1.0), 0.0, 1.0, False)


def joint(size: tuple[int, int] = (6, 8), channels: int = 3, arrays: bool = False) -> Joint:
    return Joint(Input(channels, size, [0.5] * channels, [0.25] * channels, min(size)), arrays, PLAIN)


def test_pairs_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    """Sizes differ, the mask is missing, a file is damaged: skipped; training goes on with the next pair."""
    data(tmp_path, {"train": 5})
    save(tmp_path / "train" / "masks" / "1.png", np.zeros((6, 7), np.uint8))
    (tmp_path / "train" / "masks" / "2.png").unlink()
    (tmp_path / "train" / "images" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    train, _, _ = training_and_validation(str(tmp_path), str(tmp_path / "train"), 0.1, Reading())
    names = [str(tmp_path / "train" / "images" / f"{n}.png") for n in (1, 2, 3)]
    sample = Training(train, joint())[1, 17]
    assert sample.indices == [4]
    assert list(sample.errors) == names
    whole = collate([Validation(train, joint())[n] for n in range(5)])
    assert whole.indices == [0, 4]
    assert list(whole.errors) == names
    told = [whole.errors[name] for name in names]
    assert told[0] == f"8 x 6 pixels, but its mask {tmp_path}/train/masks/1.png has 7 x 6"
    assert told[1] == "there is no mask of the same name"
    assert "PNG" in told[2]


def test_an_index_beyond_the_classes_stops_the_run(tmp_path: Path) -> None:
    data(tmp_path, {"train": 3, "val": 1}, largest=3)
    data(tmp_path, {"val": 1}, largest=5)
    train, valid, _ = opened(tmp_path)
    told = f"{tmp_path}/val/masks/0.png: holds class index 4, 5, expected 0 to 3"
    with pytest.raises(ClassIndexError, match=re.escape(told)):
        valid.pair(0)
    assert told in Validation(valid, joint())[0].fault
    assert Training(train, joint())[0, 1].fault == ""


def test_arrays_of_four_channels(tmp_path: Path) -> None:
    for n in range(2):
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        np.save(folder / f"{n}.npy", np.full((4, 6, 8), 51 * n, np.uint8))
        save(tmp_path / "masks" / f"{n}.png", np.zeros((6, 8), np.uint8))
    pairs, _, _ = training_and_validation(str(tmp_path), str(tmp_path), 0.1, Reading())
    assert pairs.images.arrays
    sample = Training(pairs, joint(channels=4, arrays=True))[1, 0]
    assert sample.images[0].shape == (4, 6, 8)
    assert torch.allclose(sample.images[0], torch.tensor((0.2 - 0.5) / 0.25))
    assert "expected 3 channels" in Training(pairs, joint(arrays=True))[1, 0].fault

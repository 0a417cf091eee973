# SPDX-License-Identifier: Apache-2.0
"""Pictures as they come: turned, in inks, of 16 bits, cut behind their pixels; against Pillow."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image, ImageOps
from test_images import by_pillow, chunk, encode, equal, interlaced_rows, needs_jpeg, needs_png, picture, png
from vimcore import _core
from vimcore.data import pictures as images

IMAGE = Image.fromarray(picture(23, 31))
Decode = Callable[[bytes, str], np.ndarray]
both = pytest.mark.parametrize(
    "decode", [_core.decode_image, images.decode_with_pillow], ids=["core", "pillow"]
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Pillow warns of damaged EXIF."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def upright(data: bytes) -> np.ndarray:
    """As Pillow turns it; as stored where its EXIF cannot be parsed."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        with contextlib.suppress(SyntaxError, struct.error):
            image = ImageOps.exif_transpose(image)
        return np.asarray(image.convert("RGB"))


def tiff(
    entries: list[tuple[int, int, int, int]],
    order: str = ">",
    mark: int = 42,
    at: int = 8,
    count: int | None = None,
) -> bytes:
    """EXIF data of entries: tag, type, count, value."""
    text = (b"MM" if order == ">" else b"II") + struct.pack(order + "HI", mark, at)
    text += struct.pack(order + "H", len(entries) if count is None else count)
    for tag, kind, number, value in entries:
        packed = struct.pack(order + "HH", value & 65535, 0) if kind == 3 else struct.pack(order + "I", value)
        text += struct.pack(order + "HHI", tag, kind, number) + packed
    return text + bytes(4)


JPEG, PNG = encode(IMAGE, "JPEG"), encode(IMAGE, "PNG")


def jpeg_with(*parts: bytes) -> bytes:
    """APP1 segments before what the picture has."""
    head = b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 2) + part for part in parts)
    return JPEG[:2] + head + JPEG[2:]


def png_with(*chunks: bytes, behind: bool = False) -> bytes:
    at = len(PNG) - 12 if behind else 33
    return PNG[:at] + b"".join(chunks) + PNG[at:]


def exif(data: bytes) -> list[bytes]:
    return [
        jpeg_with(b"Exif\0\0" + data),
        png_with(chunk(b"eXIf", data)),
        png_with(chunk(b"eXIf", data), behind=True),
    ]


# ---- orientation ----


@needs_jpeg
@needs_png
@both
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_orientation(mode: str, decode: Decode) -> None:
    stored = np.asarray(IMAGE.convert(mode).convert("RGB"))
    meant = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
        0: stored,
        9: stored,
        65535: stored,
    }
    for value, want in meant.items():
        tags = Image.Exif()
        tags[0x0112] = value
        equal(decode(encode(IMAGE.convert(mode), "PNG", exif=tags), "a.png"), want)
        for progressive in (False, True):
            data = encode(IMAGE.convert(mode), "JPEG", exif=tags, progressive=progressive)
            equal(decode(data, "a.jpg"), upright(data))


@needs_jpeg
@needs_png
def test_a_large_picture_is_turned() -> None:
    """More than one tile of the copy, no side a multiple of it."""
    stored = picture(131, 203)
    for value in range(1, 9):
        tags = Image.Exif()
        tags[0x0112] = value
        data = encode(Image.fromarray(stored), "PNG", exif=tags, compress_level=1)
        equal(_core.decode_image(data, "a.png"), upright(data))


@needs_jpeg
@needs_png
@pytest.mark.parametrize("order", [">", "<"])
def test_exif_of_other_writers(order: str) -> None:
    make = (0x010F, 2, 4, 0x61626300)
    for data, turned in (
        (tiff([make, (0x0112, 3, 1, 6)], order), True),
        (tiff([(0x0112, 4, 1, 6)], order), True),
        (tiff([(0x0112, 3, 1, 6), (0x0112, 3, 1, 1)], order), True),
        (tiff([(0x0112, 3, 1, 6)], order, mark=42 << 8), True),
        (b"Exif\0\0" + tiff([(0x0112, 3, 1, 6)], order), True),
        (tiff([make], order), False),
        (tiff([(0x0112, 3, 0, 6)], order), False),
        (tiff([(0x0112, 3, 1_000_000, 6)], order), False),
        (tiff([(0x0112, 3, 2**32 - 1, 6)], order), False),
        (tiff([(0x0112, 4, 2**30, 8)], order), False),
        (tiff([(0x0112, 3, 3, 2**32 - 1)], order), False),
        (tiff([(0x0112, 5, 1, 8)], order), False),
        (tiff([(0x0112, 99, 1, 6)], order), False),
        (tiff([(0x0112, 3, 1, 6)], order, at=2**32 - 1), False),
        (tiff([(0x0112, 3, 1, 6)], order, at=10), False),
        (tiff([(0x0112, 3, 1, 6)], order, mark=43 << 3), False),
        (tiff([(0x0112, 3, 1, 6)], order, count=0), False),
        (tiff([(0x0112, 3, 1, 6)], order, count=65535), True),
        (b"XX" + tiff([(0x0112, 3, 1, 6)], order)[2:], False),
        (b"", False),
    ):
        for file in exif(data)[: 1 if data.startswith(b"Exif") else 3]:
            got = _core.decode_image(file, "a")
            equal(got, upright(file))
            assert got.shape[:2] == ((31, 23) if turned else (23, 31)), data


@needs_jpeg
@needs_png
def test_damaged_exif_never_crashes() -> None:
    """Cut anywhere, any byte another: a picture, turned in one of the eight ways."""
    draw = random.Random(5)
    for order in "<>":
        whole = tiff([(0x010F, 2, 20, 40), (0x0112, 3, 1, 6), (0x8769, 4, 1, 26)], order) + bytes(30)
        wanted = {
            upright(png_with(chunk(b"eXIf", tiff([(0x0112, 3, 1, value)], order)))).tobytes()
            for value in range(9)
        }
        broken = [whole[:size] for size in range(len(whole))]
        for _ in range(300):
            other = bytearray(whole)
            for _ in range(draw.choice([1, 2, 8])):
                other[draw.randrange(len(whole))] = draw.choice([0, 1, 255, draw.randrange(256)])
            broken.append(bytes(other))
        for data in broken:
            assert _core.decode_image(exif(data)[1], "a").tobytes() in wanted
            _core.decode_image(exif(data)[0], "a")


@needs_jpeg
@needs_png
def test_a_damaged_chunk_turns_nothing() -> None:
    """Its CRC is wrong: the picture is sound, what the chunk says is not."""
    data = bytearray(png_with(chunk(b"eXIf", tiff([(0x0112, 3, 1, 3)]))))
    at = data.index(b"eXIf")
    data[at + 4 + 19] = 6
    equal(_core.decode_image(bytes(data), "a"), np.asarray(IMAGE))


@needs_jpeg
@needs_png
def test_orientation_in_xmp() -> None:
    """Where EXIF says nothing, as Pillow has it."""
    for text in ('="6"', ">8<", '="9"', '="0"', "='6'", '="'):
        xmp = f"<x:xmpmeta><rdf:Description tiff:Orientation{text}".encode()
        app1, itxt = (
            b"http://ns.adobe.com/xap/1.0/\0" + xmp,
            chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        )
        for file in (
            jpeg_with(app1),
            jpeg_with(app1, b"Exif\0\0" + tiff([(0x0112, 3, 1, 3)])),
            jpeg_with(b"Exif\0\0" + tiff([(0x0112, 3, 1, 0)]), app1),
            jpeg_with(b"Exif\0\0" + tiff([(0x0100, 3, 1, 9)]), app1),
            png_with(itxt),
            png_with(itxt, chunk(b"eXIf", tiff([(0x0112, 3, 1, 3)]))),
        ):
            equal(_core.decode_image(file, "a"), upright(file))


# ---- inks ----


@needs_jpeg
@both
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_cmyk_and_ycck(progressive: bool, decode: Decode) -> None:
    tags = Image.Exif()
    tags[0x0112] = 8
    for quality in (30, 90):
        data = encode(IMAGE.convert("CMYK"), "JPEG", quality=quality, progressive=progressive, exif=tags)
        marker = data.index(b"Adobe")
        ycck = bytearray(data)
        ycck[marker + 11] = 2
        for file in (data, bytes(ycck), data[: marker - 4] + data[marker + 12 :]):
            equal(decode(file, "ink.jpg"), upright(file))
        with pytest.raises(RuntimeError, match=r"ink\.jpg"):
            decode(data[: len(data) // 2], "ink.jpg")


@needs_jpeg
def test_jpeg_cmyk_of_every_ink() -> None:
    """All levels of an ink beside all levels of black; the quality hardly changes them."""
    inks = np.zeros((256, 256, 4), np.uint8)
    inks[..., 0], inks[..., 3] = np.mgrid[0:256, 0:256]
    data = encode(Image.fromarray(inks, "CMYK"), "JPEG", quality=100)
    equal(_core.decode_image(data, "ink.jpg"), by_pillow(data))
    assert len(np.unique(by_pillow(data))) > 250


# ---- 16 bits ----


@needs_png
@both
@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_png_of_16_bits(colour: int, channels: int, decode: Decode) -> None:
    rng = np.random.default_rng(colour)
    values = rng.permutation(65536).astype(np.uint16).reshape(-1, 64, channels) if channels != 3 else None
    if values is None:
        values = rng.integers(0, 65536, (40, 64, 3)).astype(np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    want = np.round(values / 257).astype(np.uint8)
    want = want[..., :3] if channels > 2 else np.repeat(want[..., :1], 3, 2)
    data = png(64, len(values), 16, colour, rows)
    equal(decode(data, "deep.png"), want)
    turned = data[:33] + chunk(b"eXIf", tiff([(0x0112, 3, 1, 6)])) + data[33:]
    equal(decode(turned, "deep.png"), np.rot90(want, -1))
    with pytest.raises(RuntimeError, match=r"deep\.png"):
        decode(data[: len(data) // 2], "deep.png")


@needs_png
@both
def test_png_of_16_bits_by_pillow(decode: Decode) -> None:
    """Filtered and compressed by another program."""
    values = np.arange(0, 65536, 7, dtype=np.uint16)[:9100].reshape(91, 100)
    data = encode(Image.fromarray(values), "PNG")
    equal(decode(data, "deep.png"), np.repeat(np.round(values / 257).astype(np.uint8)[..., None], 3, 2))


# ---- cut behind the pixels ----


@pytest.mark.slow
@needs_png
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1"])
def test_png_cut_anywhere(mode: str) -> None:
    """Whole where Pillow finds all pixels, an error where pixels are missing."""
    whole = encode(IMAGE.convert(mode), "PNG")
    pixels = by_pillow(whole)
    read = 0
    for size in range(8, len(whole)):
        try:
            want = by_pillow(whole[:size])
        except (OSError, SyntaxError):
            with pytest.raises(RuntimeError, match=r"short\.png"):
                _core.decode_image(whole[:size], "short.png")
            continue
        equal(want, pixels)
        equal(_core.decode_image(whole[:size], "short.png"), pixels)
        read += 1
    assert read >= 20  # IEND, the CRC and the check sum of the pixels


@needs_png
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 5), (8, 8), (9, 11), (2, 1), (1, 9)])
def test_interlaced_png_cut_behind_the_pixels(height: int, width: int, depth: int) -> None:
    """Which row comes last depends on the size; an image of one column has fewer passes."""
    rows = interlaced_rows(height, width, depth, np.random.default_rng(depth))
    whole = png(width, height, depth, 2, rows, interlace=1)
    pixels = _core.decode_image(whole, "a.png")
    for missing in range(1, 21):
        equal(_core.decode_image(whole[:-missing], "short.png"), pixels)
    compressed = zlib.compress(rows)
    for size in range(len(compressed) - 8):
        data = whole.replace(chunk(b"IDAT", compressed), chunk(b"IDAT", compressed[:size]))
        with pytest.raises(RuntimeError, match=r"short\.png"):
            _core.decode_image(data, "short.png")


@needs_png
def test_png_with_rubbish_behind_the_pixels() -> None:
    note = chunk(b"tEXt", b"Comment\0hello")
    whole = png_with(note, behind=True)
    for size in range(len(PNG) - 12, len(whole)):
        equal(_core.decode_image(whole[:size], "short.png"), np.asarray(IMAGE))
    for rubbish in (b"\xff" * 40, b"\0" * 40, chunk(b"abcd", b"x" * 99)[:-3]):
        data = PNG[:-12] + rubbish
        equal(_core.decode_image(data, "odd.png"), np.asarray(IMAGE))
        equal(by_pillow(data), np.asarray(IMAGE))


@needs_png
def test_png_in_many_chunks_cut_anywhere() -> None:
    at = PNG.index(b"IDAT")
    (length,) = struct.unpack(">I", PNG[at - 4 : at])
    body = PNG[at + 4 : at + 4 + length]
    whole = (
        PNG[: at - 4] + b"".join(chunk(b"IDAT", body[i : i + 100]) for i in range(0, length, 100)) + PNG[-12:]
    )
    first = len(whole) - 12 - 4 - 4  # the check sum, the CRC and IEND are missing
    equal(_core.decode_image(whole[:first], "short.png"), np.asarray(IMAGE))
    equal(_core.decode_image(whole[:-1], "short.png"), np.asarray(IMAGE))
    for size in range(at, first - 8):
        with pytest.raises(RuntimeError, match=r"short\.png: corrupt or truncated PNG"):
            _core.decode_image(whole[:size], "short.png")

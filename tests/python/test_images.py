# SPDX-License-Identifier: Apache-2.0
"""Decoding, resizing and preprocessing of images, bit for bit against Pillow and torchvision's rules."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL
import pytest
from PIL import Image
from vimcore import _core
from vimcore.data import pictures as images

build = getattr(_core, "build_info", dict)()
needs_jpeg = pytest.mark.skipif(build.get("jpeg") is False, reason="built without libjpeg")
needs_png = pytest.mark.skipif(build.get("png") is False, reason="built without libpng")

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: gradients, an edge and noise, so that every stage can go wrong."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    planes = [127 + 120 * np.sin((c + 1) * x / 17 + y / (9 + 4 * c)) for c in range(3)]
    image = np.stack(planes, -1) + rng.normal(0, 12, (height, width, 3))
    image[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 2, 3) * 255
    return np.clip(image, 0, 255).astype(np.uint8)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def pillow_resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Bicubic as in Pillow 13; earlier ones never take the vertical pass first: two calls do."""
    vertical_first = height < image.height and image.height - height > 2 * (image.width - width)
    if vertical_first and int(PIL.__version__.split(".")[0]) < 13:
        image = image.resize((image.width, height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def equal(a: np.ndarray, b: np.ndarray) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    np.testing.assert_array_equal(a, b)


# ---- decoding ----


@needs_jpeg
@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 16), (61, 83), (200, 131)])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_jpeg_colour(size: tuple[int, int], progressive: bool, subsampling: str) -> None:
    image = Image.fromarray(picture(*size))
    for quality in (30, 90):
        data = encode(image, "JPEG", quality=quality, progressive=progressive, subsampling=subsampling)
        equal(_core.decode_image(data, "a.jpg"), by_pillow(data))


@needs_jpeg
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_grey_restart_and_rgb(progressive: bool) -> None:
    image = Image.fromarray(picture(70, 53))
    for data in (
        encode(image.convert("L"), "JPEG", progressive=progressive),
        encode(image, "JPEG", progressive=progressive, restart_marker_blocks=2),
        encode(image, "JPEG", progressive=progressive, keep_rgb=True),
        encode(image, "JPEG", progressive=progressive, optimize=True, comment=b"hello"),
    ):
        equal(_core.decode_image(data, "a.jpg"), by_pillow(data))


@needs_jpeg
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_truncated(progressive: bool) -> None:
    data = encode(Image.fromarray(picture(64, 80)), "JPEG", progressive=progressive)
    for size in [*range(3, len(data), 37), len(data) - 1, len(data) - 2, len(data) - 40]:
        with pytest.raises(RuntimeError, match=r"short\.jpg"):
            _core.decode_image(data[:size], "short.jpg")


@needs_png
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
@pytest.mark.parametrize("size", [(1, 1), (5, 8), (33, 61)])
def test_png_modes(mode: str, size: tuple[int, int]) -> None:
    rgb = Image.fromarray(picture(*size))
    if mode in ("RGBA", "LA"):
        image = rgb.convert(mode)
        image.putalpha(Image.fromarray(picture(*size, seed=5)[:, :, 0]))
    else:
        image = rgb.convert(mode)
    data = encode(image, "PNG")
    equal(_core.decode_image(data, "a.png"), by_pillow(data))


@needs_png
@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_png_palette_depths_and_transparency(bits: int) -> None:
    image = Image.fromarray(picture(19, 27)).quantize(2**bits)
    for options in ({}, {"transparency": 0}, {"transparency": bytes([0, 128])}):
        data = encode(image, "PNG", bits=bits, **options)
        equal(_core.decode_image(data, "a.png"), by_pillow(data))


def chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG, with its length and CRC."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def interlaced_rows(height: int, width: int, depth: int, rng: np.random.Generator) -> bytes:
    """Random colours in Adam7's seven passes: first row and column, and how far the next ones are."""
    rows = b""
    for y, x, down, right in (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ):
        if across := len(range(x, width, right)):
            rows += b"".join(b"\0" + rng.bytes(3 * across * depth // 8) for _ in range(y, height, down))
    return rows


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"", interlace: int = 0
) -> bytes:
    """A PNG from its parts; `rows` are filtered but uncompressed."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@needs_png
@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_png_grey_depths(depth: int) -> None:
    rng = np.random.default_rng(depth)
    stride = (13 * depth + 7) // 8
    rows = b"".join(b"\0" + rng.bytes(stride) for _ in range(6))
    data = png(13, 6, depth, 0, rows)
    equal(_core.decode_image(data, "a.png"), by_pillow(data))


@needs_png
def test_png_palette_index_beyond_the_palette() -> None:
    """Pillow and libpng both show black for colours that the palette lacks."""
    palette = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60]))
    data = png(4, 1, 8, 3, b"\0" + bytes([0, 1, 2, 255]), extra=palette)
    equal(_core.decode_image(data, "a.png"), by_pillow(data))
    assert _core.decode_image(data, "a.png")[0, 3].tolist() == [0, 0, 0]


@needs_png
def test_png_interlaced_and_gamma() -> None:
    rows = interlaced_rows(9, 11, 8, np.random.default_rng(3))
    gamma = chunk(b"gAMA", struct.pack(">I", 100000))
    data = png(11, 9, 8, 2, rows, extra=gamma, interlace=1)
    equal(_core.decode_image(data, "a.png"), by_pillow(data))


@needs_png
def test_png_truncated_and_corrupt() -> None:
    data = encode(Image.fromarray(picture(40, 30)), "PNG")
    for size in [*range(8, len(data) - 30, 53), len(data) - 30]:  # within the pixels
        with pytest.raises(RuntimeError, match=r"short\.png"):
            _core.decode_image(data[:size], "short.png")
    for at in range(40, len(data) - 16, 91):
        broken = bytearray(data)
        broken[at] ^= 0x5A
        with pytest.raises(RuntimeError, match=r"bad\.png"):
            _core.decode_image(bytes(broken), "bad.png")


@needs_png
def test_png_that_claims_to_be_huge() -> None:
    for width, height in ((60000, 17000), (65535, 65535), (2**31 - 1, 1), (0, 5)):
        with pytest.raises(RuntimeError, match=r"huge\.png"):
            _core.decode_image(png(width, height, 8, 2, b"\0" * 100), "huge.png")


@needs_jpeg
def test_jpeg_that_claims_to_be_huge() -> None:
    data = bytearray(encode(Image.fromarray(picture(16, 16)), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    with pytest.raises(RuntimeError, match=r"huge\.jpg"):
        _core.decode_image(bytes(data), "huge.jpg")


@needs_jpeg
@needs_png
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_random_damage_never_crashes(kind: str) -> None:
    rng = np.random.default_rng(11)
    data = encode(Image.fromarray(picture(48, 40)), kind)
    messages = []
    for _ in range(300):
        broken = bytearray(data)
        for at in rng.integers(2, len(data), 4):
            broken[at] = rng.integers(256)
        try:
            image = _core.decode_image(bytes(broken), "damaged")
        except RuntimeError as error:
            messages.append(str(error))
            continue
        assert image.shape[2:] == (3,)
    assert len(messages) > 50
    assert all("damaged: " in message for message in messages)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pnm(mode: str) -> None:
    image = Image.fromarray(picture(11, 23)).convert(mode)
    data = encode(image, "PPM")
    equal(_core.decode_image(data, "a.ppm"), by_pillow(data))
    comment = data.replace(b"\n23", b" # width next\n# more\n23", 1)
    equal(_core.decode_image(comment, "a.ppm"), by_pillow(data))
    for size in (2, 3, 5, 9, 12, len(data) - 1):
        with pytest.raises(RuntimeError, match=r"short\.ppm"):
            _core.decode_image(data[:size], "short.ppm")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        b"GIF89a....",
        b"P6",
        b"P6 1 1 65535\n" + bytes(5),
        b"P6 1 1 65536\n" + bytes(6),
        b"P6 1 1 0\n" + bytes(6),
        b"P6 99999999 99999999 255\n",
        b"P3 1 1 255 1 1 1",
    ],
)
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(RuntimeError, match="strange"):
        _core.decode_image(data, "strange")


# ---- resize ----


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (8, 8), (37, 50), (256, 170), (333, 500)])
@pytest.mark.parametrize("to", [(1, 1), (8, 8), (5, 40), (37, 50), (224, 224), (256, 384), (400, 31)])
def test_resize_equals_pillow(size: tuple[int, int], to: tuple[int, int]) -> None:
    image = picture(*size, seed=size[0])
    expected = np.asarray(pillow_resize(Image.fromarray(image), to[1], to[0]))
    equal(_core.resize_bicubic(image, *to), expected)


def test_resize_random_sizes() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        height, width, h, w = (int(v) for v in rng.integers(1, 300, 4))
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = np.asarray(pillow_resize(Image.fromarray(image), w, h))
        equal(_core.resize_bicubic(image, h, w), expected)


@pytest.mark.slow
def test_resize_is_the_same_without_vector_instructions() -> None:
    code = (
        "import sys, numpy as np; from vimcore import _core; rng = np.random.default_rng(1)\n"
        "for _ in range(20):\n"
        "    a, b, c, d = (int(v) for v in rng.integers(1, 99, 4))\n"
        "    image = rng.integers(0, 256, (a, b, 3), dtype=np.uint8)\n"
        "    sys.stdout.buffer.write(_core.resize_bicubic(image, c, d).tobytes())\n"
    )
    output = []
    for isa in ({}, {"VIMCORE_ISA": "baseline"}):
        environment = {k: v for k, v in os.environ.items() if k != "VIMCORE_ISA"}
        environment |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **isa}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE
        )
        output.append(run.stdout)
    assert len(output[0]) > 1000
    assert output[0] == output[1]


@pytest.mark.parametrize("to", [(0, 5), (5, 0), (-1, 5), (70000, 5), (65535, 65535)])
def test_resize_refuses_sizes(to: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="resize_bicubic"):
        _core.resize_bicubic(picture(4, 4), *to)


# ---- preprocessing ----


def expected_input(
    image: Image.Image, resize: int, crop: tuple[int, int], mean: list[float], std: list[float]
) -> np.ndarray:
    """torchvision's Resize(resize, BICUBIC), CenterCrop(crop), ToTensor, Normalize, written out."""
    image = image.convert("L" if len(mean) == 1 else "RGB")
    width, height = image.size
    if resize:
        short, long = min(width, height), max(width, height)
        longer = int(resize * long / short)
        image = image.resize(
            (resize, longer) if width <= height else (longer, resize), Image.Resampling.BICUBIC
        )
    pixels = np.asarray(image)
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    height, width = pixels.shape[:2]
    tall, wide = max(0, crop[0] - height), max(0, crop[1] - width)
    pixels = np.pad(pixels, ((tall // 2, (tall + 1) // 2), (wide // 2, (wide + 1) // 2), (0, 0)))
    height, width = pixels.shape[:2]
    top, left = round((height - crop[0]) / 2.0), round((width - crop[1]) / 2.0)
    pixels = pixels[top : top + crop[0], left : left + crop[1]].transpose(2, 0, 1)
    values = pixels.astype(np.float32) / np.float32(255)
    shape = (-1, 1, 1)
    return (values - np.float32(mean).reshape(shape)) / np.float32(std).reshape(shape)


@pytest.mark.parametrize("size", [(1, 1), (30, 41), (100, 57), (224, 224), (255, 259), (300, 451), (9, 400)])
@pytest.mark.parametrize(
    ("resize", "crop"), [(256, (224, 224)), (64, (57, 64)), (64, (64, 91)), (0, (50, 40)), (33, (33, 33))]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_preprocess(size: tuple[int, int], resize: int, crop: tuple[int, int], channels: int) -> None:
    mean, std = MEAN[:channels], STD[:channels]
    image = Image.fromarray(picture(*size))
    options = {"resize": resize, "crop": list(crop), "mean": mean, "std": std, "interpolation": "bicubic"}
    got = _core.preprocess_image(encode(image, "PPM"), "a.ppm", _core.Preprocess(**options))
    equal(got, expected_input(image, resize, crop, mean, std))


@needs_jpeg
def test_preprocess_jpeg_with_defaults() -> None:
    data = encode(Image.fromarray(picture(375, 500)), "JPEG")
    expected = expected_input(Image.open(io.BytesIO(data)), 256, (224, 224), MEAN, STD)
    equal(_core.preprocess_image(data, "a.jpg", _core.Preprocess()), expected)
    equal(_core.preprocess_image(data, "a.jpg", _core.Preprocess(crop=224)), expected)


def test_preprocess_of_a_very_long_image() -> None:
    image = picture(2, 20000)
    options = {"resize": 256, "crop": [16, 16], "mean": MEAN, "std": STD}
    got = _core.preprocess_image(
        encode(Image.fromarray(image), "PPM"), "long.ppm", _core.Preprocess(**options)
    )
    assert got.shape == (3, 16, 16)
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "end of text"),
        ("[]", "object"),
        ('{"resize": 1.5}', "resize"),
        ('{"resize": -1}', "resize"),
        ('{"crop": [1]}', "crop"),
        ('{"crop": [0, 5]}', "crop"),
        ('{"mean": [0.5, 0.5]}', "mean"),
        ('{"mean": [0.5]}', "mean"),
        ('{"std": [0, 1, 1]}', "std"),
        ('{"interpolation": "nearest"}', "bicubic"),
        ('{"size": 3}', "size"),
        ('{"resize": 3, "resize": 3}', "duplicate"),
    ],
)
def test_preprocess_options_are_checked(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        _core.Preprocess.from_json(text)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "LA", "1"])
def test_pillow_stands_in(mode: str) -> None:
    """A build without libpng gives the same input through Pillow."""
    rng = np.random.default_rng(3)
    image = Image.fromarray(rng.integers(0, 256, (40, 52, 3), dtype=np.uint8)).convert(mode)
    data = io.BytesIO()
    image.save(data, "PNG")
    pixels = images.decode_with_pillow(data.getvalue(), "test")
    assert np.array_equal(pixels, _core.decode_image(data.getvalue(), "test"))
    options = _core.Preprocess()
    ours = _core.preprocess_image(data.getvalue(), "test", options)
    assert np.array_equal(_core.preprocess_pixels(pixels, options), ours)
    assert np.array_equal(images.network_input(data.getvalue(), "test", options), ours)


def test_pillow_refuses_what_the_core_refuses() -> None:
    with pytest.raises(_core.Error, match="test: TIFF: expected 8 or 16 bits, grey or colour, got mode F"):
        images.decode_with_pillow(encode(Image.new("F", (8, 8)), "TIFF"), "test")
    data = encode(Image.fromarray(picture(20, 31)), "JPEG")
    for bad in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", data[: len(data) // 2]):
        with pytest.raises(_core.Error, match=r"\[decode_image\] test: "):
            images.decode_with_pillow(bad, "test")

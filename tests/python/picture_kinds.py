# SPDX-License-Identifier: Apache-2.0
"""Pictures of many kinds as files, each with the pixels that it means."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from test_images import chunk, encode, picture, png

HEIGHT, WIDTH = 23, 31


class Kind(NamedTuple):
    """A file; its pixels (H, W, 3) where Pillow's conversion is not the rule; whether the core decodes it."""

    name: str
    suffix: str
    data: bytes
    pixels: np.ndarray | None = None
    core: bool = False


def by_pillow(data: bytes) -> np.ndarray:
    """What torchvision's loader gives of an upright picture."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def rgb() -> Image.Image:
    return Image.fromarray(picture(HEIGHT, WIDTH))


def rgba() -> Image.Image:
    image = rgb().convert("RGBA")
    image.putalpha(Image.fromarray(np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)))
    return image


def turned(value: int = 6) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = value
    return tags


def deep(channels: int) -> np.ndarray:
    return np.random.default_rng(channels).integers(0, 65536, (HEIGHT, WIDTH, channels)).astype(np.uint16)


def by_value(values: np.ndarray, largest: int = 65535) -> np.ndarray:
    found = np.floor(values.astype(np.float64) * 255 / largest + 0.5).astype(np.uint8)
    return found[..., :3] if found.shape[2] > 2 else np.repeat(found[..., :1], 3, 2)


def tiff(
    values: np.ndarray,
    bits: int = 16,
    photometric: int = 2,
    order: str = "<",
    packed: bool = False,
    predictor: bool = False,
    extra: int | None = None,
    data: bytes | None = None,
    planar: bool = False,
) -> bytes:
    """A TIFF of one strip, of samples (H, W, channels); Pillow writes none of 16 bits in colours."""
    height, width, channels = values.shape
    if predictor:
        values = np.concatenate([values[:, :1], values[:, 1:] - values[:, :-1]], 1)
    pixels = values.astype(order + "u2" if bits == 16 else "u1").tobytes() if data is None else data
    if packed:
        pixels = zlib.compress(pixels)
    tags = [(256, 3, [width]), (257, 3, [height]), (258, 3, [bits] * channels)]
    tags += [(259, 3, [8 if packed else 1]), (262, 3, [photometric]), (273, 4, [8]), (277, 3, [channels])]
    tags += [(278, 3, [height]), (279, 4, [len(pixels)]), (284, 3, [2 if planar else 1])]
    tags += [(317, 3, [2])] if predictor else []
    tags += [(338, 3, [extra])] if extra is not None else []
    at = 8 + len(pixels) + len(pixels) % 2
    beyond = at + 2 + 12 * len(tags) + 4
    directory, more = struct.pack(order + "H", len(tags)), b""
    for tag, kind, numbers in sorted(tags):
        text = b"".join(struct.pack(order + {3: "H", 4: "I"}[kind], number) for number in numbers)
        if len(text) > 4:
            place, more = beyond + len(more), more + text
            text = struct.pack(order + "I", place)
        directory += struct.pack(order + "HHI", tag, kind, len(numbers)) + text.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", at)
    return head + pixels + b"\0" * (len(pixels) % 2) + directory + bytes(4) + more


def bmp(bits: int, rows: bytes, height: int = HEIGHT, packing: int = 0, masks: bytes = b"") -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, WIDTH, height, 1, bits, packing, len(rows), 2835, 2835, 0, 0)
    at = 14 + len(head) + len(masks)
    return b"BM" + struct.pack("<IHHI", at + len(rows), 0, 0, at) + head + masks + rows


def jpegs() -> Iterator[Kind]:
    image = rgb()
    for name, options in {
        "444": {"subsampling": "4:4:4"},
        "420": {"subsampling": "4:2:0"},
        "progressive": {"progressive": True},
        "turned": {"exif": turned()},
    }.items():
        yield Kind(f"jpeg-{name}", ".jpg", encode(image, "JPEG", quality=90, **options), core=True)
    yield Kind("jpeg-grey", ".jpeg", encode(image.convert("L"), "JPEG"), core=True)
    yield Kind("jpeg-cmyk", ".jpe", encode(image.convert("CMYK"), "JPEG"), core=True)
    several = encode(image, "MPO", save_all=True, append_images=[image.rotate(180)])
    yield Kind("jpeg-mpo", ".jfif", several, core=True)


def pngs() -> Iterator[Kind]:
    image = rgb()
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        source = rgba() if mode in ("LA", "RGBA") else image
        yield Kind(f"png-{mode}", ".png", encode(source.convert(mode), "PNG"), core=True)
    yield Kind("png-4-bit", ".png", encode(image.quantize(13), "PNG", bits=4), core=True)
    yield Kind("png-key", ".png", encode(image.quantize(50), "PNG", transparency=3), core=True)
    yield Kind("png-turned", ".PNG", encode(image, "PNG", exif=turned(8)), core=True)
    again = encode(image, "PNG", save_all=True, append_images=[image.rotate(180)])
    yield Kind("png-animated", ".png", again, core=True)
    for colour, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        values = deep(channels)
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        data = png(WIDTH, HEIGHT, 16, colour, rows)
        yield Kind(f"png-16-bit-{channels}", ".png", data, by_value(values), core=True)
    values = deep(3)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = png(WIDTH, HEIGHT, 16, 2, rows)
    exif = chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x03\0\0\0\0\0\0")
    yield Kind(
        "png-16-bit-turned", ".png", data[:33] + exif + data[33:], by_value(values)[::-1, ::-1], core=True
    )


def pnms() -> Iterator[Kind]:
    image = rgb()
    yield Kind("ppm", ".ppm", encode(image, "PPM"), core=True)
    yield Kind("pgm", ".pgm", encode(image.convert("L"), "PPM"), core=True)
    yield Kind("pbm", ".pbm", encode(image.convert("1"), "PPM"))
    grey, colours = np.asarray(image.convert("L")), np.asarray(image)
    text = " ".join(map(str, grey.ravel()))
    yield Kind("pgm-text", ".pgm", f"P2\n# a comment\n{WIDTH} {HEIGHT} 255\n{text}\n".encode())
    text = " ".join(map(str, colours.ravel()))
    yield Kind("ppm-text", ".pnm", f"P3\n{WIDTH} {HEIGHT}\n255\n{text}\n".encode())
    text = "\n".join("".join(map(str, row)) for row in (grey > 127).astype(int))
    yield Kind("pbm-text", ".pbm", f"P1\n{WIDTH} {HEIGHT}\n{text}\n".encode())
    values = deep(1)
    text = " ".join(map(str, values.ravel()))
    data = f"P2\n{WIDTH} {HEIGHT} 65535\n{text}\n".encode()
    yield Kind("pgm-text-16-bit", ".pgm", data, by_value(values))
    for largest in (1, 15, 200, 256, 1023, 65535):
        for channels, letter in ((1, 5), (3, 6)):
            values = (deep(channels).astype(np.uint32) * largest // 65535).astype(np.uint16)
            samples = values.astype(">u2" if largest > 255 else "u1").tobytes()
            data = f"P{letter}\n{WIDTH} {HEIGHT}\n{largest}\n".encode() + samples
            pixels = by_value(values) if largest == 65535 else None
            if channels == 1 and 255 < largest < 65535:  # by way of 16 bits
                pixels = by_value(np.rint(values / largest * 65535))
            yield Kind(f"pnm-{letter}-{largest}", ".pnm", data, pixels, core=True)


def webps() -> Iterator[Kind]:
    image = rgb()
    yield Kind("webp", ".webp", encode(image, "WEBP", quality=80))
    yield Kind("webp-lossless", ".webp", encode(image, "WEBP", lossless=True))
    yield Kind("webp-alpha", ".WebP", encode(rgba(), "WEBP", lossless=True, exact=True))
    yield Kind("webp-turned", ".webp", encode(image, "WEBP", exif=turned()))
    several = encode(image, "WEBP", save_all=True, append_images=[image.rotate(180)], lossless=True)
    yield Kind("webp-animated", ".webp", several)


def tiffs() -> Iterator[Kind]:
    image = rgb()
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"):
        source = rgba() if mode in ("LA", "RGBA") else image
        yield Kind(f"tiff-{mode}", ".tif", encode(source.convert(mode), "TIFF"))
    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        yield Kind(f"tiff-{name}", ".tiff", encode(image, "TIFF", compression=name))
    for name in ("group3", "group4"):
        yield Kind(f"tiff-{name}", ".tif", encode(image.convert("1"), "TIFF", compression=name))
    yield Kind("tiff-turned", ".tif", encode(image, "TIFF", exif=turned(5)))
    several = encode(image, "TIFF", save_all=True, append_images=[image.rotate(180)])
    yield Kind("tiff-pages", ".tif", several)
    yield Kind("tiff-big", ".tif", encode(image, "TIFF", big_tiff=True))
    grey = np.asarray(image.convert("L"))[..., None]
    yield Kind("tiff-white-is-zero", ".tif", tiff(grey, 8, 0))
    colours = np.asarray(rgba())
    yield Kind("tiff-unknown-channel", ".tif", tiff(colours, 8, extra=0))
    yield Kind("tiff-premultiplied", ".tif", tiff(np.asarray(rgba().convert("RGBa")), 8, extra=1))
    for order in "<>":
        values = deep(1)
        end = {"<": "little", ">": "big"}[order]
        yield Kind(f"tiff-16-bit-{end}", ".tif", tiff(values, 16, 1, order), by_value(values))
        values = deep(3)
        for name, options in {
            "raw": {},
            "deflate": {"packed": True},
            "predictor": {"packed": True, "predictor": True},
        }.items():
            data = tiff(values, 16, 2, order, **options)  # type: ignore[arg-type]
            yield Kind(f"tiff-16-bit-rgb-{name}-{end}", ".tif", data, by_value(values))
        values = deep(4)
        yield Kind(f"tiff-16-bit-rgba-{end}", ".tif", tiff(values, 16, 2, order, extra=2), by_value(values))
        inks = Image.fromarray(np.ascontiguousarray(_levels(values)), "CMYK")
        yield Kind(
            f"tiff-16-bit-cmyk-{end}", ".tif", tiff(values, 16, 5, order), np.asarray(inks.convert("RGB"))
        )


def _levels(values: np.ndarray) -> np.ndarray:
    return np.floor(values / 257 + 0.5).astype(np.uint8)


def bmps() -> Iterator[Kind]:
    image = rgb()
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        source = rgba() if mode == "RGBA" else image
        yield Kind(f"bmp-{mode}", ".bmp", encode(source.convert(mode), "BMP"))
    stride = (3 * WIDTH + 3) // 4 * 4
    rows = b"".join(row[:, ::-1].tobytes().ljust(stride, b"\0") for row in np.asarray(image))
    yield Kind("bmp-top-down", ".bmp", bmp(24, rows, -HEIGHT), np.asarray(image))
    words = np.random.default_rng(0).integers(0, 65536, (HEIGHT, (WIDTH + 1) // 2 * 2)).astype("<u2")
    yield Kind("bmp-555", ".dib", bmp(16, words.tobytes()))
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    yield Kind("bmp-565", ".bmp", bmp(16, words.tobytes(), packing=3, masks=masks))


def gifs() -> Iterator[Kind]:
    image = rgb()
    yield Kind("gif", ".gif", encode(image, "GIF"))
    yield Kind("gif-grey", ".gif", encode(image.convert("L"), "GIF"))
    yield Kind("gif-transparent", ".gif", encode(image.quantize(40), "GIF", transparency=5))
    yield Kind("gif-interlaced", ".gif", encode(image, "GIF", interlace=1))
    later = [image.rotate(90 * turn) for turn in (1, 2)]
    yield Kind("gif-animated", ".GIF", encode(image, "GIF", save_all=True, append_images=later))


def avifs() -> Iterator[Kind]:
    yield Kind("avif", ".avif", encode(rgb(), "AVIF", quality=80))


def all_kinds() -> list[Kind]:
    found = [*jpegs(), *pngs(), *pnms(), *webps(), *tiffs(), *bmps(), *gifs(), *avifs()]
    return [kind if kind.pixels is not None else kind._replace(pixels=by_pillow(kind.data)) for kind in found]


def refused() -> dict[str, tuple[bytes, str]]:
    """Files that are read nowhere, and what is said of them."""
    image: Any = Image.fromarray(np.zeros((4, 4), np.float32))
    return {
        "float.tif": (encode(image, "TIFF"), "expected 8 or 16 bits, grey or colour, got mode F"),
        "whole.tif": (encode(image.convert("I"), "TIFF"), "got mode I"),
        "planes.tif": (
            tiff(deep(3), planar=True, data=deep(3).tobytes()),
            "channels of 16 bits in this layout",
        ),
        "phone.heic": (
            b"\0\0\0\x18ftypheic" + bytes(40),
            "HEIC, which is not read; give the picture as PNG or JPEG",
        ),
        "a.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(40), "JPEG 2000, which is not read"),
        "a.psd": (b"8BPS" + bytes(40), "a Photoshop file (PSD), which is not read"),
        "a.pdf": (b"%PDF-1.7" + bytes(40), "a PDF, which is not read"),
        "page.jpg": (
            b"\n <!DOCTYPE html><html>",
            "a page of the web or a drawing (HTML, XML, SVG), which is not read",
        ),
        "pointer.jpg": (
            b"version https://git-lfs.github.com/spec/v1\n",
            "a Git LFS pointer, which is not read",
        ),
        "a.eps": (b"%!PS-Adobe-3.0 EPSF", "PostScript, which is not read"),
        "text.png": (b"hello", "neither JPEG, PNG nor PPM/PGM, nor another format"),
        "empty.webp": (b"", "file is empty"),
    }

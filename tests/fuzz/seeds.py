# SPDX-License-Identifier: Apache-2.0
"""Seeds for the fuzz targets: python seeds.py FOLDER writes a folder per target below FOLDER."""

from __future__ import annotations

import base64
import json
import struct
import sys
import zlib
from pathlib import Path

CONFIG = {"img_size": 8, "patch_size": 4, "embed_dim": 4, "depth": 1, "num_classes": 2, "d_state": 2}
MIXER = {
    "A_log": [8, 2],
    "D": [8],
    "conv1d.weight": [8, 1, 4],
    "conv1d.bias": [8],
    "x_proj.weight": [5, 8],
    "dt_proj.weight": [8, 1],
    "dt_proj.bias": [8],
}
REVERSE = {"A_log": "A_b_log", "D": "D_b"}
SHAPES = {
    "cls_token": [1, 1, 4],
    "pos_embed": [1, 5, 4],
    "patch_embed.proj.weight": [4, 3, 4, 4],
    "patch_embed.proj.bias": [4],
    "head.weight": [2, 4],
    "head.bias": [2],
    "layers.0.mixer.in_proj.weight": [16, 4],
    "layers.0.mixer.out_proj.weight": [4, 8],
    "layers.0.norm.weight": [4],
    "norm_f.weight": [4],
    **{f"layers.0.mixer.{name}": shape for name, shape in MIXER.items()},
    **{f"layers.0.mixer.{REVERSE.get(n, n.replace('.', '_b.'))}": shape for n, shape in MIXER.items()},
}
PREPROCESS = {
    "resize": 9,
    "crop": [8, 8],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.25, 1],
    "interpolation": "bicubic",
}

JPEG = {
    "grey": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAFA3PEY8MlBGQUZaVVBfeMiCeG5uePWvuZHI////////////////////////////"
        "////////////////////////wAALCAAJAAsBAREA/8QAFgABAQEAAAAAAAAAAAAAAAAAAQAC/8QAHhAAAgEDBQAAAAAAAAAA"
        "AAAAAAEhAhFBUXGBscH/2gAIAQEAAD8Asu0roy4enA1Z29E//9k="
    ),
    "colour": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAFA3PEY8MlBGQUZaVVBfeMiCeG5uePWvuZHI////////////////////////////"
        "////////////////////////2wBDAVVaWnhpeOuCguv/////////////////////////////////////////////////////"
        "////////////////////wAARCAAJAAsDASIAAhEBAxEB/8QAFgABAQEAAAAAAAAAAAAAAAAAAQAC/8QAHhAAAgEDBQAAAAAA"
        "AAAAAAAAAAEhAhFBUXGBscH/xAAUAQEAAAAAAAAAAAAAAAAAAAAB/8QAFxEBAAMAAAAAAAAAAAAAAAAAAAERIf/aAAwDAQAC"
        "EQMRAD8Asu0roy4enA1Z29ELE4//2Q=="
    ),
    "progressive": (
        "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAFA3PEY8MlBGQUZaVVBfeMiCeG5uePWvuZHI////////////////////////////"
        "////////////////////////2wBDAVVaWnhpeOuCguv/////////////////////////////////////////////////////"
        "////////////////////wgARCAAJAAsDAREAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAH/xAAWAQEBAQAAAAAAAAAA"
        "AAAAAAABAAL/2gAMAwEAAhADEAAAAUSQ2x//xAAUEAEAAAAAAAAAAAAAAAAAAAAg/9oACAEBAAEFAh//xAAUEQEAAAAAAAAA"
        "AAAAAAAAAAAg/9oACAEDAQE/AR//xAAUEQEAAAAAAAAAAAAAAAAAAAAg/9oACAECAQE/AR//xAAUEAEAAAAAAAAAAAAAAAAA"
        "AAAg/9oACAEBAAY/Ah//xAAVEAEBAAAAAAAAAAAAAAAAAAAQAf/aAAgBAQABPyEp/9oADAMBAAIAAwAAABAqL//EABgRAAID"
        "AAAAAAAAAAAAAAAAAAABEBHw/9oACAEDAQE/EMihR//EABkRAAEFAAAAAAAAAAAAAAAAAAABEBGx8P/aAAgBAgEBPxASDU3/"
        "xAAeEAABAwQDAAAAAAAAAAAAAAABACFBEBFRcYGxwf/aAAgBAQABPxCTZx0ixxwpa9p//9k="
    ),
    "cmyk": (
        "/9j/7gAOQWRvYmUAZAAAAAAA/9sAQwBQNzxGPDJQRkFGWlVQX3jIgnhubnj1r7mRyP//////////////////////////////"
        "/////////////////////8AAFAgACQALBEMRAE0RAFkRAEsRAP/EABgAAAMBAQAAAAAAAAAAAAAAAAACAwEE/8QAJBAAAgED"
        "AgYDAAAAAAAAAAAAAAERAiFREnEiMTJBscGBodL/2gAOBEMATQBZAEsAAD8AFdzKeIt9m5i6m7jpNdS56Vbzg7RdOaqZ2ZOq"
        "rS45C8LSl1J4SQD/AJ9s2rvs/LJ1dPz7QECo/ZbID//Z"
    ),
}


TASK = {
    "task": "segment",
    "head": "linear",
    "options": {"convs": 0},
    "classes": ["a", "b"],
    "palette": [[0, 0, 0], [128, 0, 0]],
    "window": [8, 8],
    "stride": [5, 5],
    "resize": None,
}


def weights_file(
    tensors: dict[str, tuple[str, list[int], int]], metadata: dict[str, str] | None = None
) -> bytes:
    """name: (type, shape, bytes of an element); the data are small numbers."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape, width) in tensors.items():
        size = width
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + struct.pack("<f", 0.125) * (at // 4) + bytes(at % 4)


def network(**options: object) -> bytes:
    metadata = {
        "vimcore.config": json.dumps({**CONFIG, **options}),
        "vimcore.labels": '["a", "b"]',
        "vimcore.preprocess": json.dumps(PREPROCESS),
    }
    shapes = SHAPES
    if options.get("directions") == "ssm":  # the reverse direction has nothing of its own but A
        shapes = {name: shape for name, shape in SHAPES.items() if "_b." not in name and "D_b" not in name}
    return weights_file({name: ("F32", shape, 4) for name, shape in shapes.items()}, metadata)


def segmentation(**changed: object) -> bytes:
    """A linear head for two classes on the same network; `changed` values of its task."""
    shapes = {f"backbone.{name}": shape for name, shape in SHAPES.items() if not name.startswith("head.")}
    shapes |= {"decode_head.conv_seg.weight": [2, 4, 1, 1], "decode_head.conv_seg.bias": [2]}
    metadata = {
        "vimcore.config": json.dumps({**CONFIG, "num_classes": 0}),
        "vimcore.preprocess": json.dumps(PREPROCESS),
        "vimcore.task": json.dumps({**TASK, **changed}),
    }
    return weights_file({name: ("F32", shape, 4) for name, shape in shapes.items()}, metadata)


def png(colour: int, depth: int, channels: int, interlaced: bool = False) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = (5 * channels * depth + 7) // 8
    lines = b"".join(bytes([y % 5]) + bytes((7 * x + y) % 4 for x in range(row)) for y in range(6))
    head = struct.pack(">IIBBBBB", 5, 6, depth, colour, 0, 0, int(interlaced))
    palette = chunk(b"PLTE", bytes(range(12))) if colour == 3 else b""
    data = chunk(b"IDAT", zlib.compress(lines))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + palette + data + chunk(b"IEND", b"")


def seeds() -> dict[str, dict[str, bytes]]:
    kinds = {
        "F64": 8,
        "F32": 4,
        "F16": 2,
        "BF16": 2,
        "I64": 8,
        "I32": 4,
        "I16": 2,
        "I8": 1,
        "U8": 1,
        "BOOL": 1,
    }
    files = {
        "network": network(),
        "ssm": network(directions="ssm"),
        "types": weights_file({name: (name, [2, 3], width) for name, width in kinds.items()}),
        "empty": weights_file({}),
        "scalar": weights_file({"a": ("F32", [], 4), "b": ("U8", [0, 5], 1)}, {"k": "v \u00e9"}),
    }
    tail = bytes([12, 7, 9, 0])  # how the target resizes
    pictures = {name: base64.b64decode(text) + tail for name, text in JPEG.items()}
    pictures["ppm"] = b"P6\n# c\n3 2\n255\n" + bytes(range(18)) + tail
    pictures["pgm"] = b"P5 3 2 255 " + bytes(range(6)) + b"\x00\x07\x09\x01"
    for colour, depth, channels in (
        (0, 1, 1),
        (0, 8, 1),
        (2, 8, 3),
        (3, 2, 1),
        (3, 8, 1),
        (4, 8, 2),
        (6, 8, 4),
        (2, 16, 3),
    ):
        pictures[f"png{colour}_{depth}"] = png(colour, depth, channels) + tail
    pictures["png_interlaced"] = png(2, 8, 3, interlaced=True) + tail
    texts = {
        "config": json.dumps({**CONFIG, "rope": True, "class_token": "none", "layer_scale": 0.1}).encode(),
        "preprocess": json.dumps(PREPROCESS).encode(),
        "task": json.dumps({**TASK, "head": "uper", "options": {"channels": 8, "taps": "mixer"}}).encode(),
        "values": b'{"a": [1, -2.5e1, true, false, null, "x\\u00e9\\ud83d\\ude00\\n"], "b": {}}',
        "text": b'"\\"\\\\\\u0001 \xc3\xa9"',
    }
    return {"safetensors": files, "image": pictures, "json": texts}


def main() -> None:
    for target, files in seeds().items():
        folder = Path(sys.argv[1]) / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)


if __name__ == "__main__":
    main()

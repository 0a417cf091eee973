# SPDX-License-Identifier: Apache-2.0
"""The folder in which commands.py runs its lines: a few good files, and small bad ones of every kind."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import seeds

GOOD = seeds.network()
CONFIGS: dict[str, Any] = {
    "null": None,
    "list": [],
    "empty": {},
    "unknown": {**seeds.CONFIG, "colour": 1},
    "self": {**seeds.CONFIG, "self": 1},
    "size-float": {**seeds.CONFIG, "img_size": 8.5},
    "size-null": {**seeds.CONFIG, "img_size": None},
    "size-text": {**seeds.CONFIG, "img_size": "8"},
    "size-none": {k: v for k, v in seeds.CONFIG.items() if k != "img_size"},
    "size-three": {**seeds.CONFIG, "img_size": [8, 8, 8]},
    "patch-none": {k: v for k, v in seeds.CONFIG.items() if k != "patch_size"},
    "patch-zero": {**seeds.CONFIG, "patch_size": 0},
    "stride-negative": {**seeds.CONFIG, "stride": -4},
    "deep": {**seeds.CONFIG, "depth": 4096, "embed_dim": 512},
    "rank": {**seeds.CONFIG, "dt_rank": 1000000},
    "huge": {**seeds.CONFIG, "embed_dim": 10**30},
    "true": {**seeds.CONFIG, "depth": True},
    "classes": {**seeds.CONFIG, "num_classes": -1},
    "memory": {**seeds.CONFIG, "memory": "fast"},
    "norm": {**seeds.CONFIG, "norm_eps": "1e-5"},
}
LABELS: dict[str, Any] = {
    "few": ["a"],
    "many": ["a", "b", "c"],
    "numbers": [1, 2],
    "nulls": [None, None],
    "lists": [["a"], ["b"]],
    "object": {"0": "a", "1": "b"},
    "markup": ["$\\foo$", "<b>&\x1b[31m"],
}
STEPS: dict[str, Any] = {
    "list": [],
    "mean-short": {**seeds.PREPROCESS, "mean": [0.5]},
    "mean-huge": {**seeds.PREPROCESS, "mean": [1e308] * 3},
    "std-zero": {**seeds.PREPROCESS, "std": [0, 1, 1]},
    "crop-other": {**seeds.PREPROCESS, "crop": [9, 9]},
    "crop-none": {k: v for k, v in seeds.PREPROCESS.items() if k != "crop"},
    "resize-huge": {**seeds.PREPROCESS, "resize": 10**12},
    "resize-text": {**seeds.PREPROCESS, "resize": "9"},
    "way": {**seeds.PREPROCESS, "interpolation": "best"},
}
TOML = {
    "good": "epochs = 1\n",
    "unknown": "[model]\ncolour = 1\n",
    "section": "[colours]\nred = 1\n",
    "type": "[optimizer]\nlr = 'fast'\n",
    "wrong": "[model]\nlr = 1.0\n",
    "twice": "epochs = 1\nepochs = 2\n",
    "array": "[[model]]\ndepth = 1\n",
    "date": "lr = 2020-01-01\n",
    "nested": "[model.set]\na = 1\n",
    "cut": "[model\n",
}
CSV = {
    "good": b"path,label\npictures/a/0.png,a\npictures/b/0.png,b\n" * 4,
    "nul": b"path,label\npictures/a/0.png\x00,a\n",
    "field": b"path,label\n" + b"x" * 200_000 + b",a\n",
    "short": b"path,label\npictures/a/0.png\n",
    "latin": b"path,label\npictures/a/0.png,\xe9\n",
    "quote": b'path,label\n"pictures/a/0.png,a\n',
    "header": b"a,b,c\n",
    "absent": b"path,label\nabsent.png,a\nabsent.png,b\n",
}
TASKS: dict[str, dict[str, Any]] = {
    "list": {"options": []},
    "head": {"head": "uper"},
    "window": {"window": [1 << 20, 8]},
    "stride": {"stride": [1, 1], "resize": [1000, 1000]},
    "gaps": {"stride": [9, 9]},
    "resize": {"resize": [1 << 20, 1 << 20]},
    "palette": {"palette": [[0, 0, 0]]},
    "classes": {"classes": ["a"] * 300},
    "task": {"task": 3},
    "long": {"task": "x" * 70_000},
    "detect": {"task": "detect"},
}
BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 3, 3], "segmentation": [[0, 0, 3, 0, 3, 3]]}
COCO = {
    "images": [{"id": i, "file_name": f"{i}.png", "height": 6, "width": 5} for i in (0, 1, 2)],
    "annotations": [BOX, {**BOX, "id": 2, "image_id": 2}],
    "categories": [{"id": 1, "name": "a"}],
}
ANNOTATIONS: dict[str, dict[str, Any]] = {
    "": {},
    "-twice": {"images": COCO["images"] * 2},
    "-huge": {"images": [{**COCO["images"][1], "height": 1 << 40}]},
    "-path": {"images": [{**COCO["images"][1], "file_name": "../../absent"}]},
    "-none": {"annotations": []},
    "-counts": {"annotations": [{**BOX, "segmentation": {"size": [6, 5], "counts": [1 << 62, 3]}}]},
    "-text": {"annotations": [{**BOX, "segmentation": {"size": [6, 5], "counts": "ooooooooo"}}]},
    "-far": {"annotations": [{**BOX, "segmentation": [[-9e8, -9e8, 9e8, -9e8, 0, 9e8]]}]},
    "-box": {"annotations": [{**BOX, "bbox": [0, 0, 1e308, None]}]},
    "-names": {"categories": [{"id": 1, "name": "<script>$\\foo$"}]},
}
TEXTS = {
    "empty": b"",
    "text": b"hello\n",
    "html": b"<!DOCTYPE html><html>Not found</html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "latin": b"\xff\xfe\n",
    "list": b'["a", 2, null]',
    "deep": b"[" * 5000,
    "zip": b"PK\x05\x06" + bytes(18),
    "pickle": b"\x80\x02cos\nsystem\nX\x06\x00\x00\x00exit 1\x85R.",
    "cut": GOOD[: len(GOOD) // 2],
    "header": (1 << 62).to_bytes(8, "little") + b"{}",
}


def weights(**metadata: str) -> bytes:
    """A good file with other metadata (of `vimcore.`KEY)."""
    config = {f"vimcore.{key}": value for key, value in metadata.items()}
    return seeds.weights_file({name: ("F32", shape, 4) for name, shape in seeds.SHAPES.items()}, config)


def files() -> dict[str, bytes]:
    """Contents by name; the subfolder pictures/ is a data set as well."""
    config, labels, steps = (json.dumps(v) for v in (seeds.CONFIG, ["a", "b"], seeds.PREPROCESS))
    found = {"good.safetensors": GOOD, "bare.safetensors": weights()}
    for name, value in CONFIGS.items():
        found[f"config-{name}.safetensors"] = weights(config=json.dumps(value))
    found["config-twice.safetensors"] = weights(config=config[:-1] + ', "depth": 1}')
    found["config-cut.safetensors"] = weights(config=config[:-1])
    for name, value in LABELS.items():
        found[f"labels-{name}.safetensors"] = weights(
            config=config, labels=json.dumps(value), preprocess=steps
        )
        found[f"labels-{name}.json"] = json.dumps(value).encode()
    for name, value in STEPS.items():
        text = json.dumps(value)
        found[f"steps-{name}.safetensors"] = weights(config=config, labels=labels, preprocess=text)
    found["dense.safetensors"] = seeds.segmentation()
    for name, values in TASKS.items():
        found[f"task-{name}.safetensors"] = seeds.segmentation(**values)
    found |= {f"{name}.toml": text.encode() for name, text in TOML.items()}
    found |= {f"{name}.csv": data for name, data in CSV.items()}
    for name, data in TEXTS.items():
        found |= {f"{name}.{suffix}": data for suffix in ("safetensors", "pth", "txt", "png", "toml")}
    for i in range(6):
        kind = "ab"[i % 2]
        found[f"pictures/{kind}/{i // 2}.png"] = seeds.png(2, 8, 3)
    found["pictures/a/bad.png"] = b"not a picture"
    for i in range(4):
        found[f"scenes/images/{i}.png"] = seeds.png(2, 8, 3)
        found[f"scenes/masks/{i}.png"] = seeds.png(0, 8, 1)
    for name, changed in ANNOTATIONS.items():
        found[f"coco{name}.json"] = json.dumps({**COCO, **changed}).encode()
    found["captions.csv"] = b"path,caption\n" + b"".join(
        b"pictures/%s/%d.png,an %s of %d\n" % (kind, i, kind, i) for kind in (b"a", b"b") for i in range(3)
    )
    return found


def make(folder: Path) -> list[str]:
    """Writes everything; names as commands may be given them, with some that are not there."""
    names = files()
    for name, data in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    odd = os.fsdecode(b"\xff name\n.png")
    (folder / odd).write_bytes(seeds.png(0, 8, 1))
    (folder / "empty folder").mkdir()
    (folder / "circle").symlink_to("circle")
    (folder / "odd").mkdir()
    os.mkfifo(folder / "odd" / "fifo.png")
    for name, minor in (("null", 3), ("zero", 5), ("full", 7)):
        # Devices of our own, where we may make them: a fault that replaces one must not reach the system's.
        with contextlib.suppress(PermissionError):
            os.mknod(folder / name, stat.S_IFCHR | 0o666, os.makedev(1, minor))
    more = [
        "pictures",
        "scenes",
        "odd",
        "odd/fifo.png",
        "empty folder",
        "circle",
        "circle/x",
        "absent",
        "absent/x",
        odd,
    ]
    return [*names, *more, "good.safetensors/x", "null", "zero", "full", ".", ".."]

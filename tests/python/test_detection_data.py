# SPDX-License-Identifier: Apache-2.0
"""Pictures with objects: COCO's files good and bad, instance masks, jitter; masks against pycocotools."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as pycoco
from vimcore.data.coco import counts_of, from_counts, mask_of, read_coco, run_lengths
from vimcore.data.detection import Framing, Jitter, Training, Validation, collate, fitted
from vimcore.data.instance_masks import open_masked
from vimcore.data.object_sources import Reading, training_and_validation, validation
from vimcore.data.objects import Picture, boxes_of
from vimcore.data.transforms import Input, UnreadableError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools'
OF = Input(3, (32, 32), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 32)


def coco(path: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> Path:
    """Two pictures, two categories whose ids have a gap, all kinds of masks; in its folder."""
    path.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((20, 30), np.uint8)
    mask[5:9, 2:8] = 1
    compressed = pycoco.encode(np.asfortranarray(mask))
    content = {
        "images": [
            {"id": 7, "file_name": "a.png", "height": 20, "width": 30},
            {"id": 3, "file_name": "b.png", "height": 16, "width": 16},
        ],
        "categories": [{"id": 90, "name": "cup"}, {"id": 5, "name": "cat"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 7,
                "category_id": 90,
                "bbox": [2, 5, 6, 4],
                "area": 24,
                "iscrowd": 0,
                "segmentation": {"size": [20, 30], "counts": compressed["counts"].decode()},
            },
            {
                "id": 2,
                "image_id": 7,
                "category_id": 5,
                "bbox": [10, 4, 30, 8],
                "segmentation": [[10, 4, 29.5, 4, 29.5, 12, 10, 12], [0, 0, 3, 0, 3, 3]],
            },
            {
                "id": 3,
                "image_id": 7,
                "category_id": 5,
                "bbox": [0, 0, 30, 20],
                "iscrowd": 1,
                "area": 100,
                "segmentation": {"size": [20, 30], "counts": [100, 100, 400]},
            },
            {
                "id": 4,
                "image_id": 7,
                "category_id": 5,
                "bbox": [3, 3, 0, 4],
                "segmentation": [[3, 3, 3, 5, 3, 7]],
            },
        ],
    }
    change(content)
    for name, size in (("a.png", (30, 20)), ("b.png", (16, 16))):
        Image.fromarray(np.full((*size[::-1], 3), 90, np.uint8)).save(path / name)
    (path / "coco.json").write_text(json.dumps(content))
    return path / "coco.json"


def test_coco(tmp_path: Path) -> None:
    train = validation(str(coco(tmp_path)), ["cat", "cup"], [5, 90])
    assert train.classes == ["cat", "cup"]
    assert train.ids == [5, 90]
    assert len(train) == 2
    assert [train.number(i) for i in range(2)] == [7, 3]
    assert train.with_objects() == [0]
    assert train.dropped == {"annotation without area in its image": 1}
    picture = train.read(0, masks=True)
    assert picture.pixels.shape == (20, 30, 3)
    assert picture.labels.tolist() == [1, 0]  # no crowd, nothing without area
    assert picture.boxes.tolist() == [[2, 5, 8, 9], [10, 4, 30, 12]]  # within the picture
    assert picture.masks is not None
    assert picture.masks[0].sum() == 24
    assert picture.masks[1, 5, 15]
    assert picture.masks[1, 0, 2]
    assert train.read(0, masks=False).masks is None
    rows = train.truth(0, masks=True)
    assert [row["category_id"] for row in rows] == [2, 1, 1, 1]
    assert [row["iscrowd"] for row in rows] == [0, 0, 1, 0]
    assert rows[1]["bbox"] == [10, 4, 30, 8]  # as in the file
    assert rows[1]["area"] == 240  # the file has none: of the box
    assert rows[2]["area"] == 100


def test_masks_are_pycocotools() -> None:
    """Run lengths as numbers and as text, polygons; there and back."""
    chance = np.random.default_rng(0)
    for _ in range(30):
        height, width = (int(n) for n in chance.integers(1, 40, 2))
        mask = chance.random((height, width)) < chance.random()
        theirs = pycoco.encode(np.asfortranarray(mask, dtype=np.uint8))
        text = theirs["counts"].decode()
        assert run_lengths(mask) == {"size": [height, width], "counts": text}
        assert np.array_equal(mask_of({"size": [height, width], "counts": text}, height, width), mask)
        assert np.array_equal(from_counts(counts_of(counts_of(text)), height, width), mask)
        polygons = [(chance.random(2 * n) * 50 - 5).tolist() for n in chance.integers(3, 9, 2)]
        wanted = pycoco.decode(pycoco.merge(pycoco.frPyObjects(polygons, height, width)))
        assert np.array_equal(mask_of(polygons, height, width), wanted.astype(bool))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.clear(), "images: expected a list, got None"),
        (lambda c: c["images"].append(3), r"images\[2\]: expected an object, got 3"),
        (lambda c: c["images"].append(c["images"][0]), r"images\[2\]: id: 7 is there twice"),
        (
            lambda c: c["images"][0].update(height=0),
            r"images\[0\]: height: expected a whole number from 1 to 65536",
        ),
        (lambda c: c["images"][0].update(width=1e3), r"images\[0\]: width: expected a whole number"),
        (lambda c: c["images"][0].update(file_name="\0"), r"images\[0\]: file_name: expected text"),
        (lambda c: c["images"][0].pop("id"), r"images\[0\]: id: expected a whole number, got None"),
        (lambda c: c["categories"].clear(), "categories: expected at least one"),
        (lambda c: c["categories"][0].update(name=3), r"categories\[0\]: name: expected text, got 3"),
        (
            lambda c: c["annotations"][0].update(image_id=9),
            r"annotations\[0\]: image_id: 9 is none of the images",
        ),
        (lambda c: c["annotations"][0].update(category_id=1), "category_id: 1 is none of the categories"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "bbox: expected x, y, width, height"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 1]), "bbox: expected x, y, width"),
        (lambda c: c["annotations"][0].update(iscrowd=2), "iscrowd: expected 0 or 1, got 2"),
        (lambda c: c["annotations"][0].update(area="x"), "area: expected a number, got 'x'"),
        (lambda c: c["annotations"][0].update(segmentation="x"), "segmentation: expected polygons or run"),
    ],
)
def test_files_that_are_wrong(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"coco.json: .*{message}"):
        read_coco(str(coco(tmp_path, change)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"[]", r"expected an object .*got \[\]"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "nested"),
    ],
)
def test_files_that_are_no_annotations(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.json: {message}|x.json: not COCO's annotations: {message}"):
        read_coco(str(tmp_path / "x.json"))


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [20, 31], "counts": [600]},
        {"size": [20, 30], "counts": [599]},
        {"size": [20, 30], "counts": [-1, 601]},
        {"size": [20, 30], "counts": [600.0]},
        {"size": [20, 30], "counts": "\u20ac"},
        {"size": [20, 30], "counts": "ooooooooooooooooo"},
        {"size": [20, 30], "counts": "1"},
        {"size": [20, 30], "counts": 5},
        {"size": [20, 30]},
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5]],
        [[1, 2, 3, 4, 5, "x"]],
        [[0, 0, 1e8, 0, 0, 1]],
        [[0, 0, float("inf"), 0, 0, 1]],
        [5],
    ],
)
def test_masks_that_are_wrong_skip_the_picture(segmentation: Any, tmp_path: Path) -> None:
    path = coco(tmp_path, lambda c: c["annotations"][0].update(segmentation=segmentation))
    objects = validation(str(path), ["cat", "cup"], None)
    with pytest.raises(UnreadableError, match="annotation 1: "):
        objects.read(0, masks=True)
    with pytest.raises(UnreadableError, match="annotation 1: "):
        objects.truth(0, masks=True)
    assert len(objects.read(0, masks=False).labels) == 2


def test_without_segmentation(tmp_path: Path) -> None:
    path = coco(tmp_path, lambda c: c["annotations"][0].pop("segmentation"))
    with pytest.raises(
        UnreadableError, match="annotation 1 has no segmentation; --no-masks learns boxes alone"
    ):
        validation(str(path), ["cat", "cup"], None).read(0, masks=True)


def test_pictures_that_are_missing_or_of_another_size(tmp_path: Path) -> None:
    path = coco(
        tmp_path, lambda c: c["images"].append({"id": 1, "file_name": "c.png", "height": 9, "width": 9})
    )
    objects = validation(str(path), ["cat", "cup"], None)
    assert len(objects) == 2
    (kind,) = [kind for kind in objects.dropped if kind.startswith("image")]
    assert kind == f"image that is not in {tmp_path} (c.png)"
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(UnreadableError, match="20 x 30 pixels, but its annotations are for 30 x 20"):
        objects.read(0, masks=True)
    for name in ("a.png", "b.png"):
        (tmp_path / name).unlink()
    with pytest.raises(
        ValueError, match=r"none of its images, such as a.png is in .*; name the folder with --im"
    ):
        validation(str(path), ["cat", "cup"], None)


def test_cocos_own_folders(tmp_path: Path) -> None:
    for part in ("train", "val"):
        made = coco(tmp_path / f"{part}2017")
        target = tmp_path / "annotations" / f"instances_{part}2017.json"
        target.parent.mkdir(exist_ok=True)
        made.rename(target)
    train, valid, about = training_and_validation(str(tmp_path), None, 0.1, Reading())
    assert len(train) == 1  # the other one has no object
    assert len(valid) == 2
    assert "1 pictures without objects are not learnt from" in about
    assert train.fingerprint() != valid.fingerprint()
    assert "val2017" in valid.name(0)
    (tmp_path / "annotations" / "instances_train2017.json").unlink()
    with pytest.raises(ValueError, match=r"no instances_train\*.json in annotations/ to learn from"):
        training_and_validation(str(tmp_path), None, 0.1, Reading())
    assert len(validation(str(tmp_path), ["cat", "cup"], [5, 90])) == 2
    with pytest.raises(ValueError, match=r"of ids \[5, 90\] and \[1, 2\]"):
        validation(str(tmp_path), ["cat", "cup"], [1, 2])
    with pytest.raises(ValueError, match="has the classes cat, cup, the network a"):
        validation(str(tmp_path), ["a"], None)


def masked(path: Path, values: Any, name: str = "x", size: tuple[int, int] | None = None) -> Path:
    """A picture and its instance mask."""
    for folder in ("images", "masks"):
        (path / folder).mkdir(parents=True, exist_ok=True)
    array = np.array(values, np.uint16)
    Image.fromarray(array).save(path / "masks" / f"{name}.png")
    Image.fromarray(np.full((*(size or array.shape), 3), 9, np.uint8)).save(path / "images" / f"{name}.png")
    return path


def test_instance_masks(tmp_path: Path) -> None:
    path = masked(tmp_path / "train", [[0, 1, 1, 0], [2003, 2003, 0, 2007], [0, 0, 0, 2007]])
    masked(path, np.zeros((4, 4)), "empty")
    masked(path, np.ones((4, 4)), "other", size=(5, 5))
    masked(path, np.ones((4, 4)), "damaged")
    (path / "masks" / "damaged.png").write_bytes(b"x")
    objects = open_masked(str(path))
    assert objects.classes == ["0", "1", "2"]
    index = {Path(objects.name(i)).stem: i for i in range(len(objects))}
    picture = objects.read(index["x"], masks=True)
    assert picture.labels.tolist() == [0, 2, 2]
    assert picture.boxes.tolist() == [[1, 0, 3, 1], [0, 1, 2, 2], [3, 1, 4, 3]]
    assert picture.masks is not None
    assert picture.masks.sum((1, 2)).tolist() == [2, 2, 2]
    rows = objects.truth(index["x"], masks=True)
    assert rows[2]["bbox"] == [3, 1, 1, 2]
    assert rows[2]["area"] == 2
    assert index["empty"] not in objects.with_objects()
    for name, message in (
        ("other", "5 x 5 pixels, but its mask .* has 4 x 4"),
        ("damaged", "mask .*damaged.png"),
    ):
        with pytest.raises(UnreadableError, match=message):
            objects.read(index[name], masks=True)
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match="holds value 2007, class 2, expected classes 0 to 1"):
        open_masked(str(path))
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    train, valid, _ = training_and_validation(str(tmp_path), str(path), 0.1, Reading())
    assert train.classes == valid.classes == ["a", "b", "c"]


def test_what_is_no_data(tmp_path: Path) -> None:
    for name, message in (
        (str(tmp_path / "no"), "no such file or folder"),
        (str(tmp_path), "expected a COCO file"),
    ):
        with pytest.raises(ValueError, match=message):
            training_and_validation(name, None, 0.1, Reading())
    (tmp_path / "_annotations.coco.json").touch()  # as other programs export it
    told = f"; _annotations.coco.json in it: if this is COCO's, name it, as {tmp_path}/_annotations.coco.json"
    with pytest.raises(ValueError, match=re.escape(told)):
        training_and_validation(str(tmp_path), None, 0.1, Reading())


# ---- jitter ------------------------------------------------------------------------------------------------


def scene(height: int = 40, width: int = 60) -> Picture:
    """Two rectangles of flat colour on black."""
    pixels = np.zeros((height, width, 3), np.uint8)
    masks = np.zeros((2, height, width), bool)
    masks[0, 4:14, 6:26], masks[1, 20:36, 30:50] = True, True
    pixels[masks[0]], pixels[masks[1]] = (255, 0, 0), (0, 255, 0)
    return Picture(pixels, boxes_of(masks), np.array([4, 1]), masks)


def test_jitter_keeps_picture_masks_and_boxes_together() -> None:
    framing = Framing(OF, (32, 32), Jitter(), masks=True)
    kept = mirrored = 0
    sizes = set()
    for seed in range(60):
        image, target = framing.training(scene(), np.random.default_rng(seed))
        sizes.add(tuple(image.shape[1:]))
        assert max(image.shape[1:]) <= 32
        values = (image * 0.25 + 0.5) * 255
        masks = target["masks"].numpy()
        assert masks.shape[1:] == image.shape[1:]
        assert np.array_equal(boxes_of(masks), target["boxes"].numpy())
        for mask, label in zip(target["masks"], target["labels"]):
            of = {5: 0, 2: 1}[int(label)]
            red, green = (values[c][mask].mean() for c in (0, 1))
            assert (red > green) == (of == 0)
            kept += 1
        if len(masks) == 2:
            first = masks[target["labels"].tolist().index(5)]
            other = masks[target["labels"].tolist().index(2)]
            mirrored += np.argwhere(first)[:, 1].mean() > np.argwhere(other)[:, 1].mean()
    assert kept > 60
    assert mirrored > 5
    assert len(sizes) > 15


def test_boxes_without_masks_follow_the_same_window() -> None:
    """Of rectangles their boxes tell as much: but for the rounding of masks to pixels."""
    with_masks, without = (Framing(OF, (32, 32), Jitter(), masks=m) for m in (True, False))
    for seed in range(30):
        image, target = with_masks.training(scene(), np.random.default_rng(seed))
        other, boxes = without.training(scene()._replace(masks=None), np.random.default_rng(seed))
        assert torch.equal(image, other)
        found = {int(k): box for k, box in zip(boxes["labels"], boxes["boxes"])}
        for label, box in zip(target["labels"], target["boxes"]):
            assert (found[int(label)] - box).abs().max() <= 1


def test_without_jitter() -> None:
    framing = Framing(OF, (32, 32), Jitter(None, 0.0), masks=True)
    image, target = framing.training(scene(40, 64), np.random.default_rng(0))
    assert image.shape == (3, 20, 32)
    assert torch.equal(image, framing.evaluation(scene(40, 64).pixels))
    assert target["labels"].tolist() == [5, 2]
    assert target["boxes"].tolist() == [[3, 2, 13, 7], [15, 10, 25, 18]]
    grey = Framing(Input(1, (32, 32), (0.5,), (0.25,), 32), (32, 32), Jitter(None, 0.0), True)
    assert grey.evaluation(scene().pixels[:16, :32]).shape == (1, 16, 32)


@pytest.mark.parametrize(
    ("shape", "resize", "size"),
    [
        ((480, 640), (1024, 1024), (768, 1024)),
        ((640, 480), (800, 1333), (1067, 800)),
        ((100, 1000), (800, 1333), (133, 1333)),
        ((1, 5000), (32, 32), (1, 32)),
    ],
)
def test_fitted(shape: tuple[int, int], resize: tuple[int, int], size: tuple[int, int]) -> None:
    assert fitted(shape, resize) == size


def test_batches_pass_over_what_cannot_be_read(tmp_path: Path) -> None:
    path = masked(tmp_path, np.ones((8, 8)), "a")
    masked(path, np.ones((8, 8)), "b")
    masked(path, np.ones((8, 8)), "c")
    (path / "images" / "b.png").write_bytes(b"x")
    objects = open_masked(str(path))
    framing = Framing(OF, (32, 32), Jitter(), masks=True)
    train, valid = Training(objects, framing), Validation(objects, framing)
    batch = collate([train[i, 5] for i in range(3)])
    assert batch.indices == [0, 2, 2]
    assert [Path(name).name for name in batch.errors] == ["b.png"]
    batch = collate([valid[i] for i in range(3)])
    assert batch.indices == [0, 2]
    assert batch.sizes == [(8, 8)] * 2
    assert len(batch.errors) == 1
    for name in ("a", "c"):
        (path / "images" / f"{name}.png").write_bytes(b"x")
    assert "3 pictures in a row cannot be used, the last: " in collate([train[0, 5]]).fault

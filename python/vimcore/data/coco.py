# SPDX-License-Identifier: Apache-2.0
"""COCO's annotations in JSON, checked: images, categories, boxes, masks as polygons or run lengths.

A file may come from anywhere. What is wrong with its structure is an error that names the place; what is
wrong with one mask is told when that mask is made.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..utils.extras import required
from .picture_files import read_file
from .transforms import UnreadableError

Mask = NDArray[np.bool_]
Box = tuple[float, float, float, float]
_MOST = 1 << 16  # pixels of a side
_OUTLINE = 1 << 20  # pixels that a polygon may run through


@dataclass(frozen=True)
class Annotation:
    """An object.

    Attributes:
        number: its id in the file.
        label: index of its class.
        box: x, y, width, height in pixels, as in the file.
        area: as in the file; where it has none, of the box.
        crowd: several objects that were not told apart: not learnt, and ignored in evaluation.
        segmentation: as in the file; None: there is none.
    """

    number: int
    label: int
    box: Box
    area: float
    crowd: bool
    segmentation: Any

    def corners(self, height: int, width: int) -> Box | None:
        """x1, y1, x2, y2 within the image; None: of no area there."""
        x, y, w, h = self.box
        x1, y1, x2, y2 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
        return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


@dataclass(frozen=True)
class CocoImage:
    """An image: its id and file name in the file, sides in pixels, objects."""

    number: int
    file: str
    height: int
    width: int
    annotations: tuple[Annotation, ...]


@dataclass(frozen=True)
class CocoFile:
    """What a file of annotations holds.

    Attributes:
        classes: names, by ascending id of the category.
        ids: of the categories, ascending: index i has id ids[i].
        dropped: annotations without area within their image, by kind.
    """

    path: str
    images: Sequence[CocoImage]
    classes: list[str]
    ids: list[int]
    dropped: Mapping[str, int] = field(default_factory=dict)


def read_coco(path: str) -> CocoFile:
    """The annotations of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: names the file, the place in it, what was expected and what is there.
    """
    try:
        content = json.loads(read_file(path, None))
    except RecursionError:
        raise ValueError(f"{path}: not COCO's annotations: nested too deeply") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    try:
        return _parsed(path, content)
    except _PlaceError as error:
        raise ValueError(f"{path}: {error}") from None


class _PlaceError(Exception):
    """What is wrong, and where."""


def _parsed(path: str, content: Any) -> CocoFile:
    if not isinstance(content, dict):
        raise _PlaceError(
            f"expected an object with images, annotations and categories, got {_shown(content)}"
        )
    lists = {}
    for name in ("images", "annotations", "categories"):
        if not isinstance(content.get(name), list):
            raise _PlaceError(f"{name}: expected a list, got {_shown(content.get(name))}")
        lists[name] = content[name]
    names: dict[int, str] = {}
    for place, values in _objects("categories", lists["categories"]):
        number = _integer(place, values, "id")
        if number in names:
            raise _PlaceError(f"{place}: id: {number} is there twice")
        names[number] = _text(place, values, "name")
    if not names:
        raise _PlaceError("categories: expected at least one")
    ids = sorted(names)
    label = {number: index for index, number in enumerate(ids)}
    images: dict[int, tuple[str, int, int]] = {}
    for place, values in _objects("images", lists["images"]):
        number = _integer(place, values, "id")
        if number in images:
            raise _PlaceError(f"{place}: id: {number} is there twice")
        sides = [_integer(place, values, side, 1, _MOST) for side in ("height", "width")]
        images[number] = (_text(place, values, "file_name"), sides[0], sides[1])
    found: dict[int, list[Annotation]] = {number: [] for number in images}
    dropped = Counter[str]()
    for i, (place, values) in enumerate(_objects("annotations", lists["annotations"])):
        image = _integer(place, values, "image_id")
        if image not in images:
            raise _PlaceError(f"{place}: image_id: {image} is none of the images")
        annotation = _annotation(place, values, label, i)
        if annotation.corners(*images[image][1:]) is None:
            dropped["annotation without area in its image"] += 1
        found[image].append(annotation)
    rows = [CocoImage(number, *facts, tuple(found[number])) for number, facts in images.items()]
    return CocoFile(path, rows, [names[number] for number in ids], ids, dict(dropped))


def _annotation(place: str, values: dict[str, Any], label: Mapping[int, int], index: int) -> Annotation:
    category = _integer(place, values, "category_id")
    if category not in label:
        raise _PlaceError(f"{place}: category_id: {category} is none of the categories")
    box = values.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise _PlaceError(f"{place}: bbox: expected x, y, width, height, got {_shown(box)}")
    x, y, w, h = map(float, box)
    area = values.get("area", w * h)
    if not _is_number(area):
        raise _PlaceError(f"{place}: area: expected a number, got {_shown(area)}")
    crowd = values.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise _PlaceError(f"{place}: iscrowd: expected 0 or 1, got {_shown(crowd)}")
    segmentation = values.get("segmentation") or None
    if not isinstance(segmentation, (list, dict, type(None))):
        raise _PlaceError(
            f"{place}: segmentation: expected polygons or run lengths, got {_shown(segmentation)}"
        )
    number = _integer(place, values, "id") if "id" in values else index + 1
    return Annotation(number, label[category], (x, y, w, h), float(area), bool(crowd), segmentation)


def _objects(name: str, values: list[Any]) -> list[tuple[str, dict[str, Any]]]:
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise _PlaceError(f"{name}[{i}]: expected an object, got {_shown(value)}")
    return [(f"{name}[{i}]", value) for i, value in enumerate(values)]


def _integer(place: str, values: dict[str, Any], key: str, low: int = -(1 << 62), high: int = 1 << 62) -> int:
    value = values.get(key)
    if type(value) is not int or not low <= value <= high:
        limits = f" from {low} to {high}" if high == _MOST else ""
        raise _PlaceError(f"{place}: {key}: expected a whole number{limits}, got {_shown(value)}")
    return value


def _text(place: str, values: dict[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value or any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise _PlaceError(f"{place}: {key}: expected text, got {_shown(value)}")
    return value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # not nan either


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- masks -------------------------------------------------------------------------------------------------


def mask_of(segmentation: Any, height: int, width: int) -> Mask:
    """The pixels (height, width) of polygons, or of run lengths as numbers or as COCO's text.

    Raises:
        UnreadableError: they are none, or of an image of another size.
    """
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        if size != [height, width]:
            raise UnreadableError(f"size: expected [{height}, {width}], got {_shown(size)}")
        return from_counts(counts_of(segmentation.get("counts")), height, width)
    with required("reading polygons", "dense"):
        from faster_coco_eval.core import mask as library
    polygons = [_polygon(polygon) for polygon in segmentation or ()]
    if not polygons:
        raise UnreadableError("expected polygons or run lengths, got none")
    found: Mask = library.decode(library.merge(library.frPyObjects(polygons, height, width))).astype(bool)
    return found


def _polygon(values: Any) -> list[float]:
    """x and y in turns, three points or more, that a raster can hold."""
    if not isinstance(values, list) or len(values) < 6 or len(values) % 2 or not all(map(_is_number, values)):
        raise UnreadableError(f"polygon: expected x and y of 3 points or more, got {_shown(values)}")
    points = np.array(values, np.float64).reshape(-1, 2)
    if np.abs(np.diff(points, axis=0, append=points[:1])).max(1).sum() > _OUTLINE:
        raise UnreadableError(f"polygon: expected an outline of at most {_OUTLINE} pixels")
    return [float(value) for value in values]


def counts_of(counts: Any) -> list[int]:
    """Run lengths as numbers: 0s first, then 1s, in turns, column by column.

    Raises:
        UnreadableError: they are neither numbers nor COCO's text.
    """
    if isinstance(counts, list):
        if not all(type(n) is int and 0 <= n <= _MOST**2 for n in counts):
            raise UnreadableError(f"counts: expected whole numbers, got {_shown(counts)}")
        return counts
    if not isinstance(counts, str):
        raise UnreadableError(f"counts: expected numbers or text, got {_shown(counts)}")
    found: list[int] = []
    value = shift = 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 40:
            raise UnreadableError(f"counts: no run lengths, {_shown(counts)}")
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift  # negative
        found.append(value + (found[-2] if len(found) > 2 else 0))
        value = shift = 0
    if shift or any(n < 0 for n in found):
        raise UnreadableError(f"counts: no run lengths, {_shown(counts)}")
    return found


def from_counts(counts: Sequence[int], height: int, width: int) -> Mask:
    """(height, width) of run lengths; UnreadableError: there are not as many pixels."""
    if sum(counts) != height * width:
        raise UnreadableError(f"counts: expected {height * width} pixels in all, got {sum(counts)}")
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def run_lengths(mask: NDArray[Any]) -> dict[str, Any]:
    """COCO's form of a mask (H, W): size, and counts as text, as JSON can hold it."""
    with required("run lengths", "dense"):
        from faster_coco_eval.core import mask as library
    found: dict[str, Any] = library.encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = found["counts"]
    return {
        "size": [int(side) for side in found["size"]],
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }


# ---- where the images are ----------------------------------------------------------------------------------


def folder_of(coco: CocoFile, given: str | None) -> str:
    """The folder with the images of a file of annotations.

    Without one given, the first of these that holds any of the first images: for
    annotations/instances_NAME.json the folder NAME beside annotations/, the file's folder, images/ in it.

    Raises:
        ValueError: there is none.
    """
    here = os.path.dirname(coco.path)
    name = os.path.splitext(os.path.basename(coco.path))[0].rpartition("_")[2]
    folders = [given] if given else [os.path.join(here, os.pardir, name), here, os.path.join(here, "images")]
    some = [image.file for image in coco.images[:100]]
    for folder in folders:
        if any(os.path.isfile(os.path.join(folder, file)) for file in some):
            return folder
    looked = ", ".join(map(os.path.normpath, folders))
    example = f", such as {some[0]}" if some else ""
    raise ValueError(
        f"{coco.path}: none of its images{example} is in {looked}; name the folder with --images"
    )

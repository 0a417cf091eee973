# SPDX-License-Identifier: Apache-2.0
"""What the file of a network says besides its backbone: task, head, classes, sizes. Needs no torch.

It is JSON under one key of the metadata, and hostile until it is parsed: every value is checked here, and
values against the tensors by whoever knows the head.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn, TypeVar

from ..utils.arguments import native
from .metadata import TASK_KEY

HEADS = {
    "segment": ("fcn", "linear", "uper", "segmenter"),
    "detect": ("cascade",),
    "clip": ("clip", "siglip"),
}
MOST_CLASSES = 255  # of a mask of 8 bits, where 255 says "ignore"
MOST_WIDTH = 1 << 16  # of a tower, of the space of two
_MOST = 1 << 20  # pixels of a side, as of an image
Path = str | os.PathLike[str]
T = TypeVar("T")


@dataclass(frozen=True)
class SegmentTask:
    """Of a network that gives every pixel a class.

    Attributes:
        head: "fcn", "linear" (without convolutions), "uper" or "segmenter".
        options: arguments of its constructor besides backbone and number of classes.
        classes: a name each; number k in masks is the k-th.
        palette: (red, green, blue) of each class, 0 to 255.
        window: (height, width) in pixels that the network sees at once.
        stride: (down, right) in pixels from one window to the next.
        resize: (short, long) that the sides of an image are fitted into before, None: as it is.
    """

    head: str
    options: Mapping[str, Any]
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    window: tuple[int, int]
    stride: tuple[int, int]
    resize: tuple[int, int] | None = None


@dataclass(frozen=True)
class DetectTask:
    """Of a network that finds objects.

    Attributes:
        head: "cascade".
        options: arguments of its constructor besides backbone and number of classes.
        classes: a name each.
        ids: of the categories in the COCO file that the classes come from, None: there is none.
        resize: (short, long) that the sides of an image are fitted into.
    """

    head: str
    options: Mapping[str, Any]
    classes: tuple[str, ...]
    ids: tuple[int, ...] | None
    resize: tuple[int, int]


@dataclass(frozen=True)
class ClipTask:
    """Of an image tower and a text tower with a common space.

    Attributes:
        head: how pairs were told apart: "clip" by a softmax, "siglip" by a sigmoid, which has a bias.
        options: of the text tower: width, layers, heads, context (the most tokens of a text).
        embed_dim: dimensions of the common space.
    """

    head: str
    options: Mapping[str, Any]
    embed_dim: int


AnyTask = SegmentTask | DetectTask | ClipTask
_KINDS: dict[str, type[AnyTask]] = {"segment": SegmentTask, "detect": DetectTask, "clip": ClipTask}
_HOLDS = {
    SegmentTask: "a network for segmentation; vimcore.segmentation.load reads it",
    DetectTask: "a detector; vimcore.detection.load reads it",
    ClipTask: "an image tower and a text tower; vimcore.clip.load reads it",
}


def holds(task: AnyTask | None) -> str:
    """What a file of this task holds, and what reads it."""
    if task is None:
        return "a classifier or backbone; vimcore.VisionMamba.load reads it"
    return _HOLDS[type(task)]


def pack_task(task: AnyTask) -> dict[str, str]:
    """The metadata; ValueError or TypeError where `unpack_task` would not take it."""
    kind = next(name for name, of in _KINDS.items() if of is type(task))
    values: dict[str, Any] = {"task": kind, **asdict(task)}
    options = {key: native(f"[task] options: {key}", value) for key, value in task.options.items()}
    plain = {key: native(f"[task] {key}", value) for key, value in values.items() if key != "options"}
    text = json.dumps({**plain, "options": options}, ensure_ascii=False)
    _parsed(text)
    return {TASK_KEY: text}


def unpack_task(metadata: Mapping[str, str], path: Path) -> AnyTask | None:
    """What a file's metadata says of its task; None: nothing, as of a classifier.

    Raises:
        ValueError: names the file, and what is missing, unknown, of a wrong type or out of range.
    """
    if TASK_KEY not in metadata:
        return None
    try:
        return _parsed(metadata[TASK_KEY])
    except ValueError as error:
        raise ValueError(f"{os.fsdecode(path)}: {TASK_KEY}: {error}") from None


def named_classes(meta: Mapping[Any, Any], count: int) -> tuple[list[str], list[list[int]] | None] | None:
    """Classes and colours in the "meta" of a checkpoint of mmsegmentation; None: not of `count` classes.

    Up to version 0.x they are CLASSES and PALETTE, later `classes` and `palette` under `dataset_meta`.
    """
    later = meta.get("dataset_meta")
    names, colours = meta.get("CLASSES"), meta.get("PALETTE")
    if names is None and isinstance(later, dict):
        names, colours = later.get("classes"), later.get("palette")
    if not isinstance(names, (list, tuple)) or len(names) != count:
        return None
    try:
        found = list(_classes(list(names)))
        palette = [list(_colour(list(colour))) for colour in colours] if colours is not None else None
    except (TypeError, ValueError):
        return None
    return (found, palette) if palette is None or len(palette) == count else (found, None)


def default_palette(classes: int) -> tuple[tuple[int, int, int], ...]:
    """A colour for each class: PASCAL VOC's, which begin with black and dark red; all differ up to 256."""

    def channel(number: int, first: int) -> int:
        return sum((number >> (3 * bit + first) & 1) << (7 - bit) for bit in range(8))

    return tuple((channel(k, 0), channel(k, 1), channel(k, 2)) for k in range(classes))


# ---- parsing -----------------------------------------------------------------------------------------------


def _parsed(text: str) -> AnyTask:
    try:
        values = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, got {_shown(values)}")
    task = values.pop("task", None)
    if not isinstance(task, str) or task not in _KINDS:
        raise ValueError(f"task: expected 'segment', 'detect' or 'clip', got {_shown(task)}")
    known = [field.name for field in fields(_KINDS[task])]
    if missing := [name for name in known if name not in values]:
        raise ValueError(f"{missing[0]}: missing")
    if unknown := [name for name in values if name not in known]:
        raise ValueError(f"{_shown(unknown[0])}: unknown; written by a later version?")
    head = values["head"]
    if head not in HEADS[task]:
        raise ValueError(f"head: expected one of {', '.join(HEADS[task])}, got {_shown(head)}")
    if task == "clip":
        dim = _integer("embed_dim", values["embed_dim"], 1, MOST_WIDTH)
        return ClipTask(head, _options(values["options"]), dim)
    classes = _classes(values["classes"])
    if task == "detect":
        return DetectTask(
            head,
            _options(values["options"]),
            classes,
            _maybe(values["ids"], lambda ids: _ids(ids, len(classes))),
            _fitted(values["resize"]),
        )
    if len(classes) > MOST_CLASSES:
        raise ValueError(f"classes: expected {MOST_CLASSES} or fewer, got {len(classes)}")
    window, stride = _sides("window", values["window"]), _sides("stride", values["stride"])
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(f"stride: {list(stride)} leaves gaps between windows of {list(window)}")
    palette = _list("palette", values["palette"], len(classes), _colour)
    resize = _maybe(values["resize"], _fitted)
    return SegmentTask(head, _options(values["options"]), classes, palette, window, stride, resize)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = [key for key, _ in pairs if key in seen or seen.add(key)]  # type: ignore[func-returns-value]
        raise ValueError(f"{_shown(twice[0])}: there twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _maybe(value: Any, read: Callable[[Any], T]) -> T | None:
    return None if value is None else read(value)


def _integer(what: str, value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what}: expected a whole number from {low} to {high}, got {_shown(value)}")
    return value


def _list(what: str, value: Any, length: int, read: Callable[[Any], T]) -> tuple[T, ...]:
    if not isinstance(value, list) or len(value) != length:
        got = f"{len(value)}" if isinstance(value, list) else _shown(value)
        raise ValueError(f"{what}: expected a list of {length}, got {got}")
    return tuple(map(read, value))


def _sides(what: str, value: Any) -> tuple[int, int]:
    height, width = _list(what, value, 2, lambda side: _integer(what, side, 1, _MOST))
    return height, width


def _fitted(value: Any) -> tuple[int, int]:
    short, long = _sides("resize", value)
    if short > long:
        raise ValueError(f"resize: expected [short, long], got {[short, long]}")
    return short, long


def _colour(value: Any) -> tuple[int, int, int]:
    red, green, blue = _list("palette", value, 3, lambda part: _integer("palette", part, 0, 255))
    return red, green, blue


def _classes(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"classes: expected a list of names, got {_shown(value)}")
    for name in value:
        if not isinstance(name, str) or _surrogates(name):
            raise ValueError(f"classes: expected texts, got {_shown(name)}")
    return tuple(value)


def _surrogates(text: str) -> bool:
    """Whether it holds halves of characters, which no program could print."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _ids(value: Any, count: int) -> tuple[int, ...]:
    most = (1 << 63) - 1
    ids = _list("ids", value, count, lambda number: _integer("ids", number, -most, most))
    if len(set(ids)) < count:
        raise ValueError("ids: one is there twice")
    return ids


def _options(value: Any) -> dict[str, Any]:
    """Names with plain values, or flat lists of them; the head's constructor knows which it takes."""
    if not isinstance(value, dict):
        raise ValueError(f"options: expected an object, got {_shown(value)}")
    for key, option in value.items():
        for part in option if isinstance(option, list) else [option]:
            if isinstance(part, (list, dict)):
                given = _shown(option)
                raise ValueError(f"options: {_shown(key)}: expected a plain value or a list, got {given}")
    return value

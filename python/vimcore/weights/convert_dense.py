# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint of mmsegmentation to a vimcore file: the head is read off the tensors as well."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .. import _core
from .._core import Config, Preprocess
from ..utils.files import listed
from .convert import as_float, convert_tensors, infer_config, overridden, read
from .dense import check_backbone, checked_options, head_shapes
from .metadata import check_labels, pack, unpack
from .task import TASK_KEY, SegmentTask, default_palette, named_classes, pack_task
from .wrappers import ROPE_TABLES

_PREFIX, _HEAD = "backbone.", "decode_head."
# Options of heads that may be set, besides resize and those of VisionMamba.
_OPTIONS = ("channels", "convs", "indices", "aux", "taps", "layers", "head_norm", "dropout")


def convert(
    source: str,
    destination: str,
    *,
    weights: str = "model",
    settings: Mapping[str, Any] | None = None,
    labels: Sequence[str] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """As `vimcore.weights.convert.convert`, of a classifier or of a network for segmentation.

    For the latter settings may name the head's options as well, and `resize`; labels take the place of the
    classes that the checkpoint names.
    """
    found = read(source, weights)
    if TASK_KEY in found.metadata and dtype is not None and not settings and labels is None:
        arrays, metadata = _core.read_safetensors(source)  # only the type of its weights is to be another
        _core.write_safetensors(destination, arrays, metadata, dtype)
        return unpack(metadata, source).config.to_dict(), []
    if TASK_KEY in found.metadata:
        raise ValueError(f"{source}: is a vimcore file of a network with heads, which needs no conversion")
    if not any(name.startswith(_HEAD) or f".{_HEAD}" in name for name in found.arrays):
        return convert_tensors(found, source, destination, settings, labels, preprocess, dtype)
    arrays, _, notes, meta = read(source, weights, keep=_PREFIX)
    of = _described(arrays, meta, source, settings or {}, labels, preprocess)
    _core.write_safetensors(destination, of.arrays, of.metadata, dtype)
    return of.config, notes + of.assumptions


class _Described(NamedTuple):
    """What a vimcore file holds, and what was assumed."""

    arrays: dict[str, Any]
    metadata: dict[str, str]
    config: dict[str, Any]
    assumptions: list[str]


def _described(
    arrays: Mapping[str, Any],
    meta: Mapping[Any, Any],
    source: str,
    settings: Mapping[str, Any],
    labels: Sequence[str] | None,
    preprocess: Mapping[str, Any] | None,
) -> _Described:
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    inner = {name.removeprefix(_PREFIX): array for name, array in arrays.items() if name.startswith(_PREFIX)}
    options, assumptions = infer_config(
        {name: tuple(array.shape) for name, array in inner.items()},
        source,
        *(inner.get(name) for name in ROPE_TABLES),
    )
    assumptions = [text for text in assumptions if not text.startswith(("pool=", "rope_residual="))]
    if options["rope"]:
        options["rope_residual"] = True
        assumptions.append("rope_residual=True, as in the authors' configurations of segmentation with RoPE")
    own = {key: value for key, value in settings.items() if key in _OPTIONS}
    options.update({key: value for key, value in settings.items() if key not in {*_OPTIONS, "resize"}})
    if "img_size" not in options:
        raise ValueError(
            f"{source}: the position table is no square grid, so the image size has to be named: "
            "--set 'img_size=[height, width]'"
        )
    config = Config(**options)
    head, found, further = _head(shapes, source, options["rope"])
    assumptions += further
    check_backbone(head, config)
    found = checked_options(head, {**found, **own}, config)
    classes = _classes(shapes, source)
    wanted = {_PREFIX + name: shape for name, shape in config.param_shapes().items()}
    wanted.update(head_shapes(head, found, classes, config))
    tables = {_PREFIX + name for name in ROPE_TABLES}
    if faults := _core.misfits(wanted, {name: shape for name, shape in shapes.items() if name not in tables}):
        raise ValueError(f"{source} does not fit {config.to_json()}:\n  " + listed(faults, "\n  "))
    task, about = _task(head, found, classes, config, meta, labels, settings)
    assumptions += about
    if preprocess is None and (steps := Preprocess.default(config)):
        preprocess = steps.replace(resize=min(config.img_size)).to_dict()
        assumptions.append(f"preprocess={json.dumps(preprocess)}")
    assumptions = [text for text in assumptions if not overridden(text, settings)]
    metadata = {**pack(config, None, preprocess), **pack_task(task)}
    written = {name: _number(arrays[name], name) for name in wanted}
    return _Described(written, metadata, {**config.to_dict(), "head": head, **found}, assumptions)


def _head(
    shapes: Mapping[str, tuple[int, ...]], source: str, rope: bool
) -> tuple[str, dict[str, Any], list[str]]:
    """Head, options that tensors tell or the authors chose, and what was assumed."""
    if _HEAD + "cls_emb" in shapes:
        return "segmenter", {"layers": _count(shapes, r"decode_head\.blocks\.(\d+)\.")}, []
    if len(shapes.get(_HEAD + "conv_seg.weight", ())) != 4:
        raise ValueError(f"{source}: no head that vimcore has: expected {_HEAD}conv_seg or {_HEAD}cls_emb")
    norm = "group" if any(".gn." in name for name in shapes) else "batch"
    options: dict[str, Any] = {"channels": shapes[_HEAD + "conv_seg.weight"][1], "head_norm": norm}
    if not any(name.startswith(_HEAD + "psp_modules.") for name in shapes):
        convs = _count(shapes, r"decode_head\.convs\.(\d+)\.")
        return ("fcn" if convs else "linear"), {**options, "convs": convs}, []
    options["aux"] = any(name.startswith("auxiliary_head.") for name in shapes)
    options["taps"] = "stream" if rope else "mixer"
    assumed = [
        f"taps={json.dumps(options['taps'])}: as in the authors' configuration of the "
        + ("small network, which reads the first three after one more rotation" if rope else "tiny network"),
        "indices=null: the last layer of each quarter",
    ]
    return "uper", options, assumed


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    return len({found[1] for name in shapes if (found := re.match(pattern, name))})


def _classes(shapes: Mapping[str, tuple[int, ...]], source: str) -> int:
    shape = shapes.get(_HEAD + "conv_seg.weight") or shapes[_HEAD + "cls_emb"]
    axis = 0 if _HEAD + "conv_seg.weight" in shapes else 1
    if len(shape) <= axis or not shape[axis]:
        raise ValueError(f"{source}: {_HEAD}: no classes")
    return shape[axis]


def _task(
    head: str,
    options: Mapping[str, Any],
    classes: int,
    config: Config,
    meta: Mapping[Any, Any],
    labels: Sequence[str] | None,
    settings: Mapping[str, Any],
) -> tuple[SegmentTask, list[str]]:
    assumptions = []
    names, colours = named_classes(meta, classes) or (None, None)
    if labels is not None:
        names = check_labels(labels, classes)
    if names is None:
        assumptions.append(f"classes are called 0 to {classes - 1}")
    short = min(config.img_size)
    resize = settings.get("resize", [short, 4 * short])
    assumptions.append(f"resize={json.dumps(resize)}, as the authors evaluate on ADE20K")
    window = config.img_size
    stride = window if head == "segmenter" else (window[0] * 2 // 3, window[1] * 2 // 3)
    assumptions.append(f"windows of {window[0]} x {window[1]} pixels every {stride[0]} and {stride[1]}")
    palette: Any = colours or default_palette(classes)
    listed_names = tuple(names or map(str, range(classes)))
    return SegmentTask(head, options, listed_names, palette, window, stride, resize), assumptions


def _number(array: Any, name: str) -> Any:
    """A counter of BatchNorm as int64, all else as `as_float`."""
    if name.endswith("num_batches_tracked"):
        return array.detach().numpy().astype("int64") if hasattr(array, "detach") else array.astype("int64")
    return as_float(array, name)

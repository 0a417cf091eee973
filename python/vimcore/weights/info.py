# SPDX-License-Identifier: Apache-2.0
"""What `vimcore info` shows of a file of weights. Needs no torch."""

from __future__ import annotations

import math
import os
from typing import Any

from .. import _core
from .._core import Config, Preprocess
from .clip import clip_file, clip_parameters
from .dense import head_flops, head_shapes, parameters
from .dense_files import segment_file
from .detector import detect_file, detector_flops, detector_shapes
from .metadata import unpack
from .task import ClipTask, DetectTask, SegmentTask, unpack_task


def describe_file(path: str) -> dict[str, Any]:
    """What a vimcore file holds; flops are multiply-adds of one image, scans included.

    Of a network with heads `config` is the backbone's, and there are, besides: task, head, options (of its
    constructor), head_parameters, and what its use needs: classes, palette, window, stride, resize, ids,
    embed_dim.

    Raises:
        ValueError, vimcore.Error: it is damaged, no vimcore file, or its tensors are not its architecture's.
    """
    _, metadata = _core.safetensors_header(path)
    task = unpack_task(metadata, path)
    if isinstance(task, SegmentTask):
        return _segmenter(path)
    if isinstance(task, DetectTask):
        return _detector(path)
    if isinstance(task, ClipTask):
        return _towers(path)
    config, labels, preprocess = unpack(_core.check_file(path)[0], path)
    learnt = sum(map(math.prod, config.param_shapes().values()))
    return _facts(path, config, labels, preprocess, learnt, config.flops())


def _facts(
    path: str,
    config: Config,
    labels: list[str] | None,
    preprocess: Preprocess | None,
    learnt: int,
    flops: int,
) -> dict[str, Any]:
    tensors, _ = _core.safetensors_header(path)
    return {
        "file": path,
        "bytes": os.path.getsize(path),
        "types": sorted({dtype for name, dtype, _ in tensors if not name.endswith("num_batches_tracked")}),
        "parameters": learnt,
        "flops": flops,
        "tokens": config.tokens,
        "class_tokens": config.class_tokens,
        "grid": list(config.grid),
        "config": config.to_dict(),
        "labels": labels,
        "preprocess": preprocess.to_dict() if preprocess else None,
    }


def _segmenter(path: str) -> dict[str, Any]:
    config, task, preprocess = segment_file(path)
    classes, own = len(task.classes), sum(map(math.prod, config.param_shapes().values()))
    head = parameters(head_shapes(task.head, task.options, classes, config))
    flops = config.flops() + head_flops(task.head, task.options, classes, config)
    return {
        **_facts(path, config, None, preprocess, own + head, flops),
        "task": "segment",
        "head": task.head,
        "options": dict(task.options),
        "head_parameters": head,
        "classes": list(task.classes),
        "palette": [list(colour) for colour in task.palette],
        "window": list(task.window),
        "stride": list(task.stride),
        "resize": list(task.resize) if task.resize else None,
    }


def _detector(path: str) -> dict[str, Any]:
    config, task, preprocess = detect_file(path)
    classes, own = len(task.classes), sum(map(math.prod, config.param_shapes().values()))
    head = parameters(detector_shapes(task.options, classes, config))
    boxes, drawn = task.options["proposals"], task.options["detections"]
    flops = config.flops() + detector_flops(task.options, classes, config, boxes, drawn)
    return {
        **_facts(path, config, None, preprocess, own + head, flops),
        "task": "detect",
        "head": task.head,
        "options": dict(task.options),
        "head_parameters": head,
        "classes": list(task.classes),
        "ids": list(task.ids) if task.ids is not None else None,
        "resize": list(task.resize),
    }


def _towers(path: str) -> dict[str, Any]:
    config, task, preprocess = clip_file(path)
    image, text = clip_parameters(config, task)
    flops = config.flops() + config.embed_dim * task.embed_dim
    return {
        **_facts(path, config, None, preprocess, image + text, flops),
        "task": "clip",
        "head": task.head,
        "options": dict(task.options),
        "head_parameters": text,
        "embed_dim": task.embed_dim,
    }

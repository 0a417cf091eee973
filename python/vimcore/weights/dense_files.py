# SPDX-License-Identifier: Apache-2.0
"""Files of dense networks: metadata and tensors against each other. Needs no torch."""

from __future__ import annotations

import os
from typing import NamedTuple, TypeVar

from .. import _core
from .._core import Config, Preprocess
from ..utils.files import listed
from .dense import Shapes, check_backbone, check_classes, check_window, checked_options, head_shapes
from .metadata import CONFIG_KEY, Contents, unpack
from .task import AnyTask, Path, SegmentTask, holds, unpack_task

Tensors = list[tuple[str, str, tuple[int, ...]]]  # name, type, shape
T = TypeVar("T", bound=AnyTask)
_COUNTER = "num_batches_tracked"


class SegmentFile(NamedTuple):
    """A file whose tensors are those of what it says: its options are complete and in range."""

    config: Config
    task: SegmentTask
    preprocess: Preprocess | None


def segment_file(path: Path) -> SegmentFile:
    """What the file of a segmentation network holds.

    Raises:
        vimcore.Error: it is missing or damaged.
        ValueError: it is no such file, or does not fit together.
    """
    tensors, (config, _, preprocess), task = opened(path, SegmentTask)
    try:
        return SegmentFile(config, _fitting(config, preprocess, task, tensors), preprocess)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.fsdecode(path)}: {error}") from None


def opened(path: Path, kind: type[T]) -> tuple[Tensors, Contents, T]:
    """Tensors, and what the metadata of a file of this task say, not compared with each other yet.

    Raises:
        vimcore.Error: it is missing or damaged.
        ValueError: it is of another task, or no vimcore file.
    """
    name = os.fsdecode(path)
    tensors, metadata = _core.safetensors_header(path)
    task = unpack_task(metadata, name)
    if not isinstance(task, kind) and (task is not None or CONFIG_KEY in metadata):
        raise ValueError(f"{name}: holds {holds(task)}")
    contents = unpack(metadata, name)
    assert isinstance(task, kind)
    return tensors, contents, task


def check_channels(config: Config, preprocess: Preprocess | None) -> None:
    """ValueError: pictures have another number of channels than the network takes."""
    if preprocess is not None and len(preprocess.mean) != config.in_chans:
        raise ValueError(
            f"vimcore.preprocess: the network takes {config.in_chans} channels, got {len(preprocess.mean)}"
        )


def _fitting(
    config: Config, preprocess: Preprocess | None, task: SegmentTask, tensors: Tensors
) -> SegmentTask:
    """The task with complete options."""
    check_backbone(task.head, config)
    classes = check_classes("segmentation", len(task.classes))
    check_window("segmentation", task.window, config)
    check_channels(config, preprocess)
    options = checked_options(task.head, task.options, config)
    backbone: Shapes = {f"backbone.{name}": shape for name, shape in config.param_shapes().items()}
    wanted = {**backbone, **head_shapes(task.head, options, classes, config)}
    if faults := tensor_faults(wanted, tensors):
        raise ValueError("the tensors do not fit the metadata:\n  " + listed(faults, "\n  "))
    return SegmentTask(task.head, options, task.classes, task.palette, task.window, task.stride, task.resize)


def tensor_faults(wanted: Shapes, tensors: Tensors) -> list[str]:
    """How a file's tensors differ from the wanted ones, in name, shape or type."""
    faults = _core.misfits(wanted, {name: shape for name, _, shape in tensors})
    for name, kind, shape in tensors:
        types, called = (("i64",), "i64") if name.endswith(_COUNTER) else (("f", "bf"), "a float type")
        if wanted.get(name) == shape and not kind.startswith(types):
            faults.append(f"{name}: expected {called}, got {kind}")
    return faults

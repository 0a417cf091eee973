# SPDX-License-Identifier: Apache-2.0
"""What a detector is made of besides Vim: options, tensors by name, cost, and files of it. Needs no torch.

Names below `proposal_generator` and `roi_heads` are detectron2's, as are those of the pyramid's levels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .._core import Config, Preprocess
from ..utils.arguments import boolean, integer, native
from ..utils.files import listed
from .dense import Shapes, refuse_clips
from .dense_files import check_channels, opened, tensor_faults
from .task import DetectTask, Path

NAME = "CascadeMaskRCNN"
STAGES = 3
RATIOS = (0.5, 1.0, 2.0)  # height over width of the anchors
BOX_SIDE, MASK_SIDE = 7, 14  # of the pooled features
DEFAULTS: Mapping[str, Any] = {
    "masks": True,
    "channels": 256,
    "scales": (4, 2, 1, 0.5),
    "anchors": (32, 64, 128, 256, 512),
    "box_convs": 4,
    "box_width": 1024,
    "mask_convs": 4,
    "anchors_sampled": 256,
    "boxes_sampled": 512,
    "before_nms": (2000, 1000),
    "proposals": 1000,
    "score": 0.05,
    "detections": 100,
}
_WIDEST, _MOST_LAYERS = 1 << 16, 256


# ---- options -----------------------------------------------------------------------------------------------


def checked_options(options: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """The options with defaults filled in.

    Args:
        options: what a constructor or a file gives.
        config: of the backbone.

    Raises:
        ValueError, TypeError: one is unknown, out of range, of another type, or does not suit the backbone.
    """
    for name in options:
        if name not in DEFAULTS:
            raise ValueError(f"[{NAME}] {name!r:.60}: no option of this detector")
    given = {**DEFAULTS, **options}
    found: dict[str, Any] = {"masks": boolean(f"[{NAME}] masks", given["masks"])}
    for name in ("channels", "box_width", "anchors_sampled", "boxes_sampled", "proposals", "detections"):
        found[name] = _whole(name, given[name], 1, _WIDEST)
    for name in ("box_convs", "mask_convs"):
        found[name] = _whole(name, given[name], 0, _MOST_LAYERS)
    found["scales"] = checked_scales(given["scales"], config.embed_dim, config.stride)
    found["anchors"] = _numbers("anchors", given["anchors"])
    few, many = len(found["scales"]), len(found["scales"]) + 1
    if len(found["anchors"]) not in (few, many):
        raise ValueError(
            f"[{NAME}] anchors: expected {few} or {many}, one for each level, got {len(found['anchors'])}"
        )
    before = native(f"[{NAME}] before_nms", given["before_nms"])
    if not isinstance(before, list) or len(before) != 2:
        raise ValueError(
            f"[{NAME}] before_nms: expected one number for training and one for inference, got {before!r:.60}"
        )
    found["before_nms"] = [_whole("before_nms", number, 1, 1 << 24) for number in before]
    score = native(f"[{NAME}] score", given["score"])
    if type(score) not in (int, float) or not 0 <= score < 1:
        raise ValueError(f"[{NAME}] score: expected 0 or more and less than 1, got {score!r:.60}")
    return {name: float(score) if name == "score" else found[name] for name in DEFAULTS}


def checked_scales(scales: Any, dim: int, stride: int) -> list[float]:
    """Those of a pyramid as numbers; ValueError names the first one that cannot be."""
    found = native("[SimplePyramid] scales", scales)
    if not isinstance(found, list) or not found:
        raise ValueError(f"[SimplePyramid] scales: expected at least one, got {scales!r:.60}")
    for scale in found:
        if type(scale) not in (int, float) or not 1 / 64 <= scale <= 4 or math.log2(scale) % 1:
            raise ValueError(f"[SimplePyramid] scales: expected powers of two up to 4, got {scale!r:.60}")
        if scale > 1 and (dim % int(scale) or stride % int(scale)):
            raise ValueError(
                f"[SimplePyramid] scale {scale:g}: must divide dim and stride, which are {dim} and {stride}"
            )
    if found != sorted(set(found), reverse=True):
        raise ValueError(f"[SimplePyramid] scales: expected the finest first, each once, got {scales!r:.60}")
    return [float(scale) for scale in found]


def check_backbone(config: Config) -> None:
    """ValueError where a detector cannot stand on it: a head of its own, or patches that leave gaps."""
    if config.num_classes:
        raise ValueError(
            f"[{NAME}] backbone: has a head for {config.num_classes} classes, which would not be used; "
            "backbone.reset_classifier(0) takes it off"
        )
    refuse_clips(NAME, config)
    size, patch = config.img_size, config.patch_size
    if config.stride != patch or size[0] % patch or size[1] % patch:
        raise ValueError(
            f"[{NAME}] backbone: patches of {patch} every {config.stride} pixels do not tile {size[0]} x "
            f"{size[1]}; take stride = patch_size and sides that are multiples of it"
        )


def _whole(name: str, value: Any, low: int, high: int) -> int:
    found = integer(f"[{NAME}] {name}", value)
    if not low <= found <= high:
        raise ValueError(f"[{NAME}] {name}: expected {low} to {high}, got {found}")
    return found


def _numbers(name: str, value: Any) -> list[float]:
    found = native(f"[{NAME}] {name}", value)
    if not isinstance(found, list):
        raise ValueError(f"[{NAME}] {name}: expected a list of numbers, got {value!r:.60}")
    for number in found:
        if type(number) not in (int, float) or not 0 < number < 1 << 24:
            raise ValueError(f"[{NAME}] {name}: expected numbers above 0, got {number!r:.60}")
    return [float(number) for number in found]


# ---- tensors -----------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """A layer of a pyramid's level: "enlarge" (by 2), "norm", "gelu", "shrink", "conv1" or "conv3"."""

    kind: str
    inputs: int
    outputs: int  # of "shrink": by how much


def level_steps(dim: int, out: int, scale: float) -> list[Step]:
    """The layers that make the map of this scale."""
    steps, width = [], dim
    if scale == 4:
        steps += [Step("enlarge", dim, dim // 2), Step("norm", dim // 2, dim // 2), Step("gelu", 0, 0)]
        width = dim // 2
    if scale > 1:
        steps.append(Step("enlarge", width, width // 2))
        width //= 2
    if scale < 1:
        steps.append(Step("shrink", width, round(1 / scale)))
    return [*steps, Step("conv1", width, out), Step("conv3", out, out)]


def level_name(stride: int, scale: float) -> str:
    """simfp_2 has a stride of 4 pixels, simfp_3 of 8, ..."""
    return f"simfp_{round(math.log2(stride / scale))}"


def pyramid_shapes(dim: int, out: int, scales: Sequence[float], stride: int) -> Shapes:
    """Shapes of a pyramid's tensors, by name."""
    found: Shapes = {}
    for scale in scales:
        for i, step in enumerate(level_steps(dim, out, scale)):
            name = f"{level_name(stride, scale)}.{i}."
            if step.kind == "norm":
                found.update(_norm(name, step.inputs))
            if step.kind == "enlarge":
                found[name + "weight"] = (step.inputs, step.outputs, 2, 2)
                found[name + "bias"] = (step.outputs,)
            if step.kind.startswith("conv"):
                found.update(_normed(name, step.inputs, step.outputs, int(step.kind[-1])))
    return found


def detector_shapes(options: Mapping[str, Any], classes: int, config: Config) -> Shapes:
    """Shapes of all tensors besides Vim's own, by name; options as `checked_options` gives them."""
    c, width = options["channels"], options["box_width"]
    pyramid = pyramid_shapes(config.embed_dim, c, options["scales"], config.stride)
    found: Shapes = {f"pyramid.{name}": shape for name, shape in pyramid.items()}
    rpn = "proposal_generator.rpn_head."
    for i in range(2):
        found.update(_biased(f"{rpn}conv.conv{i}.", (c, c, 3, 3)))
    found.update(_biased(rpn + "objectness_logits.", (len(RATIOS), c, 1, 1)))
    found.update(_biased(rpn + "anchor_deltas.", (4 * len(RATIOS), c, 1, 1)))
    for stage in range(STAGES):
        head = f"roi_heads.box_head.{stage}."
        for i in range(options["box_convs"]):
            found.update(_normed(f"{head}conv{i + 1}.", c, c, 3))
        found.update(_biased(head + "fc1.", (width, c * BOX_SIDE**2)))
        predictor = f"roi_heads.box_predictor.{stage}."
        found.update(_biased(predictor + "cls_score.", (classes + 1, width)))
        found.update(_biased(predictor + "bbox_pred.", (4, width)))
    if options["masks"]:
        head = "roi_heads.mask_head."
        for i in range(options["mask_convs"]):
            found.update(_normed(f"{head}mask_fcn{i + 1}.", c, c, 3))
        found.update(_biased(head + "deconv.", (c, c, 2, 2)))
        found.update(_biased(head + "predictor.", (classes, c, 1, 1)))
    return found


def _norm(prefix: str, channels: int) -> Shapes:
    return {prefix + "weight": (channels,), prefix + "bias": (channels,)}


def _normed(prefix: str, inputs: int, outputs: int, kernel: int) -> Shapes:
    return {prefix + "weight": (outputs, inputs, kernel, kernel), **_norm(prefix + "norm.", outputs)}


def _biased(prefix: str, shape: tuple[int, ...]) -> Shapes:
    return {prefix + "weight": shape, prefix + "bias": (shape[0],)}


# ---- cost --------------------------------------------------------------------------------------------------


def pyramid_flops(dim: int, out: int, scales: Sequence[float], height: int, width: int) -> int:
    """Multiply-adds of a pyramid's convolutions for one map (dim, height, width)."""
    total = 0
    for scale in scales:
        h, w = height, width
        for kind, inputs, outputs in level_steps(dim, out, scale):
            if kind == "shrink":
                h, w = h // outputs, w // outputs
            if kind == "enlarge":
                total += 4 * inputs * outputs * h * w
                h, w = 2 * h, 2 * w
            if kind.startswith("conv"):
                total += int(kind[-1]) ** 2 * inputs * outputs * h * w
    return total


def detector_flops(
    options: Mapping[str, Any], classes: int, config: Config, proposals: int, detections: int
) -> int:
    """Multiply-adds of one image besides the backbone's, with so many proposals and detections."""
    height, width = config.grid
    c, scales = options["channels"], options["scales"]
    shapes = detector_shapes(options, classes, config)

    def weights(prefix: str, dims: int) -> int:
        return sum(math.prod(s) for n, s in shapes.items() if n.startswith(prefix) and len(s) == dims)

    sides = [(int(height * scale), int(width * scale)) for scale in scales]
    if len(options["anchors"]) > len(scales):
        sides.append((-(-sides[-1][0] // 2), -(-sides[-1][1] // 2)))
    pixels = sum(h * w for h, w in sides)
    box = BOX_SIDE**2 * weights("roi_heads.box_head", 4) + weights("roi_heads.", 2)
    mask = weights("roi_heads.mask_head", 4) + 3 * weights("roi_heads.mask_head.predictor", 4)
    return (
        pyramid_flops(config.embed_dim, c, scales, height, width)
        + pixels * weights("proposal_generator", 4)
        + proposals * box
        + detections * MASK_SIDE**2 * mask
    )


# ---- files -------------------------------------------------------------------------------------------------


class DetectFile(NamedTuple):
    """A file whose tensors are those of what it says: its options are complete and in range."""

    config: Config
    task: DetectTask
    preprocess: Preprocess | None


def detect_file(path: Path) -> DetectFile:
    """What the file of a detector holds.

    Raises:
        vimcore.Error: it is missing or damaged.
        ValueError: it is no such file, or does not fit together.
    """
    tensors, (config, labels, preprocess), task = opened(path, DetectTask)
    try:
        if labels is not None:
            raise ValueError("has vimcore.labels, which are a classifier's; classes are in vimcore.task")
        check_backbone(config)
        check_channels(config, preprocess)
        options = checked_options(task.options, config)
        backbone: Shapes = {f"backbone.{key}": shape for key, shape in config.param_shapes().items()}
        wanted = {**backbone, **detector_shapes(options, len(task.classes), config)}
        if faults := tensor_faults(wanted, tensors):
            raise ValueError("the tensors do not fit the metadata:\n  " + listed(faults, "\n  "))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.fsdecode(path)}: {error}") from None
    return DetectFile(config, DetectTask(task.head, options, task.classes, task.ids, task.resize), preprocess)

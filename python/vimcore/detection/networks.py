# SPDX-License-Identifier: Apache-2.0
"""Cascade Mask R-CNN on a plain Vision Mamba: from images to losses, or to boxes and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _core
from .._core import Config, Preprocess
from ..nn.heads.cascade import CascadeHeads, Detections, Objects
from ..nn.heads.masks import paste
from ..nn.heads.pyramid import SimplePyramid
from ..nn.heads.rpn import ProposalGenerator, wide
from ..nn.heads.saving import tensors_to_save
from ..nn.state import stored_type
from ..nn.structure import made
from ..nn.vision_mamba import VisionMamba
from ..utils.arguments import integer, sides
from ..weights.detector import check_backbone, checked_options, detector_flops, detector_shapes
from ..weights.metadata import check_labels, pack
from ..weights.task import DetectTask, Path, pack_task

_NOT_OPTIONS = ("self", "backbone", "num_classes", "__class__")  # among what the constructor sees


class CascadeMaskRCNN(nn.Module):
    """A detector: backbone, simple pyramid, proposals, three stages that refine boxes, and masks.

    The defaults are the published detector for images of 1024 x 1024 px. Images are padded with zeros on the
    right and below: to the backbone's image size, or with its `dynamic_img_size` to the largest of the batch,
    rounded up to the coarsest stride.

    Args:
        backbone: without a head (num_classes=0); its last norm, which nothing uses, is frozen.
        num_classes: K, without the background.
        masks: also draw masks.
        channels: of pyramid and heads.
        scales: of the pyramid, see `SimplePyramid`.
        anchors: side in pixels of the anchors of each level; one more than scales, for a coarser top level
            that only proposes, or as many.
        box_convs, box_width: convolutions and width of the fully connected layer of each stage.
        mask_convs: convolutions of the mask head.
        anchors_sampled, boxes_sampled: of an image, that the losses see.
        before_nms: proposals of each level before non-maximum suppression, in training and in inference.
        proposals: of an image, afterwards.
        score, detections: smallest score of a detection, and how many of an image at most.

    Attributes:
        head: "cascade", as files call it.
        options: the arguments besides backbone and num_classes.
        task: what the file that it came from says of classes and sizes; None of a new network.
        preprocess: of that file.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range.
    """

    head = "cascade"

    def __init__(
        self,
        backbone: VisionMamba,
        num_classes: int,
        masks: bool = True,
        *,
        channels: int = 256,
        scales: Sequence[float] = (4, 2, 1, 0.5),
        anchors: Sequence[float] = (32, 64, 128, 256, 512),
        box_convs: int = 4,
        box_width: int = 1024,
        mask_convs: int = 4,
        anchors_sampled: int = 256,
        boxes_sampled: int = 512,
        before_nms: Sequence[int] = (2000, 1000),
        proposals: int = 1000,
        score: float = 0.05,
        detections: int = 100,
    ) -> None:
        given = {key: value for key, value in locals().items() if key not in _NOT_OPTIONS}
        super().__init__()
        if not isinstance(backbone, VisionMamba):
            raise TypeError(
                f"[CascadeMaskRCNN] backbone: expected a VisionMamba, got {type(backbone).__name__}"
            )
        c = backbone._config.replace(num_classes=backbone.num_classes)
        check_backbone(c)
        self.num_classes = integer("[CascadeMaskRCNN] num_classes", num_classes, 1)
        self.options = o = checked_options(given, c)
        self.task: DetectTask | None = None
        self.preprocess: Preprocess | None = None
        self.backbone = backbone
        backbone.norm_f.requires_grad_(False)
        top = len(o["anchors"]) > len(o["scales"])
        self.pyramid = SimplePyramid(c.embed_dim, o["channels"], o["scales"], c.stride, top)
        strides = self.pyramid.strides
        self.proposal_generator = ProposalGenerator(
            o["channels"], strides, o["anchors"], o["before_nms"], o["proposals"], o["anchors_sampled"]
        )
        self.roi_heads = CascadeHeads(
            o["channels"],
            self.num_classes,
            strides[: len(o["scales"])],
            o["masks"],
            o["box_convs"],
            o["box_width"],
            o["mask_convs"],
            o["boxes_sampled"],
            o["score"],
            o["detections"],
        )
        for module in (self.pyramid, self.proposal_generator, self.roi_heads):
            module.to(backbone.norm_f.weight.device, backbone.norm_f.weight.dtype)
        self._made = made(self)

    # ---- description ---------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """The backbone's architecture."""
        return self.backbone.config

    def flops(
        self,
        img_size: int | Sequence[int] | None = None,
        proposals: int | None = None,
        detections: int | None = None,
    ) -> int:
        """Multiply-adds of inference for one image of this size (None: the backbone's own), scans included.

        Args:
            proposals: boxes that the three stages see; None: as many as there are at most.
            detections: boxes that masks are drawn in, likewise.
        """
        config = self._config(img_size)
        o = self.options
        boxes = o["proposals"] if proposals is None else proposals
        drawn = o["detections"] if detections is None else detections
        return config.flops() + detector_flops(o, self.num_classes, config, boxes, drawn)

    def _config(self, img_size: int | Sequence[int] | None = None) -> Config:
        config = self.backbone._config.replace(num_classes=0)
        return config if img_size is None else config.replace(img_size=img_size)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, besides vectors and biases, that training does not decay."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.options.items())

    # ---- computing -----------------------------------------------------------------------------------------

    def forward(
        self,
        images: Tensor | Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]] | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Losses in training, to be summed; else what is on the images.

        Args:
            images: normalised, (C, h, w) each, of any size that fits into the backbone's.
            targets: one for each image, needed in training: "boxes" (N, 4) as x1, y1, x2, y2 in pixels,
                "labels" (N,) from 1 to K, and with masks "masks" (N, h, w) of 0 and 1; N may be 0.
            sizes: in inference, (height, width) in pixels of the pictures that the images were made from:
                boxes are scaled to them, and masks drawn on them. None: of the images.

        Returns:
            In training scalars: loss_objectness, loss_rpn_box_reg, for each stage i loss_classifier_i and
            loss_box_reg_i, and loss_mask. Else a dictionary for each image, best first: "boxes" (N, 4),
            "labels" (N,), "scores" (N,), and "masks" (N, 1, h, w): an object is where they are 0.5 or more.

        Raises:
            ValueError: names the image or target that does not fit.
        """
        images = list(images)
        if self.training:
            if targets is None:
                raise ValueError("[CascadeMaskRCNN] targets: needed in training; eval() ends it")
            truth = self._truth(images, targets)
            maps, own = self.features(images)
            proposals, losses = self.proposal_generator(maps, own, [x.boxes for x in truth])
            return {**losses, **self.roi_heads.losses(maps, proposals, truth, own)}
        found = self.detections(images, sizes)
        wanted = sizes if sizes is not None else [(x.shape[1], x.shape[2]) for x in images]
        results = []
        for image, size in zip(found, wanted):
            result = {"boxes": image.boxes, "labels": image.classes + 1, "scores": image.scores}
            if image.masks is not None:
                result["masks"] = paste(image.masks, image.boxes, size)[:, None]
            results.append(result)
        return results

    def detections(
        self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[Detections]:
        """As `forward` in inference, but classes from 0 on, and masks (N, 28, 28) in the boxes."""
        images = list(images)
        if sizes is not None and len(sizes) != len(images):
            raise ValueError(
                f"[CascadeMaskRCNN] sizes: expected one for each of {len(images)} images, got {len(sizes)}"
            )
        maps, own = self.features(images)
        found = self.roi_heads.detect(maps, self.proposal_generator(maps, own)[0], own)
        if sizes is None:
            return found
        return [_scaled(x, before, after) for x, before, after in zip(found, own, sizes)]

    def features(self, images: Sequence[Tensor]) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """The pyramid's maps of the padded images, and (height, width) of each image before."""
        batch = self._padded(images)
        maps: list[Tensor] = self.pyramid(self.backbone.forward_intermediates(batch, [-1])[0])
        return maps, [(x.shape[1], x.shape[2]) for x in images]

    def _padded(self, images: Sequence[Tensor]) -> Tensor:
        """One batch (B, C, H, W) with zeros on the right and below."""
        c = self.backbone._config
        if not images:
            raise ValueError("[CascadeMaskRCNN] images: expected at least one")
        for i, image in enumerate(images):
            if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != c.in_chans:
                what = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise ValueError(
                    f"[CascadeMaskRCNN] image {i}: expected a tensor ({c.in_chans}, h, w), got {what}"
                )
        height, width = (max(x.shape[axis] for x in images) for axis in (1, 2))
        if self.backbone.dynamic_img_size:
            step = max(self.pyramid.strides[: len(self.pyramid.scales)])
            size = -(-height // step) * step, -(-width // step) * step
        else:
            size = c.img_size[0], c.img_size[1]
            if height > size[0] or width > size[1]:
                raise ValueError(
                    f"[CascadeMaskRCNN] images: expected at most {size[0]} x {size[1]} pixels, "
                    f"got {height} x {width}; make them smaller, or set backbone.dynamic_img_size = True"
                )
        batch = images[0].new_zeros(len(images), c.in_chans, *size)
        for i, image in enumerate(images):
            batch[i, :, : image.shape[1], : image.shape[2]] = image
        return batch

    def _truth(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]) -> list[Objects]:
        if len(targets) != len(images):
            raise ValueError(
                f"[CascadeMaskRCNN] targets: expected one for each of {len(images)} images, "
                f"got {len(targets)}"
            )
        masks = self.roi_heads.mask_head is not None
        return [_objects(i, *pair, self.num_classes, masks) for i, pair in enumerate(zip(images, targets))]

    # ---- files ---------------------------------------------------------------------------------------------

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors of a file, by name."""
        own = {f"backbone.{name}": shape for name, shape in self._config().param_shapes().items()}
        return {**own, **detector_shapes(self.options, self.num_classes, self._config())}

    def save(
        self,
        path: Path,
        classes: Sequence[str] | None = None,
        ids: Sequence[int] | None = None,
        resize: Sequence[int] | None = None,
        preprocess: Mapping[str, Any] | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> None:
        """Writes weights, architecture and what prediction needs to one safetensors file, all or nothing.

        What is None stays as the file said that the network was loaded from; else it has the default below.

        Args:
            classes: a name each; default: their numbers, from 1 on as in results.
            ids: of the categories in a COCO file, one for each class; default: none.
            resize: (short, long) that the sides of an image are fitted into before; default: the sides of
                the backbone's image size.
            preprocess: mean, std, resize, crop, interpolation; default: ImageNet's mean and std. Networks
                with neither 1 nor 3 channels have none.
            dtype: of the weights in the file, see `VisionMamba.save`.

        Raises:
            ValueError: the file could not describe the network, or one of these does not fit.
        """
        old, config = self.task, self._config()
        if classes is None:
            classes = old.classes if old else [str(i + 1) for i in range(self.num_classes)]
        if ids is None and old is not None:
            ids = old.ids
        size = old.resize if old else (min(config.img_size), max(config.img_size))
        if resize is not None:
            size = sides("[CascadeMaskRCNN] resize", resize)
        if preprocess is None:
            steps = self.preprocess or Preprocess.default(config)
            if steps is not None and self.preprocess is None:
                steps = steps.replace(resize=min(config.img_size))
            preprocess = steps.to_dict() if steps else None
        names = tuple(check_labels(classes, self.num_classes))
        task = DetectTask(self.head, self.options, names, None if ids is None else tuple(ids), size)
        metadata = {**pack(config, None, preprocess), **pack_task(task)}
        arrays = tensors_to_save(self, self.backbone, self._made, self.shapes(), "CascadeMaskRCNN")
        _core.write_safetensors(path, arrays, metadata, stored_type(dtype))


def _scaled(found: Detections, before: tuple[int, int], after: tuple[int, int]) -> Detections:
    """For an image of another size."""
    y, x = after[0] / before[0], after[1] / before[1]
    return found._replace(boxes=found.boxes * found.boxes.new_tensor([x, y, x, y]))


def _objects(i: int, image: Tensor, target: Mapping[str, Tensor], num_classes: int, masks: bool) -> Objects:
    """A target of torchvision's kind, checked, with classes from 0 on, in the type of computation."""
    needed = ["boxes", "labels", *(["masks"] if masks else [])]
    missing = [name for name in needed if not isinstance(target.get(name), Tensor)]
    if missing:
        raise ValueError(f"[CascadeMaskRCNN] target {i}: expected tensors {', '.join(missing)}")
    boxes, labels = target["boxes"], target["labels"]
    count = len(labels) if labels.ndim == 1 else -1
    if boxes.ndim != 2 or boxes.shape[1] != 4 or len(boxes) != count or labels.is_floating_point():
        raise ValueError(
            f"[CascadeMaskRCNN] target {i}: expected boxes (N, 4) and whole labels (N,), "
            f"got {tuple(boxes.shape)} and {labels.dtype} {tuple(labels.shape)}"
        )
    flat = ~((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & boxes.isfinite().all(1))
    if count and bool(flat.any()):
        raise ValueError(
            f"[CascadeMaskRCNN] target {i}: expected boxes x1, y1, x2, y2 with x1 < x2 and y1 < y2, "
            f"got {boxes[flat][0].tolist()}"
        )
    strange = (labels < 1) | (labels > num_classes)
    if count and bool(strange.any()):
        raise ValueError(
            f"[CascadeMaskRCNN] target {i}: expected labels from 1 to {num_classes}, as torchvision counts "
            f"(0 is the background), got {int(labels[strange][0])}"
        )
    drawn = None
    if masks:
        drawn = target["masks"]
        if tuple(drawn.shape) != (count, *image.shape[1:]):
            raise ValueError(
                f"[CascadeMaskRCNN] target {i}: expected masks {(count, *image.shape[1:])}, "
                f"got {tuple(drawn.shape)}"
            )
        drawn = drawn.to(image.device)
    return Objects(boxes.to(wide(image)), labels.to(image.device).long() - 1, drawn)

# SPDX-License-Identifier: Apache-2.0
"""Objects, their boxes and masks: Cascade Mask R-CNN on a plain Vision Mamba, as in the paper's Table 3.

Needs torchvision. Targets and results are torchvision's dictionaries: classes are numbered from 1, so that
class i of a list of names has the label i + 1; 0 is torchvision's number for the background.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .nn.heads.cascade import CascadeHeads, Detections, Objects
from .nn.heads.masks import paste
from .nn.heads.pyramid import SimplePyramid
from .nn.heads.rpn import ProposalGenerator, wide
from .nn.vision_mamba import VisionMamba
from .utils.arguments import boolean, integer, native

__all__ = ["CascadeMaskRCNN"]


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

    Raises:
        TypeError, ValueError: an argument is of another type or out of range.
    """

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
        super().__init__()
        if not isinstance(backbone, VisionMamba):
            raise TypeError(
                f"[CascadeMaskRCNN] backbone: expected a VisionMamba, got {type(backbone).__name__}"
            )
        if backbone.num_classes:
            raise ValueError(
                f"[CascadeMaskRCNN] backbone: expected no head, got one of {backbone.num_classes} classes; "
                "backbone.reset_classifier(0) takes it off"
            )
        self.num_classes = _whole("num_classes", num_classes)
        self.backbone = backbone
        backbone.norm_f.requires_grad_(False)
        c = backbone._config
        sides = [_positive("anchors", side) for side in anchors]
        self.pyramid = SimplePyramid(c.embed_dim, channels, scales, c.stride, top=len(sides) > len(scales))
        strides = self.pyramid.strides
        if len(sides) != len(strides):
            few, many = len(scales), len(scales) + 1
            raise ValueError(
                f"[CascadeMaskRCNN] anchors: expected {few} or {many}, one for each level, got {len(sides)}"
            )
        before = tuple(_whole("before_nms", n) for n in before_nms)
        if len(before) != 2:
            raise ValueError(
                f"[CascadeMaskRCNN] before_nms: expected one number for training and one for inference, "
                f"got {before_nms!r}"
            )
        low = native("[CascadeMaskRCNN] score", score)
        if not isinstance(low, (int, float)) or not 0 <= low < 1:
            raise ValueError(f"[CascadeMaskRCNN] score: expected 0 or more and less than 1, got {score!r}")
        self.proposals = _whole("proposals", proposals)
        self.proposal_generator = ProposalGenerator(
            self.pyramid.out,
            strides,
            sides,
            (before[0], before[1]),
            self.proposals,
            _whole("anchors_sampled", anchors_sampled),
        )
        self.roi_heads = CascadeHeads(
            self.pyramid.out,
            self.num_classes,
            strides[: len(scales)],
            boolean("[CascadeMaskRCNN] masks", masks),
            integer("[CascadeMaskRCNN] box_convs", box_convs, 0),
            _whole("box_width", box_width),
            integer("[CascadeMaskRCNN] mask_convs", mask_convs, 0),
            _whole("boxes_sampled", boxes_sampled),
            float(low),
            _whole("detections", detections),
        )
        self.options: dict[str, Any] = {
            "masks": self.roi_heads.mask_head is not None,
            "channels": self.pyramid.out,
            "scales": self.pyramid.scales,
            "anchors": sides,
            "box_convs": int(box_convs),
            "box_width": int(box_width),
            "mask_convs": int(mask_convs),
            "anchors_sampled": int(anchors_sampled),
            "boxes_sampled": int(boxes_sampled),
            "before_nms": list(before),
            "proposals": self.proposals,
            "score": float(low),
            "detections": self.roi_heads.detections,
        }

    # ---- description ---------------------------------------------------------------------------------------

    def flops(self, proposals: int | None = None, detections: int | None = None) -> int:
        """Multiply-adds of one image of the backbone's size, scans included.

        Args:
            proposals: boxes that the three stages see; None: as many as there are at most.
            detections: boxes that masks are drawn in, likewise.
        """
        height, width = self.backbone._config.grid
        total = self.backbone.flops() + self.pyramid.flops(height, width)
        sides = [(int(height * scale), int(width * scale)) for scale in self.pyramid.scales]
        if self.pyramid.top:
            sides.append((-(-sides[-1][0] // 2), -(-sides[-1][1] // 2)))
        total += self.proposal_generator.rpn_head.flops(sum(h * w for h, w in sides))
        return total + self.roi_heads.flops(
            self.proposals if proposals is None else proposals,
            self.roi_heads.detections if detections is None else detections,
        )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters, besides vectors and biases, that the published training does not decay."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

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


def _whole(name: str, value: Any) -> int:
    return integer(f"[CascadeMaskRCNN] {name}", value, 1)


def _positive(name: str, value: Any) -> float:
    number = native(f"[CascadeMaskRCNN] {name}", value)
    if not isinstance(number, (int, float)) or not number > 0:
        raise ValueError(f"[CascadeMaskRCNN] {name}: expected numbers above 0, got {value!r}")
    return float(number)


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

# SPDX-License-Identifier: Apache-2.0
"""Cascade R-CNN (arXiv 1906.09756) as in detectron2: three stages refine proposals, then masks are drawn.

Classes are 0 .. K - 1 here, and K is the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from ...weights.detector import BOX_SIDE, MASK_SIDE, STAGES
from .masks import MaskHead, mask_loss, mask_targets
from .normed import NormedConv2d
from .roi import ScaledGradient, pool
from .rpn import wide

OVERLAPS = (0.5, 0.6, 0.7)  # from which on a stage takes a box for an object
WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))  # of its deltas
POSITIVE = 0.25  # largest share of positive boxes in a sample
SUPPRESSED = 0.5  # overlap of two detections of one class


class Objects(NamedTuple):
    """Of one image: boxes (N, 4) in pixels, classes (N,), masks (N, H, W) of 0 and 1 or None."""

    boxes: Tensor
    classes: Tensor
    masks: Tensor | None


class Detections(NamedTuple):
    """Of one image, best first: boxes (N, 4), classes (N,), scores (N,), masks (N, s, s) or None."""

    boxes: Tensor
    classes: Tensor
    scores: Tensor
    masks: Tensor | None


class BoxHead(nn.Module):
    """3x3 convolutions with norms, then a fully connected layer."""

    def __init__(self, channels: int, width: int, convs: int) -> None:
        super().__init__()
        self.convs = convs
        for i in range(convs):
            conv = NormedConv2d(channels, channels, 3, relu=True)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            self.add_module(f"conv{i + 1}", conv)
        self.fc1 = nn.Linear(channels * BOX_SIDE**2, width)
        nn.init.kaiming_uniform_(self.fc1.weight, a=1)
        nn.init.zeros_(self.fc1.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features (R, channels, 7, 7) to (R, width)."""
        for i in range(self.convs):
            x = self.get_submodule(f"conv{i + 1}")(x)
        return F.relu(self.fc1(x.flatten(1)), inplace=True)


class BoxPredictor(nn.Module):
    """Logits of the classes and the background, and the four deltas of a box, whatever its class."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, num_classes + 1)
        self.bbox_pred = nn.Linear(width, 4)
        for layer, deviation in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, width) to (R, num_classes + 1) and (R, 4)."""
        return wide(self.cls_score(x)), wide(self.bbox_pred(x))


class CascadeHeads(nn.Module):
    """What becomes of proposals.

    Args:
        channels, strides: of the maps that boxes read.
        box_convs, box_width, mask_convs: see `BoxHead` and `MaskHead`.
        masks: whether there are any.
        sampled: boxes of an image that the first stage learns from; the later ones take what it leaves.
        score, detections: inference: smallest score, and how many of an image at most.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        strides: Sequence[int],
        masks: bool,
        box_convs: int,
        box_width: int,
        mask_convs: int,
        sampled: int,
        score: float,
        detections: int,
    ) -> None:
        super().__init__()
        self.num_classes, self.strides = num_classes, list(strides)
        self.score, self.detections = score, detections
        self.box_head = nn.ModuleList(BoxHead(channels, box_width, box_convs) for _ in range(STAGES))
        self.box_predictor = nn.ModuleList(BoxPredictor(box_width, num_classes) for _ in range(STAGES))
        self.mask_head = MaskHead(channels, num_classes, mask_convs) if masks else None
        self.coders = [BoxCoder(weights) for weights in WEIGHTS]
        self.matchers = [Matcher(overlap, overlap) for overlap in OVERLAPS]
        self.sampler = BalancedPositiveNegativeSampler(sampled, POSITIVE)

    def _stage(self, i: int, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (R, K + 1) and deltas (R, 4) of the boxes of all images.

        The stages share the maps: each gives them a third of its gradient.
        """
        pooled = ScaledGradient.apply(pool(maps, self.strides, boxes, BOX_SIDE), 1 / STAGES)
        found: tuple[Tensor, Tensor] = self.box_predictor[i](self.box_head[i](pooled))
        return found

    def _decoded(
        self, i: int, deltas: Tensor, boxes: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor]:
        """The boxes after stage i, within their images."""
        every = self.coders[i].decode_single(deltas.detach(), torch.cat(list(boxes)))
        parts = every.split([len(x) for x in boxes])
        return [clip_boxes_to_image(x, size) for x, size in zip(parts, sizes)]

    # ---- training ------------------------------------------------------------------------------------------

    def losses(
        self,
        maps: Sequence[Tensor],
        proposals: Sequence[Tensor],
        truth: Sequence[Objects],
        sizes: Sequence[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """By name, of proposals and truth; the boxes of the truth are proposed as well, once."""
        boxes, classes, matches = [], [], []
        for proposed, objects in zip(proposals, truth):
            every = torch.cat([proposed, objects.boxes])
            found = self._matched(0, every, objects)
            chosen = self._sample(found[0])
            boxes.append(every[chosen])
            classes.append(found[0][chosen])
            matches.append(found[1][chosen])
        found_losses = {}
        first = boxes, classes, matches
        for i in range(STAGES):
            logits, deltas = self._stage(i, maps, boxes)
            targets = [_taken(objects.boxes, match) for objects, match in zip(truth, matches)]
            of = self._stage_losses(i, logits, deltas, boxes, torch.cat(classes), targets)
            found_losses[f"loss_classifier_{i + 1}"], found_losses[f"loss_box_reg_{i + 1}"] = of
            if i + 1 < STAGES:
                boxes = [x[_nonempty(x)] for x in self._decoded(i, deltas, boxes, sizes)]
                again = [self._matched(i + 1, x, objects) for x, objects in zip(boxes, truth)]
                classes, matches = [found[0] for found in again], [found[1] for found in again]
        if self.mask_head is not None:
            found_losses["loss_mask"] = self._mask_loss(self.mask_head, maps, truth, *first)
        return found_losses

    def _matched(self, i: int, boxes: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
        """Class of each box (R,), K where it is of no object, and its object (R,)."""
        if not len(objects.boxes) or not len(boxes):
            index = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
            return index + self.num_classes, index
        matches = self.matchers[i](box_iou(objects.boxes, boxes))
        index = matches.clamp(min=0)
        return torch.where(matches >= 0, objects.classes[index], self.num_classes), index

    def _sample(self, classes: Tensor) -> Tensor:
        """Indices of some of the boxes, drawn at random, at most a quarter of them objects."""
        positive, negative = self.sampler([(classes < self.num_classes).long()])
        return torch.nonzero(positive[0] | negative[0])[:, 0]

    def _stage_losses(
        self,
        i: int,
        logits: Tensor,
        deltas: Tensor,
        boxes: Sequence[Tensor],
        classes: Tensor,
        truth: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy; L1 of the deltas of objects, over all boxes."""
        if not len(classes):
            return logits.sum() * 0, deltas.sum() * 0
        of = torch.nonzero(classes < self.num_classes)[:, 0]
        targets = self.coders[i].encode_single(torch.cat(list(truth))[of], torch.cat(list(boxes))[of])
        box = F.l1_loss(deltas[of], targets, reduction="sum") / len(classes)
        return F.cross_entropy(logits, classes), box

    def _mask_loss(
        self,
        head: MaskHead,
        maps: Sequence[Tensor],
        truth: Sequence[Objects],
        boxes: Sequence[Tensor],
        classes: Sequence[Tensor],
        matches: Sequence[Tensor],
    ) -> Tensor:
        """Of the objects in the sample of the first stage."""
        of = [torch.nonzero(x < self.num_classes)[:, 0] for x in classes]
        chosen = [box[index] for box, index in zip(boxes, of)]
        logits = head(pool(maps, self.strides, chosen, MASK_SIDE))
        targets = [
            mask_targets(objects.masks, match[index], box, 2 * MASK_SIDE)
            for objects, match, index, box in zip(truth, matches, of, chosen)
            if objects.masks is not None and len(box)
        ]
        every = torch.cat([x[index] for x, index in zip(classes, of)])
        return mask_loss(logits, every, torch.cat(targets) if targets else logits)

    # ---- inference -----------------------------------------------------------------------------------------

    def detect(
        self, maps: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Detections]:
        """What is there: scores are means over the stages, boxes are those of the last one."""
        boxes = list(proposals)
        total = torch.zeros((), device=maps[0].device)
        for i in range(STAGES):
            logits, deltas = self._stage(i, maps, boxes)
            total = total + logits.softmax(1)
            boxes = self._decoded(i, deltas, boxes, sizes)
        scores = (total / STAGES).split([len(x) for x in boxes])
        found = [self._best(*pair) for pair in zip(boxes, scores)]
        if self.mask_head is None:
            return found
        logits = self.mask_head(pool(maps, self.strides, [x.boxes for x in found], MASK_SIDE))
        classes = torch.cat([x.classes for x in found])
        masks = logits[torch.arange(len(logits), device=logits.device), classes].sigmoid()
        parts = masks.split([len(x.boxes) for x in found])
        return [x._replace(masks=mask) for x, mask in zip(found, parts)]

    def _best(self, boxes: Tensor, scores: Tensor) -> Detections:
        """Boxes above the smallest score that no better one of their class covers; none without area.

        Raises:
            ValueError: scores are not finite, which would pass for nothing found.
        """
        if not bool(scores.isfinite().all()):
            raise ValueError("the network gives values that are not finite; its weights are damaged")
        place, classes = torch.nonzero(scores[:, :-1] > self.score, as_tuple=True)
        some = _nonempty(boxes)[place]
        place, classes = place[some], classes[some]
        chosen, certain = boxes[place], scores[place, classes]
        kept = batched_nms(chosen, certain, classes, SUPPRESSED)[: self.detections]
        return Detections(chosen[kept], classes[kept], certain[kept], None)


def _nonempty(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def _taken(boxes: Tensor, index: Tensor) -> Tensor:
    """The boxes of these objects; of an image without any, what no loss will look at."""
    return boxes[index] if len(boxes) else boxes.new_zeros(len(index), 4)

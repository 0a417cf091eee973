# SPDX-License-Identifier: Apache-2.0
"""Proposals of boxes from a pyramid: anchors, their head, detectron2's losses, on torchvision's operators."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from ...weights.detector import RATIOS


def anchors_of(
    grids: Sequence[tuple[int, int]], strides: Sequence[int], sizes: Sequence[float], like: Tensor
) -> Tensor:
    """Boxes (A, 4) around every pixel of every level: row by row, at each pixel one for each ratio.

    Centres are multiples of the stride, sides are not rounded.

    Args:
        grids: (height, width) of each level.
        sizes: square root of the anchors' area on each level, pixels of the image.
        like: whose type and device they get.
    """
    found = []
    for (height, width), stride, size in zip(grids, strides, sizes):
        halves = [(size / math.sqrt(r) / 2, size * math.sqrt(r) / 2) for r in RATIOS]
        cell = torch.tensor([(-w, -h, w, h) for w, h in halves], dtype=like.dtype, device=like.device)
        y, x = (torch.arange(n, dtype=like.dtype, device=like.device) * stride for n in (height, width))
        y, x = (t.reshape(-1, 1, 1) for t in torch.meshgrid(y, x, indexing="ij"))
        found.append((torch.cat([x, y, x, y], 2) + cell).flatten(0, 1))
    return torch.cat(found)


def wide(x: Tensor) -> Tensor:
    """In float32 or wider: coordinates and losses are never of 16 bits."""
    return x.float() if x.itemsize < 4 else x


class RPNHead(nn.Module):
    """Two 3x3 convolutions, then the logit of an object and the four deltas of each anchor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        steps: list[tuple[str, nn.Module]] = []
        for i in range(2):
            steps += [
                (f"conv{i}", nn.Conv2d(channels, channels, 3, padding=1)),
                (f"relu{i}", nn.ReLU(inplace=True)),
            ]
        self.conv = nn.Sequential(OrderedDict(steps))
        self.objectness_logits = nn.Conv2d(channels, len(RATIOS), 1)
        self.anchor_deltas = nn.Conv2d(channels, 4 * len(RATIOS), 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Logits (B, 3, h, w) and deltas (B, 12, h, w) of each map (B, channels, h, w)."""
        hidden = [self.conv(x) for x in maps]
        return [self.objectness_logits(x) for x in hidden], [self.anchor_deltas(x) for x in hidden]


class ProposalGenerator(RegionProposalNetwork):
    """torchvision's proposal network with anchors that are not rounded, and detectron2's losses and names.

    Anchors match at an overlap of 0.7, are background below 0.3, and the best of a box always matches.

    Args:
        channels: of the maps.
        strides, sizes: of each level, pixels; see `anchors_of`.
        before: the best of each level taken to non-maximum suppression (at 0.7), in training and else.
        after: the best of all levels that are proposed.
        sampled: anchors of an image that the losses see, at most half of them positive.
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        sizes: Sequence[float],
        before: tuple[int, int],
        after: int,
        sampled: int,
    ) -> None:
        super().__init__(
            anchor_generator=None,
            head=None,
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=sampled,
            positive_fraction=0.5,
            pre_nms_top_n={"training": before[0], "testing": before[1]},
            post_nms_top_n={"training": after, "testing": after},
            nms_thresh=0.7,
        )
        self.rpn_head = RPNHead(channels)
        self.strides, self.sizes, self.sampled = list(strides), list(sizes), sampled

    def forward(
        self,
        maps: Sequence[Tensor],
        sizes: Sequence[tuple[int, int]],
        truth: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals (P, 4) of each image, best first, and in training the losses.

        Args:
            maps: (B, channels, h, w) of each stride.
            sizes: (height, width) of each image before it was padded.
            truth: boxes (N, 4) of the objects of each image, to learn from.
        """
        logits, deltas = self.rpn_head(maps)
        counts = [x[0].numel() for x in logits]
        grids = [(x.shape[2], x.shape[3]) for x in maps]
        logit, delta = map(wide, concat_box_prediction_layers(logits, deltas))
        anchors = [anchors_of(grids, self.strides, self.sizes, delta)] * len(sizes)
        boxes = self.box_coder.decode(delta.detach(), anchors).view(len(sizes), -1, 4)
        proposals, _ = self.filter_proposals(boxes, logit, list(sizes), counts)
        if truth is None:
            return proposals, {}
        labels, matched = self.assign_targets_to_anchors(anchors, [{"boxes": x} for x in truth])
        objectness, box = self.compute_loss(logit, delta, labels, self.box_coder.encode(matched, anchors))
        return proposals, {"loss_objectness": objectness, "loss_rpn_box_reg": box}

    def compute_loss(
        self, logits: Tensor, deltas: Tensor, labels: list[Tensor], targets: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the L1 distance of positive ones, as sums over the sampled anchors.

        Both are divided by the number of anchors that are to be sampled, whether there were as many or not.

        Args:
            logits, deltas: (B A, 1) and (B A, 4) of all images.
            labels: (A,) of each image: 1 object, 0 background, -1 neither.
            targets: (A, 4) deltas of each image.
        """
        positive, negative = (torch.cat(x).bool() for x in self.fg_bg_sampler(labels))
        seen = positive | negative
        truth = torch.cat(labels)[seen].to(logits)
        count = self.sampled * len(labels)
        objectness = F.binary_cross_entropy_with_logits(logits.flatten()[seen], truth, reduction="sum")
        box = F.l1_loss(deltas[positive], torch.cat(list(targets))[positive].to(deltas), reduction="sum")
        return objectness / count, box / count

# SPDX-License-Identifier: Apache-2.0
"""Pieces of the detector: anchors, levels, pooling and masks, against formulas and torchvision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detection_helpers import detector
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from vimcore.nn.heads.masks import mask_targets, paste
from vimcore.nn.heads.roi import aligned, levels_of, pool, products
from vimcore.nn.heads.rpn import RATIOS, anchors_of


def test_anchors_are_torchvisions_without_rounding() -> None:
    sizes, strides = (9.0, 17.5), (4, 8)
    maps = [torch.zeros(1, 1, 6, 10), torch.zeros(1, 1, 3, 5)]
    theirs = AnchorGenerator(tuple((s,) for s in sizes), (RATIOS,) * 2)
    theirs.cell_anchors = [
        torch.tensor([[-1 / r**0.5, -(r**0.5), 1 / r**0.5, r**0.5] for r in RATIOS]) * size / 2
        for size in sizes
    ]
    wanted = theirs(ImageList(torch.zeros(1, 3, 24, 40), [(24, 40)]), maps)[0]
    found = anchors_of([(6, 10), (3, 5)], strides, sizes, torch.zeros(1))
    torch.testing.assert_close(found, wanted)


def test_pooling_of_a_ramp() -> None:
    """A bin's mean is the value at its centre, less the half pixel between centres and corners."""
    stride = 4
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(20.0), indexing="ij")
    boxes = torch.tensor([[8.0, 12.0, 40.0, 36.0], [13.5, 9.0, 61.0, 44.0]], dtype=torch.float64)
    found = pool([torch.stack([y, x])[None].double()], [stride], [boxes], 7)
    for box, values in zip(boxes, found):
        for axis, (low, high) in enumerate(((box[1], box[3]), (box[0], box[2]))):
            centres = (low + (high - low) * (torch.arange(7).double() + 0.5) / 7) / stride - 0.5
            wanted = centres[:, None].expand(7, 7) if axis == 0 else centres.expand(7, 7)
            torch.testing.assert_close(values[axis], wanted)


def test_products_are_torchvisions_pooling() -> None:
    """Values and gradients, of boxes within, partly and wholly outside, of less than a pixel, of none."""
    chance = torch.Generator().manual_seed(0)
    maps = torch.randn(3, 4, 9, 13, dtype=torch.float64, generator=chance, requires_grad=True)
    low = torch.rand(60, 2, dtype=torch.float64, generator=chance) * 80 - 20
    size = torch.rand(60, 2, dtype=torch.float64, generator=chance) ** 2 * 70
    size[0] = 0
    index = torch.tensor([0] * 30 + [2] * 30, dtype=torch.float64)  # none on the second image
    rois = torch.cat([index[:, None], low, low + size], 1)
    probe = torch.randn(60, 4, 7, 7, dtype=torch.float64, generator=chance)
    results = []
    for function in (products, aligned):
        found = function(maps, rois, 7, 0.25)
        (gradient,) = torch.autograd.grad((found * probe).sum(), maps)
        results.append((found, gradient))
        assert function(maps, rois[:0], 7, 0.25).shape == (0, 4, 7, 7)
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_levels() -> None:
    sides = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 447.0, 448.0, 5000.0])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], 1)
    assert levels_of(boxes, [4, 8, 16, 32]).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert levels_of(boxes, [16, 32]).tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


def test_boxes_read_their_level_and_image() -> None:
    maps = [
        torch.full((2, 1, 64, 64), float(i)) + torch.tensor([0.0, 10.0])[:, None, None, None] for i in (0, 1)
    ]
    small, large = [0.0, 0.0, 30.0, 30.0], [0.0, 0.0, 150.0, 150.0]
    boxes = [torch.tensor([large, small]), torch.tensor([small, large, large])]
    assert pool(maps, [4, 8], boxes, 2)[:, 0, 0, 0].tolist() == [1, 0, 10, 11, 11]


@pytest.mark.parametrize("box", [(3.0, 4.0, 13.0, 9.0), (2.4, 1.2, 20.6, 19.3), (-3.0, 10.0, 8.2, 30.0)])
def test_a_full_mask_fills_the_pixels_whose_centres_it_covers(box: tuple[float, ...]) -> None:
    pasted = paste(torch.ones(1, 28, 28, dtype=torch.float64), torch.tensor([box]).double(), (24, 26))
    y, x = (torch.arange(n) + 0.5 for n in (24, 26))
    wanted = ((y >= box[1]) & (y <= box[3]))[:, None] & ((x >= box[0]) & (x <= box[2]))
    assert torch.equal(pasted[0] >= 0.5, wanted)


def test_pasting_is_a_sample_of_the_whole_image() -> None:
    """Only the surroundings of boxes are computed: nothing is lost."""
    masks = torch.rand(3, 28, 28, dtype=torch.float64)
    boxes = torch.tensor([[1.0, 2.0, 25.0, 23.0], [-30.0, -5.0, 60.0, 90.0], [9.3, 9.3, 9.4, 12.0]]).double()
    y, x = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (24, 30))
    for mask, box, found in zip(masks, boxes, paste(masks, boxes, (24, 30))):
        v, u = (y - box[1]) / (box[3] - box[1]) * 2 - 1, (x - box[0]) / (box[2] - box[0]) * 2 - 1
        grid = torch.stack([u.expand(24, 30), v[:, None].expand(24, 30)], 2)
        wanted = F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0]
        torch.testing.assert_close(found, wanted)


def test_mask_targets() -> None:
    """1 where half of a bin is covered, and 0 below: of a half-covered box the first half."""
    masks = torch.zeros(2, 40, 40)
    masks[0, 6:20, :], masks[1] = 1, 1
    tops = torch.tensor([6.0, 6.0, 6.5, 6.7])
    boxes = torch.stack([0 * tops, tops, 0 * tops + 28, tops + 28], 1)
    first, full, shifted, further = mask_targets(masks, torch.tensor([0, 1, 0, 0]), boxes, 28)
    assert full.min() == 1
    assert torch.equal(first[:14], torch.ones(14, 28))
    assert first[14:].max() == 0
    assert torch.equal(shifted, first)  # the row that is covered by half counts
    assert torch.equal(further[:13], torch.ones(13, 28))
    assert further[13:].max() == 0  # by less than half does not


def test_zero_deltas_return_the_proposals() -> None:
    model = detector().eval()
    for predictor in model.roi_heads.box_predictor:
        torch.nn.init.zeros_(predictor.bbox_pred.weight)
    torch.nn.init.zeros_(model.roi_heads.box_predictor[2].cls_score.weight)
    model.roi_heads.score = 0.0
    with torch.no_grad():
        maps, sizes = model.features([torch.randn(3, 32, 32)])
        proposals = torch.tensor([[2.0, 3.0, 20.0, 30.0], [0.0, 0.0, 9.5, 7.25]])
        found = model.roi_heads.detect(maps, [proposals], sizes)[0]
    assert len(found.boxes) == 6  # of each class
    for box, score, label in zip(found.boxes, found.scores, found.classes):
        assert torch.isclose(proposals, box, atol=1e-5).all(1).any(), (score, label)

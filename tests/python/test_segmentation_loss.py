# SPDX-License-Identifier: Apache-2.0
"""The loss of pixels: averages, ignored pixels, sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from vimcore.tasks.segmentation.loss import cross_entropy, loss_of_heads


def target(*, ignored: float) -> torch.Tensor:
    labels = torch.randint(0, 4, (2, 6, 8))
    labels[torch.rand(2, 6, 8) < ignored] = 255
    return labels


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_the_two_averages(ignored: float) -> None:
    logits, labels = torch.randn(2, 4, 6, 8, dtype=torch.float64), target(ignored=ignored)
    valid = labels != 255
    log = logits.log_softmax(1)
    terms = [-log[b, labels[b, y, x], y, x] for b, y, x in valid.nonzero().tolist()]
    total = torch.stack(terms).sum()
    torch.testing.assert_close(cross_entropy(logits, labels), total / valid.sum())
    torch.testing.assert_close(
        cross_entropy(logits, labels), F.cross_entropy(logits, labels, ignore_index=255)
    )
    torch.testing.assert_close(cross_entropy(logits, labels, "all"), total / 96)
    torch.testing.assert_close(cross_entropy(logits, labels.to(torch.uint8)), total / valid.sum())


@pytest.mark.parametrize("average", ["valid", "all"])
def test_no_pixel_has_a_class(average: str) -> None:
    logits = torch.randn(2, 4, 3, 4, requires_grad=True)
    loss = cross_entropy(logits, torch.full((2, 6, 8), 255), average)
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_one_class() -> None:
    logits = torch.randn(1, 1, 6, 8, requires_grad=True)
    cross_entropy(logits, torch.zeros(1, 6, 8, dtype=torch.int64)).backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_logits_are_resized_and_never_labels() -> None:
    logits, labels = torch.randn(2, 4, 3, 4), target(ignored=0.2)
    large = F.interpolate(logits, (6, 8), mode="bilinear", align_corners=False)
    assert torch.equal(cross_entropy(logits, labels), cross_entropy(large, labels))


def test_the_auxiliary_part() -> None:
    logits, aux, labels = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), target(ignored=0.2)
    loss, parts = loss_of_heads((logits, aux), labels)
    torch.testing.assert_close(loss, cross_entropy(logits, labels) + 0.4 * cross_entropy(aux, labels))
    assert torch.equal(parts["aux_loss"], cross_entropy(aux, labels))
    assert loss_of_heads(logits, labels, "all") == (cross_entropy(logits, labels, "all"), {})
    with pytest.raises(ValueError, match="average: expected 'valid' or 'all', got 'mean'"):
        cross_entropy(logits, labels, "mean")

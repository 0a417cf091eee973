# SPDX-License-Identifier: Apache-2.0
"""Losses of pairs over all processes: open_clip's, which may be told of captions that fit several images.

A text of the batch that is also a caption of another image is no counterexample of it: the softmax's target
is spread over all that fit, the sigmoid counts all of them as pairs. Where a text fits only its own image,
both are open_clip's losses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed.nn
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional as F

from ..utils.distributed import rank, world


class Pairs(NamedTuple):
    """What fits together in a batch of all processes; B images and texts are of this one, N of all.

    Attributes:
        of_images: (B, N) bool: whether the text of a column is a caption of the image of a row.
        of_texts: (B, N) bool: whether the text of a row is a caption of the image of a column.
    """

    of_images: Tensor
    of_texts: Tensor

    @classmethod
    def known(cls, texts: Tensor, captions: Tensor) -> Pairs:
        """By numbers that stand for texts.

        Args:
            texts: (B,) int64 of the texts in the batch.
            captions: (B, K) int64 of all captions of each image, some of them maybe several times.
        """
        all_texts, all_captions = _gathered(texts), _gathered(captions)
        of_images = (captions[:, None] == all_texts[None, :, None]).any(-1)
        of_texts = (texts[:, None, None] == all_captions[None]).any(-1)
        return cls(of_images, of_texts)

    @classmethod
    def own(cls, count: int, device: torch.device) -> Pairs:
        """Each text fits its own image only; `count` of this process."""
        mine = torch.zeros(count, count * world(), dtype=torch.bool, device=device)
        mine[:, rank() * count : (rank() + 1) * count].fill_diagonal_(True)
        return cls(mine, mine)


class Contrastive(ClipLoss):
    """CLIP's: cross-entropy of each image over all texts, and of each text over all images.

    The mean over processes, as DistributedDataParallel takes it, is the loss of the whole batch.
    """

    def __init__(self) -> None:
        super().__init__(local_loss=True, gather_with_grad=True, rank=rank(), world_size=world())

    def forward(
        self,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        pairs: Pairs | None = None,
    ) -> Tensor:
        """A scalar.

        Args:
            images, texts: (B, embed_dim) unit vectors of this process.
            scale, bias: of the logits.
            pairs: what fits together; None: `Pairs.own`.
        """
        pairs = pairs or Pairs.own(len(images), images.device)
        logits = self.get_logits(images, texts, scale, bias)
        targets = [fits.to(images.dtype) / fits.sum(1, keepdim=True) for fits in pairs]
        of_images, of_texts = (F.cross_entropy(*both) for both in zip(logits, targets))
        return (of_images + of_texts) / 2


class Sigmoid(SigLipLoss):
    """SigLIP's: of every image with every text, whether they are a pair."""

    def forward(
        self,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        pairs: Pairs | None = None,
    ) -> Tensor:
        """See `Contrastive.forward`."""
        pairs = pairs or Pairs.own(len(images), images.device)
        every = torch.cat(torch.distributed.nn.all_gather(texts)) if world() > 1 else texts
        logits = self.get_logits(images, every, scale, bias)
        return -F.logsigmoid(torch.where(pairs.of_images, logits, -logits)).sum() / len(images)


def _gathered(values: Tensor) -> Tensor:
    """Those of all processes, by rank."""
    if world() == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts)

# SPDX-License-Identifier: Apache-2.0
"""Losses of pairs over all processes: open_clip's, which take equal captions for what they are.

Two pictures of a batch with the same caption are no counterexamples of each other: the softmax's target is
spread over them, the sigmoid counts all of them as pairs. Where captions differ, both are open_clip's losses.
"""

from __future__ import annotations

import torch
import torch.distributed.nn
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional as F

from ..utils.distributed import rank, world


class Contrastive(ClipLoss):
    """CLIP's: cross-entropy of each picture over all texts, and of each text over all pictures.

    The mean over processes, as DistributedDataParallel takes it, is the loss of the whole batch.
    """

    def __init__(self) -> None:
        super().__init__(local_loss=True, gather_with_grad=True, rank=rank(), world_size=world())

    def forward(
        self, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None, tokens: Tensor
    ) -> Tensor:
        """A scalar.

        Args:
            images, texts: (B, embed_dim) unit vectors of this process.
            scale, bias: of the logits.
            tokens: (B, context) of the texts.
        """
        of_images, of_texts = self.get_logits(images, texts, scale, bias)
        same = same_captions(tokens).to(of_images.dtype)
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(of_images, target) + F.cross_entropy(of_texts, target)) / 2


class Sigmoid(SigLipLoss):
    """SigLIP's: of every picture with every text, whether they are a pair."""

    def forward(
        self, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor | None, tokens: Tensor
    ) -> Tensor:
        """See `Contrastive.forward`."""
        every = torch.cat(torch.distributed.nn.all_gather(texts)) if world() > 1 else texts
        logits = self.get_logits(images, every, scale, bias)
        pairs = same_captions(tokens)
        return -F.logsigmoid(torch.where(pairs, logits, -logits)).sum() / len(images)


def same_captions(tokens: Tensor) -> Tensor:
    """(B, B of all processes) bool: whether the text of a row, of this process, is that of a column."""
    every = tokens
    if world() > 1:
        parts = [torch.empty_like(tokens) for _ in range(world())]
        torch.distributed.all_gather(parts, tokens)
        every = torch.cat(parts)
    _, number = torch.unique(every, dim=0, return_inverse=True)
    own = number[rank() * len(tokens) : (rank() + 1) * len(tokens)]
    return own[:, None] == number[None]

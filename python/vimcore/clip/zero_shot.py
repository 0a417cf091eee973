# SPDX-License-Identifier: Apache-2.0
"""Classification by the names of classes alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from open_clip import build_zero_shot_classifier
from torch import Tensor, nn

from .text import Tokenizer, tokenizer_of

PHOTO = ("a photo of a {}.",)


class ZeroShot(nn.Module):
    """Images to logits of classes that were only named.

    Attributes:
        names: of the classes.
        weights: (embed_dim, classes) unit vectors.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], weights: Tensor) -> None:
        super().__init__()
        self.model, self.names = model, list(names)
        self.register_buffer("weights", weights)
        self.weights: Tensor

    def forward(self, images: Tensor) -> Tensor:
        """(B, classes): cosines times the temperature that was learnt, of normalised images (B, C, H, W)."""
        model: Any = self.model
        return model.logit_scale.exp() * model.encode_image(images, normalize=True) @ self.weights


def zero_shot(
    model: nn.Module,
    names: Sequence[str],
    templates: Sequence[str] = PHOTO,
    *,
    tokenizer: Callable[[list[str]], Tensor] | None = None,
) -> ZeroShot:
    """A classifier of these names: for each the mean direction of its sentences.

    Args:
        model: of `vimcore.clip`, or any of open_clip's.
        names: of classes.
        templates: sentences in which {} stands for the name.
        tokenizer: of texts to tokens (N, context); default: CLIP's.

    Raises:
        ValueError: there are no names or templates, or a template has no place for the name.
    """
    if isinstance(names, str) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"[zero_shot] names: expected a list of texts, got {names!r:.60}")
    if isinstance(templates, str) or not templates:
        raise ValueError(f"[zero_shot] templates: expected a list of texts, got {templates!r:.60}")
    for template in templates:
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(
                f"[zero_shot] templates: expected {{}} where the name goes, got {template!r:.60}"
            )
    sentences = [_filler(template) for template in templates]  # other braces stand for themselves
    tokenize: Any = tokenizer or tokenizer_of(model)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    weights = build_zero_shot_classifier(model, tokenize, list(names), sentences, 64, device)
    model.train(was_training)
    if isinstance(tokenize, Tokenizer) and tokenize.cut:
        warnings.warn(
            f"[zero_shot] {tokenize.cut} sentences lose their end: more than {tokenize.context} tokens",
            stacklevel=2,
        )
    return ZeroShot(model, names, weights)


def _filler(template: str) -> Callable[[str], str]:
    return lambda name: template.replace("{}", name)


@torch.no_grad()
def encode_texts(model: nn.Module, texts: Sequence[str], tokenizer: Any, batch: int = 256) -> Tensor:
    """(N, embed_dim) unit vectors of texts."""
    network: Any = model
    device = next(model.parameters()).device
    parts = [
        network.encode_text(tokenizer(list(texts[i : i + batch])).to(device), normalize=True)
        for i in range(0, len(texts), batch)
    ]
    return torch.cat(parts)

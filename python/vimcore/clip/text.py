# SPDX-License-Identifier: Apache-2.0
"""Texts as tokens, by open_clip's tokenizer, whose vocabulary comes with its package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from ..weights.clip import VOCABULARY


class Tokenizer:
    """CLIP's tokens of texts.

    Args:
        context: the most tokens of a text, beginning and end included. Longer ones lose their end.

    Attributes:
        cut: how many texts were longer so far.
    """

    def __init__(self, context: int) -> None:
        self.tokenizer = SimpleTokenizer(context_length=context)
        self.context, self.cut = context, 0

    def __call__(self, texts: str | Sequence[str]) -> Tensor:
        """(N, context) int64; 0 fills up."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        found = torch.zeros(len(texts), self.context, dtype=torch.int64)
        for row, text in zip(found, texts):
            tokens = [start, *self.tokenizer.encode(text)]
            self.cut += len(tokens) >= self.context
            tokens = [*tokens[: self.context - 1], end]
            row[: len(tokens)] = torch.tensor(tokens)
        return found


def tokenizer_of(model: nn.Module) -> Tokenizer:
    """The one that a model's text tower was made for.

    Raises:
        ValueError: it has another vocabulary than CLIP's, such as towers of transformers have.
    """
    text = getattr(model, "text", model)  # CustomTextCLIP keeps it apart
    context, size = getattr(text, "context_length", None), getattr(text, "vocab_size", None)
    if type(context) is not int or size != VOCABULARY:
        raise ValueError(
            f"[clip] tokenizer: the text tower has a vocabulary of {size}, CLIP's has {VOCABULARY}; give the "
            "one that belongs to it, see open_clip.get_tokenizer"
        )
    return Tokenizer(context)

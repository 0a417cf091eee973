# SPDX-License-Identifier: Apache-2.0
"""Weights that the authors of Vim published on their Hugging Face hub. Needs no torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ..config import list_models


@dataclass(frozen=True)
class Published:
    """Weights of one network.

    Attributes:
        name: of `create_model`, whose configuration they fit.
        repo, file: where the checkpoint lies.
        top1: accuracy on ImageNet's validation images that the authors state, per cent.
        megabytes: about; the checkpoint also holds averaged weights and the optimizer's state.
        sha256: of the file; None: nobody has computed it for this list. See `fetch` for what is checked then.
    """

    name: str
    repo: str
    file: str
    top1: float
    megabytes: int
    sha256: str | None = None

    @property
    def page(self) -> str:
        """Where people read about the weights."""
        return f"https://huggingface.co/{self.repo}"


# Only names that are known: the file of the base size is not.
_TINY, _SMALL = "hustvl/Vim-tiny-midclstok", "hustvl/Vim-small-midclstok"
PUBLISHED = {
    weights.name: weights
    for weights in (
        Published("vim_tiny_patch16_224", _TINY, "vim_t_midclstok_76p1acc.pth", 76.1, 115),
        Published("vim_tiny_patch16_stride8_224", _TINY, "vim_t_midclstok_ft_78p3acc.pth", 78.3, 117),
        Published("vim_small_patch16_224", _SMALL, "vim_s_midclstok_80p5acc.pth", 80.5, 413),
        Published("vim_small_patch16_stride8_224", _SMALL, "vim_s_midclstok_ft_81p6acc.pth", 81.6, 417),
    )
}
LICENCE = (
    "the authors' model cards say apache-2.0 in their metadata and non-commercial in their text; read the "
    "card before you use the weights"
)


def published(name: str) -> Published:
    """The weights for a name of `create_model`.

    Raises:
        ValueError: there are none, or the name is unknown; names what there is.
    """
    if name in PUBLISHED:
        return PUBLISHED[name]
    there = ", ".join(PUBLISHED)
    if name in list_models():
        raise ValueError(
            f"[download] {name}: no published weights are known; there are some for {there}. A checkpoint "
            "that you have: vimcore.load_checkpoint(model, path), or `vimcore convert`"
        )
    close = difflib.get_close_matches(name, PUBLISHED, n=3, cutoff=0.5)
    hint = f"close to it: {', '.join(close)}" if close else f"there are weights for {there}"
    raise ValueError(f"[download] name: unknown {name!r:.100}; {hint}")


def of_repository(repo: str) -> list[Published]:
    """The weights that the authors have in a repository of theirs; none for other repositories."""
    return [weights for weights in PUBLISHED.values() if weights.repo == repo]

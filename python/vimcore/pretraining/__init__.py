# SPDX-License-Identifier: Apache-2.0
"""Learning without labels: what is learnt around a backbone, whose weights then start a network with a head.

loss = vimcore.pretraining.MaskedImages(backbone)(images)
"""

from .masked import MaskedImages
from .next_patch import NextPatch

__all__ = ["MaskedImages", "NextPatch"]

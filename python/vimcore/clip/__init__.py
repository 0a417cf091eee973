# SPDX-License-Identifier: Apache-2.0
"""Images and texts in one space: Vim as image tower of open_clip, whose text towers and tokenizer are used.

    model = vimcore.clip.create(vimcore.create_model("vim_tiny_patch16_224", num_classes=0))
    model = vimcore.clip.load("run/best.safetensors")             # of `vimcore train --task clip`
    classify = vimcore.clip.zero_shot(model, ["cat", "dog"], ["a photo of a {}."])
    classify(images).softmax(-1)
    vimcore.clip.export_image_tower(model, "images.safetensors")  # for vimcore.Runtime, vim-infer and C

With it imported, open_clip knows "vimcore_" + each name of `vimcore.list_models()` (patches of 16 pixels):
`open_clip.create_model_and_transforms("vimcore_vim_tiny_patch16_224")`. Nothing is downloaded.
"""

from ..utils.extras import required

with required("vimcore.clip", "clip"):
    import open_clip  # noqa: F401
    import timm  # noqa: F401

from .files import export_image_tower, load, save
from .losses import Contrastive, Pairs, Sigmoid
from .text import Tokenizer
from .towers import ImageTower, create, image_tower
from .zero_shot import ZeroShot, zero_shot

__all__ = [
    "Contrastive",
    "ImageTower",
    "Pairs",
    "Sigmoid",
    "Tokenizer",
    "ZeroShot",
    "create",
    "export_image_tower",
    "image_tower",
    "load",
    "save",
    "zero_shot",
]

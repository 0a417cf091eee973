# SPDX-License-Identifier: Apache-2.0
"""Images and texts in one space: Vim as image tower of open_clip, whose text towers and tokenizer are used.

    model = vimcore.clip.create(vimcore.create_model("vim_tiny_patch16_224", num_classes=0))
    model = vimcore.clip.load("run/best.safetensors")             # of `vimcore train --task clip`
    classify = vimcore.clip.zero_shot(model, ["cat", "dog"], ["a photo of a {}."])
    classify(images).softmax(-1)
    vimcore.clip.export_image_tower(model, "images.safetensors")  # for vimcore.Runtime, vim-infer and C

A model that open_clip's own programs trained is read by it and goes into one of our files:
`save(open_clip.create_model(name, pretrained="epoch_32.pt"), "both.safetensors")`.

With it imported, open_clip knows "vimcore_" + each name of `vimcore.list_models()` (patches of 16 pixels):
`open_clip.create_model_and_transforms("vimcore_vim_tiny_patch16_224")`. Nothing is downloaded.
"""

from ..utils.extras import needs

try:
    import open_clip  # noqa: F401
except ModuleNotFoundError as error:
    if error.name is None or error.name.split(".")[0] != "open_clip":
        raise
    raise ImportError(f"vimcore.clip needs open_clip; {needs('clip')}") from error

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

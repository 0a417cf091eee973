# SPDX-License-Identifier: Apache-2.0
"""Networks that give every pixel a class: a Vision Mamba and a head, their files, and published weights.

model = vimcore.segmentation.UperNet(backbone, num_classes=150)
logits = model.eval()(images)                      # (B, 150, H, W)
model.save("seg.safetensors", classes=names); model = vimcore.segmentation.load("seg.safetensors")
"""

from .files import load, load_checkpoint
from .networks import FCN, Segmentation, Segmenter, UperNet

__all__ = ["FCN", "Segmentation", "Segmenter", "UperNet", "load", "load_checkpoint"]

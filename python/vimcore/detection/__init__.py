# SPDX-License-Identifier: Apache-2.0
"""Objects on images, their boxes and masks: Cascade Mask R-CNN on a plain Vision Mamba (the paper's Table 3).

model = vimcore.detection.CascadeMaskRCNN(backbone, num_classes=80)
losses = model(images, targets)                    # in training; model.eval()(images) gives results
model.save("det.safetensors", classes=names); model = vimcore.detection.load("det.safetensors")

Needs torchvision. Targets and results are torchvision's dictionaries: labels count from 1, so that class i of
a list of names has the label i + 1; 0 is torchvision's background, which is no label.
"""

from .files import load, load_checkpoint
from .networks import CascadeMaskRCNN

__all__ = ["CascadeMaskRCNN", "load", "load_checkpoint"]

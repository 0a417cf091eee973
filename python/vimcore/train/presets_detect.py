# SPDX-License-Identifier: Apache-2.0
"""Recipes of detection: the authors' for COCO, and one for scenes of digits that takes minutes on a CPU.

"released": the authors' script for detectron2 (cascade_mask_rcnn_vimdet_t_100ep), with bfloat16 in the place
of its float16, in which Vim is known to overflow. batch_size is that of one process, of eight: fewer scale
the learning rate down. The paper's appendix has the same optimizer, but 380,000 updates and a linear decay.
"""

from __future__ import annotations

from typing import Any

from ..data.scenes import NAME as SCENES
from ..data.scenes import SIDE

_RELEASED: dict[str, Any] = {
    "task": "detect",
    "img_size": (1024,),
    "class_token": "none",
    "set": ("average_directions=false", "rope=true", "rope_residual=true", "rope_grid=14"),
    "drop_path_rate": 0.1,
    "repeats": 1,
    "batch_size": 8,
    "lr": 1e-4,
    "lr_batch": 64,
    "weight_decay": 0.1,
    "layer_decay": 0.837,
    "ema": 0.0,
    "precision": "bfloat16",
    "updates": 184_375,
    "schedule": "steps",
    "schedule_steps": "update",
    "warmup_updates": 250,
    "warmup_factor": 1e-3,
    "min_lr": 0.0,
    "eval_every": 3,
}

# Starts from a backbone that `digits-scenes` trained: --init RUN/best.safetensors.
DIGITS_OBJECTS: dict[str, Any] = {
    "task": "detect",
    "data": SCENES,
    "img_size": (SIDE,),
    "patch_size": 4,
    "embed_dim": 64,
    "depth": 4,
    "class_token": "none",
    "memory": "fast",
    "set": ("d_state=8",),
    "head_channels": 48,
    "head_scales": (2.0, 1.0, 0.5),
    "head_anchors": (14.0, 20.0, 28.0),
    "head_box_convs": 0,
    "head_box_width": 128,
    "head_mask_convs": 1,
    "head_anchors_sampled": 64,
    "head_boxes_sampled": 24,
    "head_before_nms": (200, 100),
    "head_proposals": 50,
    "workers": 0,
    "augment": "none",
    "hflip": 0.0,
    "repeats": 1,
    "batch_size": 4,
    "lr": 2e-3,
    "scale_lr": False,
    "weight_decay": 0.05,
    "clip_grad": 5.0,
    "ema": 0.99,
    "ema_ramp": True,
    "scenes": 1000,
    "epochs": 3,
    "schedule": "poly",
    "poly_power": 0.4,
    "schedule_steps": "update",
    "warmup_epochs": 0.15,
    "min_lr": 0.0,
    "threads": 1,
}

DETECT: dict[str, dict[str, Any]] = {
    "det-tiny-released": {**_RELEASED, "model": "vim_tiny_patch16_224"},
    "digits-objects": DIGITS_OBJECTS,
}

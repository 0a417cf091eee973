# SPDX-License-Identifier: Apache-2.0
"""Recipes of segmentation: the authors' for ADE20K, and one for scenes of digits that takes minutes on a CPU.

"released": the authors' scripts for mmsegmentation 0.29, with their slips where these change what is learnt:
layer_decay that acts on the stem alone, a loss divided by all pixels. "paper": what its appendix states,
with the scripts' value where it is silent; its list of the optimizer's settings has no layer decay.
"segmenter": the head of the paper's ablation by the recipe of its own authors, since Vim's are silent.
batch_size is that of one process, of 4 (released), 2 (paper) or 1: fewer scale the learning rate down.
"""

from __future__ import annotations

from typing import Any

from ..data.scenes import NAME as SCENES
from ..data.scenes import SIDE

_ADE20K: dict[str, Any] = {
    "task": "segment",
    "img_size": (512,),
    "drop_path_rate": 0.1,
    "head": "uper",
    "reduce_zero_label": True,
    "classes": 150,
    "resize": (512, 2048),
    "repeats": 1,
    "batch_size": 8,
    "ema": 0.0,
    "schedule": "poly",
    "schedule_steps": "update",
    "warmup_updates": 1500,
    "min_lr": 0.0,
    "eval_every": 2,
}
_RELEASED: dict[str, Any] = {
    **_ADE20K,
    "class_token": "none",
    "pos_embed": "authors",
    "updates": 60_000,
    "lr_batch": 32,
    "optimizer_groups": "released",
    "loss_average": "all",
}
_PAPER: dict[str, Any] = {
    **_ADE20K,
    "updates": 160_000,
    "lr": 6e-5,
    "lr_batch": 16,
    "weight_decay": 0.01,
}
_SEGMENTER: dict[str, Any] = {
    **_ADE20K,
    "head": "segmenter",
    "epochs": 64,
    "opt": "sgd",
    "lr": 1e-3,
    "lr_batch": 8,
    "weight_decay": 0.0,
    "poly_power": 0.9,
    "warmup_updates": None,
    "warmup_epochs": 0.0,
    "min_lr": 1e-5,
}
_TINY: dict[str, Any] = {"model": "vim_tiny_patch16_224"}
_SMALL: dict[str, Any] = {"model": "vim_small_patch16_224"}

DIGITS_SCENES: dict[str, Any] = {
    "task": "segment",
    "data": SCENES,
    "img_size": (SIDE,),
    "patch_size": 4,
    "embed_dim": 64,
    "depth": 4,
    "class_token": "none",
    "memory": "fast",
    "set": ("d_state=8",),
    "head": "fcn",
    "head_channels": 64,
    "head_convs": 4,
    "head_init": "torch",
    "workers": 0,
    "scale": (1.0, 1.0),
    "hflip": 0.0,
    "crop_share": 1.0,
    "photometric": False,
    "repeats": 1,
    "batch_size": 4,
    "lr": 3e-3,
    "scale_lr": False,
    "weight_decay": 0.05,
    "clip_grad": 5.0,
    "ema": 0.99,
    "ema_ramp": True,
    "scenes": 3500,
    "epochs": 4,
    "eval_every": 2,
    "schedule": "poly",  # a short run learns more at a rate that falls late
    "poly_power": 0.4,
    "schedule_steps": "update",
    "warmup_epochs": 0.2,
    "min_lr": 0.0,
    "threads": 1,
}

SEGMENT: dict[str, dict[str, Any]] = {
    "seg-tiny-released": {
        **_RELEASED,
        **_TINY,
        "head_taps": "mixer",
        "lr": 2e-4,
        "weight_decay": 0.1,
        "layer_decay": 0.92,
    },
    "seg-tiny-paper": {**_PAPER, **_TINY},
    "seg-small-released": {
        **_RELEASED,
        **_SMALL,
        "set": ("average_directions=false", "rope=true", "rope_residual=true", "rope_grid=14"),
        "lr": 1e-4,
        "weight_decay": 0.05,
        "layer_decay": 0.95,
    },
    "seg-small-paper": {**_PAPER, **_SMALL},
    "seg-tiny-segmenter": {**_SEGMENTER, **_TINY},
    "seg-small-segmenter": {**_SEGMENTER, **_SMALL},
    "digits-scenes": DIGITS_SCENES,
}

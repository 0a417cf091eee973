# SPDX-License-Identifier: Apache-2.0
"""Recipes of image-text learning: for millions of captioned photographs, and the digits' in minutes.

Optimizer, warm-up and augmentation are open_clip's usual ones; batch_size is that of one process.
"""

from __future__ import annotations

from typing import Any

from ..data.digits import MEAN, SIDE, STD

_PHOTOGRAPHS: dict[str, Any] = {
    "task": "clip",
    "repeats": 1,
    "batch_size": 256,
    "lr": 1e-3,
    "scale_lr": False,
    "weight_decay": 0.1,
    "betas": (0.9, 0.98),
    "ema": 0.0,
    "epochs": 32,
    "schedule_steps": "update",
    "warmup_epochs": 1.0,
    "warmup_lr": 0.0,
    "min_lr": 0.0,
}

CLIP: dict[str, dict[str, Any]] = {
    "clip-tiny": {
        **_PHOTOGRAPHS,
        "model": "vim_tiny_patch16_224",
        "space_dim": 256,
        "text_width": 256,
        "text_heads": 4,
    },
    "clip-small": {
        **_PHOTOGRAPHS,
        "model": "vim_small_patch16_224",
        "space_dim": 384,
        "text_width": 384,
        "text_heads": 6,
    },
    "digits-clip": {
        "task": "clip",
        "data": "digits-colours",
        "img_size": (SIDE,),
        "patch_size": 8,
        "in_chans": 3,
        "embed_dim": 64,
        "depth": 4,
        "memory": "fast",
        "mean": (MEAN,) * 3,
        "std": (STD,) * 3,
        "workers": 0,
        "augment": "none",
        "repeats": 1,
        "batch_size": 40,
        "lr": 1e-3,
        "scale_lr": False,
        "weight_decay": 0.1,
        "betas": (0.9, 0.98),
        "clip_grad": 1.0,
        "ema": 0.0,
        "epochs": 6,
        "schedule_steps": "update",
        "warmup_epochs": 0.3,
        "warmup_lr": 0.0,
        "min_lr": 0.0,
        "threads": 1,
        "space_dim": 64,
        "text_width": 64,
        "text_layers": 2,
        "text_heads": 4,
        "text_context": 16,
        "eval_every": 3,
    },
}

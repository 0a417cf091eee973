# SPDX-License-Identifier: Apache-2.0
"""Recipes of pretraining: those published for Mamba backbones on ImageNet, and the digits' in minutes.

mim: as MAE on FastVim (arXiv 2502.00594); ar2: as ARM (arXiv 2406.07537), whose forward direction is one half
of it. "finetune" are the recipes that follow each, for classifiers that read the mean of the patches.
batch_size is that of one process, of eight: fewer scale the learning rate down (scale_lr).
"""

from __future__ import annotations

from typing import Any

from ..data.digits import MEAN, SIDE, STD

_PHOTOGRAPHS: dict[str, Any] = {
    "task": "pretrain",
    "model": "vim_base_patch16_224",
    "class_token": "none",
    "repeats": 1,
    "lr": 1.5e-4,
    "lr_batch": 256,
    "weight_decay": 0.05,
    "betas": (0.9, 0.95),
    "ema": 0.0,
    "warmup_epochs": 40.0,
    "warmup_lr": 0.0,
    "min_lr": 0.0,
    "schedule_steps": "update",
    "norm_target": True,
    "eval_every": 10,
}
_FINETUNE: dict[str, Any] = {
    "model": "vim_base_patch16_224",
    "class_token": "none",
    "repeats": 1,
    "batch_size": 128,
    "lr": 5e-4,
    "lr_batch": 256,
    "weight_decay": 0.05,
    "layer_decay": 0.65,
    "ema": 0.99992,
    "epochs": 100,
    "schedule_steps": "update",
    "warmup_epochs": 5.0,
    "warmup_lr": 0.0,
    "min_lr": 1e-6,
}
_DIGITS: dict[str, Any] = {
    "task": "pretrain",
    "data": "digits",
    "img_size": (SIDE,),
    "patch_size": 8,
    "in_chans": 1,
    "embed_dim": 64,
    "depth": 4,
    "class_token": "none",
    "memory": "fast",
    "mean": (MEAN,),
    "std": (STD,),
    "workers": 0,
    "augment": "jiggle",
    "repeats": 1,
    "batch_size": 64,
    "lr": 2e-3,
    "scale_lr": False,
    "weight_decay": 0.05,
    "betas": (0.9, 0.95),
    "clip_grad": 3.0,
    "ema": 0.0,
    "epochs": 200,
    "schedule_steps": "update",
    "warmup_epochs": 10.0,
    "min_lr": 0.0,
    "threads": 1,
    "eval_every": 10,
}

PRETRAIN: dict[str, dict[str, Any]] = {
    "mim-base": {**_PHOTOGRAPHS, "objective": "mim", "batch_size": 512, "epochs": 800},
    "ar2-base": {
        **_PHOTOGRAPHS,
        "objective": "ar2",
        "img_size": (192,),
        "cluster": 4,
        "batch_size": 256,
        "epochs": 1600,
        "clip_grad": 3.0,
        "precision": "bfloat16",
    },
    "digits-mim": {**_DIGITS, "objective": "mim", "epochs": 400},
    "digits-ar2": {**_DIGITS, "objective": "ar2"},
}

FINETUNE_BASE: dict[str, dict[str, Any]] = {
    "mim-base-finetune": {**_FINETUNE, "drop_path_rate": 0.3},
    "ar2-base-finetune": {**_FINETUNE, "drop_path_rate": 0.1},
}

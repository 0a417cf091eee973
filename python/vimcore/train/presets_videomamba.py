# SPDX-License-Identifier: Apache-2.0
"""The recipe of VideoMamba (arXiv 2403.06977) by its authors' scripts for Kinetics-400, clips of 8 frames.

A run starts from a network of images (--init). The authors' batches hold every clip twice, augmented apart:
that is `repeats`, by which one epoch of theirs, all clips twice, is two of these. batch_size is that of one
process, of eight; --frames 16, 32 or 64 changes nothing else in their scripts. Their cosine begins after the
warm-up, here it begins with it (3 % of the peak at most). Their accuracies are means of 12 views of a clip, 4
in time and 3 in place; validation here sees one.
"""

from __future__ import annotations

from typing import Any

_KINETICS: dict[str, Any] = {
    "frames": 8,
    "frame_sampling": "random",
    "repeats": 2,
    "batch_size": 128,
    "lr": 2e-4,
    "lr_batch": 256,
    "layer_decay": 0.75,
    "betas": (0.9, 0.999),
    "ema": 0.0,
    "schedule_steps": "update",
    "warmup_epochs": 10.0,
    "warmup_lr": 4e-6,
    "min_lr": 4e-6,
    "crop_pct": 1.0,
}

VIDEOMAMBA: dict[str, dict[str, Any]] = {
    "videomamba-tiny": {
        **_KINETICS,
        "model": "videomamba_tiny_patch16_224",
        "epochs": 140,
        "weight_decay": 0.1,
        "drop_path_rate": 0.1,
        "rand_augment": "rand-m5-n2-mstd0.25-inc1",
    },
    "videomamba-small": {
        **_KINETICS,
        "model": "videomamba_small_patch16_224",
        "epochs": 100,
        "weight_decay": 0.05,
        "drop_path_rate": 0.35,
        "rand_augment": "rand-m7-n4-mstd0.5-inc1",
    },
    "videomamba-middle": {
        **_KINETICS,
        "model": "videomamba_middle_patch16_224",
        "epochs": 100,
        "weight_decay": 0.05,
        "drop_path_rate": 0.8,
        "rand_augment": "rand-m7-n4-mstd0.5-inc1",
    },
}

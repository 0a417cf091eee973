# SPDX-License-Identifier: Apache-2.0
"""The recipe of Mamba-R (arXiv 2405.14858) by its authors' script, for its base size, in three stages.

Each of the later stages starts from the one before (--init). The released networks were trained so, on eight
processes of `batch_size` and with activations in bfloat16; --model names another size.
"""

from __future__ import annotations

from typing import Any

_MAMBAR: dict[str, Any] = {
    "model": "mambar_base_patch16_224",
    "batch_size": 128,
    "weight_decay": 0.05,
    "rand_augment": "3a",
    "random_erase": 0.0,
    "label_smoothing": 0.0,
    "pos_embed": "authors",
}

MAMBAR: dict[str, dict[str, Any]] = {
    "mambar-base-128": {**_MAMBAR, "img_size": (128,), "lr": 5e-4, "epochs": 300, "drop_path_rate": 0.1},
    "mambar-base-224": {**_MAMBAR, "lr": 2e-4, "epochs": 100, "drop_path_rate": 0.4},
    "mambar-base-finetune": {
        **_MAMBAR,
        "batch_size": 64,
        "lr": 1e-5,
        "scale_lr": False,
        "weight_decay": 0.1,
        "rand_augment": "rand-m9-mstd0.5-inc1",
        "label_smoothing": 0.1,
        "repeats": 1,
        "crop_pct": 1.0,
        "epochs": 20,
        "drop_path_rate": 0.4,
    },
}

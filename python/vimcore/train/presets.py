# SPDX-License-Identifier: Apache-2.0
"""Published recipes by name.

"released": what the authors' training scripts do. "paper": what the paper's text states; where it is silent,
the scripts' value. The paper states AdamW, 1024 images an update, a peak of 1e-3, weight decay 0.05, 300
epochs, a cosine, and names crops, flips, label smoothing, mixup and erasing. For base there is no script.
batch_size is that of one process, of the authors' eight: fewer scale the learning rate down (scale_lr).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from ..data.digits import MEAN, SIDE, STD
from ..tasks.settings import Settings
from .presets_clip import CLIP
from .presets_detect import DETECT
from .presets_mambar import MAMBAR
from .presets_pretrain import FINETUNE_BASE, PRETRAIN
from .presets_segment import SEGMENT
from .presets_videomamba import VIDEOMAMBA
from .schedule import bounded_warmup

S = TypeVar("S", bound=Settings)

_PAPER: dict[str, Any] = {
    "batch_size": 128,
    "lr": 1e-3,
    "lr_batch": 1024,
    "weight_decay": 0.05,
    "schedule_steps": "epoch",
    "rand_augment": "",
    "color_jitter": 0.0,
    "cutmix": 0.0,
    "repeats": 1,
}
_SMALL: dict[str, Any] = {"model": "vim_small_patch16_224", "drop_path_rate": 0.05}

# Fine-tuning on long sequences: stride 8, a constant 1e-5, almost no decay.
_LONG: dict[str, Any] = {"epochs": 30, "weight_decay": 1e-8, "drop_path_rate": 0.0}
_LONG_RELEASED: dict[str, Any] = {
    **_LONG,
    "batch_size": 128,
    "lr": 5e-6,
    "warmup_lr": 1e-5,
    "min_lr": 1e-5,
    "pos_embed": "authors",
}
_LONG_PAPER: dict[str, Any] = {
    **_PAPER,
    **_LONG,
    "lr": 1e-5,
    "schedule": "constant",
    "warmup_epochs": 0.0,
    "min_lr": 1e-5,
    "warmup_lr": 1e-5,
}

# The network and recipe of `vimcore demo`.
DIGITS: dict[str, Any] = {
    "data": "digits",
    "img_size": (SIDE,),
    "patch_size": 8,
    "in_chans": 1,
    "embed_dim": 64,
    "depth": 4,
    "memory": "fast",
    "mean": (MEAN,),
    "std": (STD,),
    "crop_pct": 1.0,
    "workers": 0,
    "augment": "jiggle",
    "random_erase": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "repeats": 1,
    "batch_size": 32,
    "lr": 2e-3,
    "scale_lr": False,
    "weight_decay": 0.05,
    "ema": 0.99,
    "ema_ramp": True,
    "epochs": 20,
    "schedule_steps": "update",
    "warmup_epochs": 3.0,
    "threads": 1,
}

# From learnt weights to few images: hundreds of them, some dozen epochs. The first blocks, which fit already,
# learn the least; no image is mixed with another; the average's window is a ninth of the run.
FINETUNE: dict[str, Any] = {
    "crop_scale": (0.3, 1.0),
    "random_erase": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "repeats": 1,
    "batch_size": 32,
    "lr": 5e-4,
    "scale_lr": False,
    "weight_decay": 0.05,
    "layer_decay": 0.75,
    "ema": 0.9998,
    "ema_ramp": True,
    "epochs": 50,
    "schedule_steps": "update",
    "warmup_share": 0.1,
    "warmup_lr": 0.0,
    "min_lr": 0.0,
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny-released": {"model": "vim_tiny_patch16_224"},
    "tiny-paper": {**_PAPER, "model": "vim_tiny_patch16_224"},
    "small-released": {**_SMALL, "batch_size": 64, "lr": 1e-3, "weight_decay": 0.05},
    "small-paper": {**_PAPER, **_SMALL},
    "base-paper": {**_PAPER, "model": "vim_base_patch16_224"},
    "tiny-long-released": {**_LONG_RELEASED, "model": "vim_tiny_patch16_stride8_224"},
    "tiny-long-paper": {**_LONG_PAPER, "model": "vim_tiny_patch16_stride8_224"},
    "small-long-released": {**_LONG_RELEASED, "model": "vim_small_patch16_stride8_224"},
    "small-long-paper": {**_LONG_PAPER, "model": "vim_small_patch16_stride8_224"},
    "base-long-paper": {**_LONG_PAPER, "model": "vim_base_patch16_stride8_224"},
    "finetune": FINETUNE,
    "digits": DIGITS,
    **MAMBAR,
    **VIDEOMAMBA,
    **SEGMENT,
    **DETECT,
    **PRETRAIN,
    **FINETUNE_BASE,
    **CLIP,
}

# They go on from weights of another run.
FINE_TUNING = {
    *(name for name in PRESETS if "-long-" in name),
    "mambar-base-224",
    "mambar-base-finetune",
    *VIDEOMAMBA,
    *FINETUNE_BASE,
    "finetune",
}

# What else gives the same length, of the run and of its warm-up.
SAME = {
    "epochs": ("updates",),
    "warmup_epochs": ("warmup_share", "warmup_updates"),
    "warmup_updates": ("warmup_share",),
    "warmup_share": ("warmup_updates",),
}

# Where no preset is named, by task; a classifier that starts from weights has "finetune".
DEFAULTS = {
    "classify": "tiny-released",
    "segment": "seg-tiny-released",
    "detect": "det-tiny-released",
    "pretrain": "mim-base",
    "clip": "clip-tiny",
}


def task_of(preset: str) -> str:
    """The task that a preset is for."""
    return str(PRESETS[preset].get("task", "classify"))


def default_preset(task: str, init: str | None) -> str:
    """The preset where none is named.

    Args:
        init: the weights to start from, if there are any.
    """
    return "finetune" if task == "classify" and init is not None else DEFAULTS[task]


def overruled(typed: Iterable[str]) -> set[str]:
    """Settings that say the same in other units as one that was typed, and were not typed themselves."""
    names = set(typed)
    return {other for name in names for other in SAME.get(name, ())} - names


def recipe(kind: type[S], name: str, typed: Mapping[str, Any]) -> tuple[S, list[str]]:
    """The settings of a preset with those that were typed, and what else was changed, in words.

    A run that is shorter than the recipe gets at most a tenth of itself as warm-up, unless that was typed;
    epochs that were typed take the place of the recipe's updates, and so with other units of warm-up;
    averaged weights whose decay was typed forget faster while they are young, unless something is said of it.

    Args:
        kind: of the preset's task.

    Raises:
        ValueError: a setting does not exist or is out of range.
    """
    own = kind().merged(PRESETS[name])
    settings = own.merged({**dict.fromkeys(overruled(typed)), **typed})
    if "ema" in typed and "ema_ramp" not in {*typed, *PRESETS[name]}:
        settings = settings.merged({"ema_ramp": True})
    if settings.warmup_share is not None:
        return settings, []
    if settings.updates is not None:
        return _bounded_updates(settings, own, "warmup_updates" in typed)
    if "warmup_epochs" in typed or settings.epochs >= own.epochs:
        return settings, []
    warmup = bounded_warmup(settings.warmup_epochs, settings.epochs, settings.schedule_steps)
    if warmup == settings.warmup_epochs:
        return settings, []
    which = "" if settings.schedule_steps == "update" else "the whole epochs in "
    what = f"warm-up {settings.warmup_epochs:g} epochs shortened to {warmup:g}, {which}a tenth of the run"
    return settings.merged({"warmup_epochs": warmup}), [f"{what}; --warmup-epochs sets it"]


def _bounded_updates(settings: S, own: S, typed: bool) -> tuple[S, list[str]]:
    """A warm-up in updates of at most a tenth of a run that is shorter than its recipe."""
    warmup, updates = settings.warmup_updates, settings.updates
    assert updates is not None
    if warmup is None or typed or updates >= (own.updates or 0) or warmup <= updates // 10:
        return settings, []
    note = (
        f"warm-up {warmup} updates shortened to {updates // 10}, a tenth of the run; --warmup-updates sets it"
    )
    return settings.merged({"warmup_updates": updates // 10}), [note]

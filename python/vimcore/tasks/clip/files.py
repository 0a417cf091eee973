# SPDX-License-Identifier: Apache-2.0
"""`vimcore eval` of image-text models: weights against images with captions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...clip import load
from ...data.batches import evaluation_loader
from ...data.captions import Captioned, open_captioned, training_and_validation
from ...data.classes import Validation, collate
from ...data.coloured_digits import NAME
from ...data.inputs import eval_transform
from ...data.transforms import Input
from .evaluation import embed, recalls
from .settings import ClipSettings


@dataclass(frozen=True)
class Evaluated:
    """One file of weights, and its recalls.

    Attributes:
        values: by name, see `recalls`.
        images, captions: how many there were.
        seconds: for both towers, reading included.
        errors: files that could not be read.
    """

    weights: str
    values: Mapping[str, float]
    images: int
    captions: int
    seconds: float
    errors: dict[str, str]


def data_of(data: str | None, settings: ClipSettings | None) -> Captioned:
    """The images named, or those that the run was validated on."""
    if data == NAME:
        return training_and_validation(NAME, None, 0.0)[1]
    if data is not None:
        return open_captioned(data)
    if settings is None or settings.data is None:
        raise ValueError("data: name images with captions, as for train; there is no run to ask")
    return training_and_validation(settings.data, settings.val, settings.val_fraction)[1]


def evaluate(
    path: str,
    data: Captioned,
    settings: ClipSettings | None,
    *,
    batch_size: int = 64,
    workers: int = 2,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
) -> Evaluated:
    """The recalls of one file of weights.

    Args:
        dtype: of activations.

    Raises:
        ValueError: the images do not fit.
    """
    model = load(path, device)
    config, steps = model.visual.trunk._config, model.visual.preprocess
    size = config.img_size
    if steps is not None and not data.images.arrays:
        of = Input(config.in_chans, size, steps["mean"], steps["std"], steps["resize"])
    elif settings is not None and settings.mean and settings.std:
        of = Input(config.in_chans, size, settings.mean, settings.std, int(min(size) / settings.crop_pct))
    else:
        raise ValueError(f"{path}: no run beside it tells mean and deviation of .npy images")
    shape = (config.in_chans, *size)
    valid = Validation(data.images, eval_transform(of, data.images), shape)
    begin = time.perf_counter()
    batches = evaluation_loader(valid, batch_size, collate, workers)
    found = embed(model, batches, data.captions, torch.device(device), getattr(torch, dtype))
    seconds = time.perf_counter() - begin
    return Evaluated(path, recalls(found), len(found.images), len(found.captions), seconds, found.errors)

# SPDX-License-Identifier: Apache-2.0
"""`vimcore eval` of detection: files of weights on pictures with objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...data.batches import evaluation_loader
from ...data.detection import Framing, Jitter, Validation, collate
from ...data.object_sources import training_and_validation, validation
from ...data.objects import Objects
from ...data.transforms import Input
from ...detection import load
from .answers import Answers
from .evaluation import Found, Truth, detect
from .settings import DetectionSettings
from .task import answers, reading_of


@dataclass(frozen=True)
class Evaluated:
    """What a file of weights found, and how good that is."""

    weights: str
    objects: Objects
    found: Found
    answers: Answers
    errors: dict[str, str]


def evaluate(
    path: str,
    data: str | None,
    settings: DetectionSettings | None,
    *,
    images: str | None = None,
    img_size: Sequence[int] | None = None,
    batch_size: int = 8,
    workers: int = 2,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
) -> Evaluated:
    """The figures of one file.

    Args:
        data: as for training; None: the validation part of the run that the settings are of.
        images: folder with the pictures of a COCO file.
        img_size: pixels, other than stored; the position table is resized, pictures are fitted into it.
        dtype: of activations.

    Raises:
        OSError, ValueError: there is no data, or its classes are not the network's.
    """
    size = None if img_size is None else (img_size[0], img_size[-1])
    model = load(path, device, img_size=size)
    task, steps, c = model.task, model.preprocess, model.backbone._config
    assert task is not None  # of a file
    if steps is None or len(steps.mean) != c.in_chans:
        raise ValueError(f"{path}: the network takes {c.in_chans} channels, which no picture file could fill")
    objects = _objects(path, data, settings, list(task.classes), task.ids, images)
    resize = task.resize if size is None else (min(size), min(size))
    model.backbone.dynamic_img_size = resize[1] > min(c.img_size)
    of = Input(c.in_chans, (c.img_size[0], c.img_size[1]), steps.mean, steps.std, min(c.img_size))
    masks = bool(model.options["masks"])
    framing = Framing(of, resize, Jitter(None, 0.0), masks)
    batches = evaluation_loader(Validation(objects, framing), batch_size, collate, workers)
    found = detect(model, batches, torch.device(device), getattr(torch, dtype))
    truth = Truth(objects, masks)
    return Evaluated(path, objects, found, answers(truth, found), {**found.errors, **truth.errors})


def _objects(
    path: str,
    data: str | None,
    settings: DetectionSettings | None,
    classes: list[str],
    ids: Sequence[int] | None,
    images: str | None,
) -> Objects:
    known = None if ids is None else list(ids)
    if data is not None:
        return validation(data, classes, known, images)
    if settings is None or settings.data is None:
        raise ValueError(f"data: {path} is in no run that would tell; name pictures and truth with --data")
    _, valid, _ = training_and_validation(
        settings.data, settings.val, settings.val_fraction, reading_of(settings)
    )
    if valid.classes != classes:
        raise ValueError(f"{path}: its classes are not those of the run's data {settings.data}")
    return valid

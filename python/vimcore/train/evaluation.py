# SPDX-License-Identifier: Apache-2.0
"""`vimcore eval`: files of weights against images with labels, also at another image size or stride."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import _core
from .._core import Config, Preprocess
from ..data import transforms
from ..data.classes import Images, Validation, open_images, training_and_validation
from ..io import load_model
from ..tasks.classification import Answers, answers, loader
from ..tasks.settings import Settings, read_toml
from ..weights.metadata import unpack
from .run import BEST, CONFIG, LAST, LAST_EMA


@dataclass(frozen=True)
class Evaluated:
    """One file of weights, its answers and the images that they are about."""

    weights: str
    answers: Answers
    images: Images


def weights_of(path: str) -> tuple[list[Path], Settings | None]:
    """Files to evaluate and the settings of their run: those of a run folder, or one file."""
    folder = Path(path)
    if not folder.is_dir():
        return [folder], _settings(folder.parent)
    found = [folder / name for name in (LAST, LAST_EMA, BEST) if (folder / name).exists()]
    if not found:
        raise ValueError(f"{path}: no weights of a run ({BEST}, {LAST}, {LAST_EMA})")
    return found, _settings(folder)


def _settings(folder: Path) -> Settings | None:
    return Settings().merged(read_toml(str(folder / CONFIG))) if (folder / CONFIG).exists() else None


def images_of(data: str | None, settings: Settings | None) -> Images:
    """The images named, or those that the run was validated on."""
    if data is not None:
        if data == "digits" or (Path(data) / "train").is_dir():
            return training_and_validation(data, None, 0.1)[1]
        return open_images(data)
    if settings is None or settings.data is None:
        raise ValueError(
            "data: name a folder of class folders, a CSV or TSV list, or digits; there is no run to ask"
        )
    return training_and_validation(settings.data, settings.val, settings.val_fraction)[1]


def evaluate(
    path: Path,
    images: Images,
    settings: Settings | None,
    *,
    img_size: Sequence[int] | None = None,
    stride: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 64,
    workers: int = 2,
    device: torch.device | str = "cpu",
) -> Evaluated:
    """The answers of one file of weights.

    Args:
        img_size, stride: pixels, other than stored; the position table is resized.
        mean, std: of .npy images where no run beside the weights tells them.

    Raises:
        ValueError: classes, channels or sizes do not fit.
    """
    size = None if img_size is None else (img_size[0], img_size[-1])
    model = load_model(path, size, device, stride=stride)
    _, metadata = _core.safetensors_header(str(path))
    _, labels, stored = unpack(metadata, str(path))
    classes = model.num_classes
    if labels is not None:
        images = images.relabelled(labels)
    elif len(images.classes) != classes:
        raise ValueError(f"{path}: {classes} classes without names, the images have {len(images.classes)}")
    of = _input(model._config, stored, images, settings, mean, std)
    transform = transforms.array_eval(of) if images.arrays else transforms.picture_eval(of)
    batches = loader(Validation(images, transform, (of.channels, *of.size)), batch_size, workers)
    return Evaluated(str(path), answers(model, batches, torch.device(device)), images)


def _input(
    config: Config,
    stored: Preprocess | None,
    images: Images,
    settings: Settings | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> transforms.Input:
    (height, width), channels = config.img_size, config.in_chans
    found = stored or Preprocess.default(config)
    if found is not None and not images.arrays:
        steps = found.rescaled(height, width)
        return transforms.Input(channels, (height, width), steps.mean, steps.std, steps.resize)
    mean = mean or (settings.mean if settings else None)
    std = std or (settings.std if settings else None)
    if not mean or not std or len(mean) != channels or len(std) != channels:
        raise ValueError(f"mean and std: {channels} channels need as many values each, got {mean} and {std}")
    crop = settings.crop_pct if settings else 0.875
    return transforms.Input(channels, (height, width), mean, std, int(min(height, width) / crop))

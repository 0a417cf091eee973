# SPDX-License-Identifier: Apache-2.0
"""From decoded images to the network's input: for training by timm and torchvision, else by the core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor
from torchvision.transforms import v2

from .. import _core
from .._core import Config, Preprocess
from .sampling import seed_all

Transform = Callable[[NDArray[Any]], Tensor]
_FULL_SCALE = {"uint8": 255.0, "uint16": 65535.0}


class UnreadableError(ValueError):
    """An image that is damaged or of a kind that the network does not take."""


@dataclass(frozen=True)
class Input:
    """What the network takes: (channels, height, width), and the statistics of values from 0 to 1."""

    channels: int
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    resize: int  # short side before the central crop of validation

    @property
    def preprocess(self) -> dict[str, Any]:
        """As the weights file stores it."""
        return {
            "resize": self.resize,
            "crop": list(self.size),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": "bicubic",
        }


@dataclass(frozen=True)
class Augment:
    """What chance does to training images. The defaults are the authors' recipe.

    Attributes:
        crop_scale, crop_ratio: area and width over height of the random crop, from and to.
        hflip, random_erase: probabilities.
        rand_augment: timm's notation; empty: none, colour jitter instead. "3a": solarised, grey or blurred
            (3-Augment of DeiT III), and colour jitter.
    """

    crop_scale: tuple[float, ...] = (0.08, 1.0)
    crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    rand_augment: str = "rand-m9-mstd0.5-inc1"
    color_jitter: float = 0.3
    random_erase: float = 0.25


def default_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and deviation of pictures; None for images that are none."""
    steps = Preprocess.default(Config(in_chans=channels))
    return None if steps is None else (tuple(steps.mean), tuple(steps.std))


def scaled(array: NDArray[Any]) -> Tensor:
    """(C, H, W) float32 of an array file: integers from 0 to 1, floating point as it is."""
    if array.dtype.name not in _FULL_SCALE and array.dtype.kind != "f":
        raise UnreadableError(f"expected uint8, uint16 or floating point, got {array.dtype}")
    values = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return values / _FULL_SCALE.get(array.dtype.name, 1.0)


def picture_eval(of: Input) -> Transform:
    """(H, W, 3) uint8 to (C, h, w), exactly as `vimcore predict` and `vim-infer` do it."""
    return partial(_core_input, Preprocess(**of.preprocess))


def _core_input(steps: Preprocess, pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(_core.preprocess_pixels(np.ascontiguousarray(pixels), steps))


def picture_train(of: Input, augment: Augment) -> Transform:
    """(H, W, 3) uint8 to (C, h, w): random crop, flip, RandAugment or colour jitter, erasing."""
    crop, _, final = transforms_imagenet_train(
        img_size=of.size,
        scale=(augment.crop_scale[0], augment.crop_scale[1]),
        ratio=(augment.crop_ratio[0], augment.crop_ratio[1]),
        hflip=augment.hflip,
        interpolation="bicubic",
        mean=tuple(of.mean) * (3 // of.channels),
        std=tuple(of.std) * (3 // of.channels),
        re_prob=augment.random_erase if of.channels == 3 else 0.0,
        re_mode="pixel",
        separate=True,
    )
    colours = _colours(of, augment)
    if of.channels == 3:
        return partial(_through, Image.fromarray, v2.Compose([crop, colours, final]))
    grey = [v2.Grayscale(1), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    last = [v2.Normalize(list(of.mean), list(of.std)), v2.ToPureTensor(), *_erasing(augment)]
    return partial(_through, Image.fromarray, v2.Compose([crop, colours, *grey, *last]))


def _colours(of: Input, augment: Augment) -> Any:
    """RandAugment, or colour jitter where there is none of it."""
    strength = augment.color_jitter
    jitter = v2.ColorJitter(strength, strength, strength)
    if not augment.rand_augment:
        return jitter
    if augment.rand_augment == "3a":
        return v2.Compose([auto_augment.auto_augment_transform("3a"), jitter])
    fill = tuple(min(255, round(255 * value)) for value in of.mean) * (3 // of.channels)
    hints = {
        "translate_const": int(min(of.size) * 0.45),
        "img_mean": fill,
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        found = auto_augment.rand_augment_transform(augment.rand_augment, hints)
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"rand_augment: timm does not take {augment.rand_augment!r}{f': {error}' if str(error) else ''}; "
            "expected its notation, such as rand-m9-mstd0.5-inc1, or 3a, or nothing"
        ) from None
    for operation in found.ops:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return found


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's, with the black picture that 0 bits used to give; recent versions of Pillow refuse them."""
    return auto_augment.posterize(image, bits) if bits else image.point(lambda value: 0)


def _through(
    first: Callable[[NDArray[Any]], Any], steps: Callable[[Any], Tensor], image: NDArray[Any]
) -> Tensor:
    return steps(first(image))  # no lambda: loader processes may have to be sent it


def clip_eval(of: Input) -> Transform:
    """(T, H, W, 3) uint8 to (C, T, h, w), every frame as `picture_eval`."""
    return partial(_frame_by_frame, picture_eval(of))


def clip_train(of: Input, augment: Augment) -> Transform:
    """(T, H, W, 3) uint8 to (C, T, h, w): `picture_train` with the same draws for every frame."""
    return partial(_alike, picture_train(of, augment))


def _frame_by_frame(transform: Transform, clip: NDArray[np.uint8]) -> Tensor:
    return torch.stack([transform(frame) for frame in clip], 1)


def _alike(transform: Transform, clip: NDArray[np.uint8]) -> Tensor:
    seed, frames = int(torch.randint(2**62, ())), []
    for frame in clip:
        seed_all(seed)
        frames.append(transform(frame))
    return torch.stack(frames, 1)


def array_eval(of: Input) -> Transform:
    """(C, H, W) of any type to (C, h, w): resize, central crop."""
    steps = v2.Compose(
        [
            v2.Resize(of.resize, v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(list(of.size)),
            v2.Normalize(list(of.mean), list(of.std)),
        ]
    )
    return partial(_through, partial(_of_channels, of.channels), steps)


def array_train(of: Input, augment: Augment) -> Transform:
    """(C, H, W) of any type to (C, h, w): random crop, flip, erasing; colours mean nothing here."""
    steps = v2.Compose(
        [
            v2.RandomResizedCrop(
                list(of.size),
                (augment.crop_scale[0], augment.crop_scale[1]),
                (augment.crop_ratio[0], augment.crop_ratio[1]),
                v2.InterpolationMode.BICUBIC,
                antialias=True,
            ),
            v2.RandomHorizontalFlip(augment.hflip),
            v2.Normalize(list(of.mean), list(of.std)),
            *_erasing(augment),
        ]
    )
    return partial(_through, partial(_of_channels, of.channels), steps)


def _of_channels(channels: int, array: NDArray[Any]) -> Tensor:
    if array.shape[0] != channels:
        raise UnreadableError(f"expected {channels} channels (C, H, W), got {array.shape}")
    return scaled(array)


def _erasing(augment: Augment) -> list[Any]:
    return [RandomErasing(augment.random_erase, mode="pixel", device="cpu")] if augment.random_erase else []

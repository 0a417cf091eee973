# SPDX-License-Identifier: Apache-2.0
"""What happens to images together with their masks, against slow loops over pixels."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from vimcore.data import joint as j
from vimcore.data.joint import Joint, JointAugment
from vimcore.data.transforms import Input, UnreadableError

PLAIN: dict[str, Any] = {
    "resize": None,
    "scale": (1.0, 1.0),
    "hflip": 0.0,
    "most_of_one": 1.0,
    "photometric": False,
}


def of(size: tuple[int, int], **changes: Any) -> Joint:
    steps = Input(3, size, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), min(size))
    return Joint(steps, False, JointAugment(**{**PLAIN, **changes}))


def scene(height: int, width: int, seed: int = 0) -> tuple[Any, Any]:
    """The mask is a quarter of the first channel, so that what happens to them can be compared."""
    mask = np.random.default_rng(seed).integers(0, 64, (height, width)).astype(np.uint8)
    return np.stack([4 * mask, 255 - mask, mask], 2), mask


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        ((512, 683), 1.0, (512, 683)),
        ((480, 640), 1.0, (512, 683)),
        ((640, 480), 1.0, (683, 512)),
        ((100, 1000), 1.0, (205, 2048)),  # longer than 4 to 1: the long side decides
        ((480, 640), 0.5, (256, 341)),
        ((480, 640), 1.7, (870, 1160)),
        ((300, 200), 1.999, (1535, 1023)),
    ],
)
def test_sizes_that_images_are_fitted_into(
    size: tuple[int, int], factor: float, expected: tuple[int, int]
) -> None:
    assert j.fitted(size, (512, 2048), factor) == expected


def test_without_limits_sizes_are_multiplied() -> None:
    assert j.fitted((10, 21), None, 0.5) == (5, 11)
    assert j.fitted((10, 1), None, 0.1) == (1, 1)


def test_resized_images_and_masks() -> None:
    """Between centres of pixels without antialiasing; of masks the pixel at or before: OpenCV's ways."""
    image, mask = scene(6, 8)
    size = (4, 11)
    found = j.resize_bilinear(torch.from_numpy(image[:, :, 0].astype(np.float32))[None], size)[0].numpy()
    for row in range(size[0]):
        for column in range(size[1]):
            y = min(max((row + 0.5) * 6 / size[0] - 0.5, 0), 5)
            x = min(max((column + 0.5) * 8 / size[1] - 0.5, 0), 7)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, 5), min(left + 1, 7)
            a, b = y - top, x - left
            v = image[:, :, 0].astype(float)
            wanted = (1 - a) * ((1 - b) * v[top, left] + b * v[top, right])
            wanted += a * ((1 - b) * v[bottom, left] + b * v[bottom, right])
            assert found[row, column] == pytest.approx(wanted, abs=1e-3)
            assert j.resize_mask(mask, size)[row, column] == mask[row * 6 // size[0], column * 8 // size[1]]


def test_values_are_rounded_to_8_bits_as_opencv_does() -> None:
    image = np.array([[[0], [1]]], np.uint8).repeat(3, 2)  # 0, 0.25, 0.75, 1 in between
    found = of((1, 4), resize=(2, 4)).evaluation(image)
    assert found.shape == (3, 2, 4)
    assert torch.allclose(found[0, 0], (torch.tensor([0.0, 0, 1, 1]) / 255 - 0.4) / 0.2)
    halves = of((1, 1), resize=(1, 3)).evaluation(np.array([[[0], [1]]], np.uint8).repeat(3, 2))
    assert torch.allclose(halves[0, 0, 1], torch.tensor((1 / 255 - 0.4) / 0.2))  # 0.5 becomes 1


def test_normalisation_and_padding() -> None:
    """What is smaller than the network's image gets the mean colour, and is no class."""
    image, mask = scene(3, 5)
    values, classes = of((4, 8)).training(image, mask, np.random.default_rng(0))
    assert values.shape == (3, 4, 8)
    assert classes.shape == (4, 8)
    for channel, (mean, std) in enumerate(zip((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))):
        wanted = (image[:, :, channel] / 255 - mean) / std
        assert np.allclose(values[channel, :3, :5], wanted, atol=1e-5)
    assert (values[:, 3:] == 0).all()
    assert (values[:, :, 5:] == 0).all()
    assert (classes[:3, :5].numpy() == mask).all()
    assert (classes[3:] == 255).all()
    assert (classes[:, 5:] == 255).all()


def test_image_and_mask_move_together() -> None:
    """Crop and flip; every place and both directions occur, and the same seed gives the same sample."""
    image, mask = scene(9, 12)
    steps, seen = of((6, 8), hflip=0.5), set()
    for seed in range(200):
        values, classes = steps.training(image, mask, np.random.default_rng(seed))
        first = (values[0] * 0.2 + 0.4) * 255
        assert torch.allclose(first, 4.0 * classes, atol=1e-3)
        seen.add(classes.numpy().tobytes())
    assert len(seen) == 2 * 4 * 5
    again = [steps.training(image, mask, np.random.default_rng(5))[0] for _ in range(2)]
    assert torch.equal(*again)
    some = {
        tuple(of((6, 8), scale=(0.5, 2.0)).training(image, mask, np.random.default_rng(s))[1][-1].tolist())
        for s in range(20)
    }
    assert len(some) > 10


def test_crops_are_not_almost_all_of_one_class() -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[:, 15:] = 1
    mask[5:] = np.where(np.arange(20) < 8, 255, mask[5:])
    chance = np.random.default_rng(0)

    def acceptable(top: int, left: int) -> bool:
        part = mask[top : top + 8, left : left + 8]
        counts = np.bincount(part[part != 255], minlength=2)
        return bool(counts.min() > 0 and counts.max() < 0.75 * counts.sum())

    places = [j.limited_crop(mask, (8, 8), 0.75, chance) for _ in range(300)]
    share = np.mean([acceptable(*place) for place in places])
    of_all = np.mean([acceptable(top, left) for top in range(13) for left in range(13)])
    assert share == pytest.approx(1 - (1 - of_all) ** 11, abs=0.06)  # one draw and ten more
    anywhere = np.mean([acceptable(*j.limited_crop(mask, (8, 8), 1.0, chance)) for _ in range(300)])
    assert anywhere == pytest.approx(of_all, abs=0.08)
    for only in (np.full((9, 9), 255, np.uint8), np.zeros((9, 9), np.uint8)):  # nothing better: the last one
        assert j.limited_crop(only, (9, 9), 0.75, chance) == (0, 0)


@pytest.mark.parametrize(
    ("saturation", "turn"), [(1.0, 0.0), (0.6, 0.0), (1.5, 0.0), (1.0, 17 / 180), (1.0, -0.1)]
)
def test_saturation_and_hue(saturation: float, turn: float) -> None:
    """Against the standard library's HSV, pixel by pixel."""
    pixels = np.random.default_rng(1).integers(0, 256, (6, 7, 3)).astype(np.uint8)
    pixels[0, 0], pixels[0, 1], pixels[0, 2] = 0, 255, 90  # without colour
    found = j.with_colours(pixels, saturation, turn)
    for own, given in zip(found.reshape(-1, 3), pixels.reshape(-1, 3)):
        hue, s, value = colorsys.rgb_to_hsv(*(given / 255))
        wanted = np.array(colorsys.hsv_to_rgb((hue + turn) % 1, min(s * saturation, 1), value)) * 255
        assert np.abs(own - wanted).max() <= 0.51


def test_photometric_distortion() -> None:
    """Sixteen combinations of steps; nothing changes in one of them; the order of contrast is drawn, too."""
    pixels = np.random.default_rng(1).integers(0, 256, (5, 5, 3)).astype(np.uint8)
    same = sum((j.photometric(pixels, np.random.default_rng(seed)) == pixels).all() for seed in range(400))
    assert same / 400 == pytest.approx(1 / 16, abs=0.03)
    assert (j._linear(pixels, 1.0, 20.0) == np.minimum(pixels.astype(int) + 20, 255)).all()
    assert (j._linear(pixels, 1.5, 0.0) == np.minimum((pixels * 1.5).astype(int), 255)).all()


def test_grey_input_and_other_channels() -> None:
    image, mask = scene(4, 4)
    grey = Joint(Input(1, (4, 4), (0.5,), (0.5,), 4), False, JointAugment(**PLAIN))
    luminance = image @ np.array([0.299, 0.587, 0.114])
    assert np.allclose((grey.evaluation(image)[0] * 0.5 + 0.5) * 255, luminance, atol=0.51)
    arrays = Joint(Input(4, (4, 4), (0.0,) * 4, (1.0,) * 4, 4), True, JointAugment(**PLAIN))
    array = np.random.default_rng(0).random((4, 4, 4)).astype(np.float32)
    values, _ = arrays.training(array, mask, np.random.default_rng(0))
    assert torch.equal(values, torch.from_numpy(array))
    with pytest.raises(UnreadableError, match="expected 4 channels"):
        arrays.evaluation(array[:3])

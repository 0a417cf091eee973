# SPDX-License-Identifier: Apache-2.0
"""digits-scenes: exact masks and boxes, the rules of what counts, the same scene for the same seed."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from vimcore.data import scenes
from vimcore.data.digits import load_digits, split_digits
from vimcore.data.scenes import Scene, Scenes


def digest(scene: Scene) -> str:
    parts = (scene.image, scene.mask, scene.boxes, scene.digits, scene.masks)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_a_scene_follows_from_its_seed() -> None:
    first, second = Scenes(), Scenes()
    digests = [digest(first.draw(seed)) for seed in range(50)]
    assert [digest(second.draw(seed)) for seed in reversed(range(50))] == digests[::-1]
    assert len(set(digests)) == 50
    held_out = Scenes(held_out=True)
    assert not {digest(held_out.draw(seed)) for seed in range(50)} & set(digests)
    assert first.draw(2**63 - 1).image.shape == (48, 48, 3)  # as the seeds of a run are


def test_masks_boxes_and_classes_agree() -> None:
    counts = []
    for seed in range(100):
        scene = Scenes().draw(seed)
        counts.append(len(scene.digits))
        assert scene.image.dtype == scene.mask.dtype == np.uint8
        assert scene.masks.sum(0).max(initial=0) <= 1, "no pixel shows two digits"
        semantic = np.where(scene.mask == scenes.IGNORE, scenes.IGNORE, 0)
        for box, digit, mask in zip(scene.boxes, scene.digits, scene.masks):
            semantic[mask] = 1 + digit
            left, top, right, bottom = box
            inside = mask[top:bottom, left:right]
            assert inside.sum() == mask.sum() >= scenes.LEAST_PIXELS
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
        assert (scene.mask == semantic).all()
    assert {1, 2, 3} == set(counts)


def test_what_is_hardly_seen_is_ignored_and_no_instance() -> None:
    """Many digits on top of each other; what each leaves of the earlier ones is followed from outside."""
    ignored = left_out = 0
    areas: list[int] = []

    class Watched(Scenes):
        def _place(self, chance: Any, ink: Any, owner: Any, earlier: Any) -> tuple[int, int] | None:
            nonlocal left_out
            place = super()._place(chance, ink, owner, earlier)
            if place is None:
                left_out += 1
                return None
            rows, columns = (slice(at, at + n) for at, n in zip(place, ink.shape))
            below = owner[rows, columns][ink]
            for number, area in enumerate(areas):
                assert (below == number).sum() <= 0.25 * area
            areas.append(int(ink.sum()))
            return place

    crowded = Watched(side=64, count=(8, 8))
    for seed in range(20):
        areas.clear()
        scene = crowded.draw(seed)
        visible = sorted(int(mask.sum()) for mask in scene.masks)
        assert all(pixels >= 24 for pixels in visible)
        assert len(visible) <= len(areas)
        ignored += int((scene.mask == scenes.IGNORE).any())
    assert ignored > 0
    assert left_out > 0


def test_visible_halves_count_and_smaller_parts_do_not() -> None:
    owner = np.full((32, 32), -1, np.int64)
    owner[0, :30], owner[1, :25], owner[2, :24], owner[3, :23] = 0, 1, 2, 3
    image = np.zeros((32, 32, 3), np.uint8)
    scene = scenes._scene(image, owner, [7, 8, 9, 5], [60, 51, 48, 23])
    assert scene.digits.tolist() == [7, 9]  # 30 of 60; 25 of 51 and 23 pixels are too little; 24 of 48 is not
    assert scene.boxes.tolist() == [[0, 0, 30, 1], [0, 2, 24, 3]]
    assert scene.mask[:4, 0].tolist() == [8, 255, 10, 255]


def test_digits_of_the_two_parts() -> None:
    """Training scenes hold none of the held-out digits."""
    images, labels = load_digits()
    for held_out, part in enumerate(split_digits(labels)):
        found = Scenes(held_out=bool(held_out))
        assert (found.labels == labels[part]).all()
        assert (found.pictures == np.round(images[part] * (255 / 16))).all()


def test_colours_differ_from_the_background() -> None:
    """By 0.35 in a channel, less what pixel noise does to the mean."""
    for seed in range(30):
        scene = Scenes(count=(1, 1)).draw(seed)
        (mask,) = scene.masks
        (left, top, right, bottom), paper = scene.boxes[0], ~mask
        near = np.zeros_like(mask)
        near[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = True
        ink = scene.image[mask].astype(float)
        assert ink.std(0).max() < 0.05 * 255, "one flat colour with pixel noise"
        around = scene.image[paper & near].astype(float)
        assert np.abs(ink.mean(0) - around.mean(0)).max() > 0.15 * 255


@pytest.mark.parametrize(
    ("options", "named"),
    [({"side": 8}, "side"), ({"count": (3, 1)}, "count"), ({"size": (0.5, 0.9)}, "size")],
)
def test_options_out_of_range_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: expected"):
        Scenes(**options)  # type: ignore[arg-type]

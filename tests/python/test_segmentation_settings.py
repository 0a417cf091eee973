# SPDX-License-Identifier: Apache-2.0
"""Options of the head in the settings of segmentation."""

from __future__ import annotations

import pytest
from vimcore import VisionMamba
from vimcore.segmentation.files import create
from vimcore.tasks.segmentation.settings import HEADS, SegmentationSettings
from vimcore.train.presets import recipe


def test_another_head_leaves_the_preset_s_options_of_the_former() -> None:
    settings, _ = recipe(SegmentationSettings, "digits-scenes", {"head": "segmenter"})
    assert (settings.head, settings.head_channels, settings.head_options()) == ("segmenter", None, {})
    assert settings.head_init == "published"
    settings, _ = recipe(SegmentationSettings, "digits-scenes", {"head": "uper", "head_norm": "group"})
    assert settings.head_options() == {"channels": 64, "head_norm": "group"}
    settings, _ = recipe(SegmentationSettings, "seg-tiny-released", {"head": "fcn", "head_convs": 1})
    assert settings.head_options() == {"convs": 1}
    assert SegmentationSettings().merged({"head": "fcn", "head_convs": 1}).merged({"seed": 3}).head_convs == 1


def test_options_that_are_typed_have_to_fit() -> None:
    with pytest.raises(ValueError, match="head_convs: an option of the head fcn, not of segmenter"):
        recipe(SegmentationSettings, "digits-scenes", {"head": "segmenter", "head_convs": 1})


@pytest.mark.parametrize("head", HEADS)
def test_the_network_has_the_head_that_was_asked_for(head: str) -> None:
    settings, _ = recipe(SegmentationSettings, "digits-scenes", {"head": head})
    backbone = VisionMamba(16, 4, embed_dim=16, depth=4, num_classes=0, class_token="none")
    assert create(head, backbone, 3, settings.head_options()).head == head

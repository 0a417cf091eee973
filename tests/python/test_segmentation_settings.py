# SPDX-License-Identifier: Apache-2.0
"""Options of the head in the settings of segmentation."""

from __future__ import annotations

from pathlib import Path

import pytest
from vimcore import VisionMamba
from vimcore.cli import main
from vimcore.segmentation.files import create
from vimcore.tasks import read_settings
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


def test_what_recipes_say_of_ade20k_s_masks_is_not_said_of_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def settings(data: Path, *flags: str) -> tuple[tuple[int | None, bool], str]:
        assert main(["train", "--task", "segment", "--data", str(data), *flags, "--dry-run"]) == 0
        out, err = capsys.readouterr()
        (tmp_path / "config.toml").write_text(out)
        found = read_settings(str(tmp_path / "config.toml"))
        assert isinstance(found, SegmentationSettings)
        return (found.classes, found.reduce_zero_label), err

    for part in ("own/images", "own/masks", "ade/images/training", "ade/annotations/training"):
        (tmp_path / part).mkdir(parents=True)
    own, ade = tmp_path / "own", tmp_path / "ade"
    found, told = settings(own)
    assert found == (None, False)
    assert "classes 150, reduce_zero_label True of preset seg-tiny-released are for ADE20K" in told
    assert settings(own, "--classes", "3", "--preset", "seg-small-paper")[0] == (3, False)
    assert settings(own, "--reduce-zero-label", "--classes", "3") == ((3, True), "")
    assert settings(ade) == ((150, True), "")
    (ade / "classes.txt").write_text("floor\nwall\n")  # own masks in the layout of ADE20K
    assert settings(ade)[0] == (None, False)
    (own / "objectInfo150.txt").touch()
    assert settings(own) == ((150, True), "")

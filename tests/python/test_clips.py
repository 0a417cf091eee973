# SPDX-License-Identifier: Apache-2.0
"""Clips (VideoMamba): the network against the reference, and against the published layout of tensors."""

from __future__ import annotations

import pytest
import reference
import torch
from helpers import assert_matches_reference, small

CLIPS = small(class_token="head", average_directions=False, frames=3)
CASES = {
    "published": {},
    "no token": {"class_token": "none"},
    "middle": {"class_token": "middle"},
    "double": {"class_token": "double", "norm": "layer"},
    "registers": {"class_token": "registers", "registers": 4, "neck_reduction": 2},
    "one frame": {"frames": 1},
    "without positions": {"pos_embed": False},
    "every token": {"class_token": "none", "pool": "all"},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_reference(name: str, dtype: torch.dtype) -> None:
    config = reference.Config(**{**CLIPS.arguments(), **CASES[name]})
    assert_matches_reference(config, 2, dtype)

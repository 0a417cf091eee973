# SPDX-License-Identifier: Apache-2.0
"""Registers (Mamba-R): the network against the reference, and against the published layout of tensors."""

from __future__ import annotations

import pytest
import reference
import torch
from helpers import assert_matches_reference, small

REGISTERS = small(img_size=(12, 20), class_token="registers", registers=4)  # 15 patches: groups of 3
CASES = {
    "joined": {},
    "neck": {"neck_reduction": 2},
    "neck, layer norm": {"neck_reduction": 4, "norm": "layer"},
    "one": {"registers": 1},
    "without a head": {"neck_reduction": 2, "num_classes": 0},
    "without positions": {"pos_embed": False},
    "as many as fit": {"registers": 14},
    "pairs": {"directions": "block", "neck_reduction": 2},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_reference(name: str, dtype: torch.dtype) -> None:
    config = reference.Config(**{**REGISTERS.arguments(), **CASES[name]})
    assert_matches_reference(config, 3, dtype)

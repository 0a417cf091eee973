# SPDX-License-Identifier: Apache-2.0
"""Two scenes learnt by heart; `tests/bench/overfit_detector.py` does it with eight, in a minute."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_two_scenes_by_heart() -> None:
    path = Path(__file__).parents[1] / "bench" / "overfit_detector.py"
    spec = importlib.util.spec_from_file_location("overfit_detector", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["overfit_detector"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    found = module.overfit(2, 120)
    assert found.box_ap > 0.9
    assert found.mask_ap50 > 0.9

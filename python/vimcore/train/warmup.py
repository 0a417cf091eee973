# SPDX-License-Identifier: Apache-2.0
"""How long the learning rate rises where nobody said so."""

from __future__ import annotations


def bounded(warmup: float, epochs: int, steps: str = "update") -> float:
    """Epochs of warm-up: `warmup`, or a tenth of the run where that is shorter.

    Args:
        steps: when the learning rate moves, see Settings.schedule_steps. By epochs, only whole ones fit; and
            the authors' clock stands still for one of them.
    """
    tenth = {"update": epochs / 10, "epoch": epochs // 10, "authors": max(epochs // 10 - 1, 0)}[steps]
    return min(warmup, float(tenth))

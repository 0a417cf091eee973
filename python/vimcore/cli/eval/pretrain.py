# SPDX-License-Identifier: Apache-2.0
"""`vimcore eval` of pretraining."""

from __future__ import annotations

import argparse


def run(args: argparse.Namespace) -> int:
    """There is nothing to compare with labels.

    Raises:
        ValueError: always, with what to do instead.
    """
    best = f"{args.weights[0]}/best.safetensors"
    raise ValueError(
        f"{args.weights[0]}: pretraining has a loss only, which is in its log; train a network from it "
        f"(vimcore train --init {best}) and evaluate that, or look at `vimcore plot`"
    )

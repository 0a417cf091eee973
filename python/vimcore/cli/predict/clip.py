# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict` of image-text models."""

from __future__ import annotations

import argparse


def run(args: argparse.Namespace) -> int:
    """There are no classes.

    Raises:
        ValueError: always, with what to do instead.
    """
    raise ValueError(
        f"{args.weights}: has no classes: `vimcore search` finds pictures by a sentence, and "
        "vimcore.clip.zero_shot makes a classifier of names"
    )

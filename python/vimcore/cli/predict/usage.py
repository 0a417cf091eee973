# SPDX-License-Identifier: Apache-2.0
"""Flags of `vimcore predict` that do not go with the task of the weights."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping

from ...tools.prediction_files import SUFFIXES

_OF_CLASSIFIERS = {
    "logits": "of classifiers only; leave it away",
    "batch": "of classifiers only: these weights see a picture at a time; leave it away",
    "img_size": "of classifiers only: these weights resize pictures by a rule of their own; leave it away",
}


def refuse(args: argparse.Namespace, task: str, reasons: Mapping[str, str]) -> None:
    """Of a task whose results are pictures, too.

    Args:
        reasons: why a flag is refused, where there is more to say than that it is for classifiers.

    Raises:
        ValueError: names the flag and what to do.
    """
    for name, reason in {**_OF_CLASSIFIERS, **reasons}.items():
        if getattr(args, name):
            raise ValueError(f"{name}: {reason}")
    if args.out is not None and os.path.splitext(args.out)[1].lower() in SUFFIXES:
        raise ValueError(
            f"out: {task} writes into a folder, got the name of a file, {args.out}; --json prints lines"
        )

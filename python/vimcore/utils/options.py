# SPDX-License-Identifier: Apache-2.0
"""Types of the command line's options: numbers in their range, or a sentence that says what was expected."""

from __future__ import annotations

import argparse

MOST = 10**9  # of whole numbers, as in vim-infer
MOST_SECONDS = 10**6
MOST_THREADS = 1024  # as in the core: more than that is a slip


def whole(text: str, least: int = 1, most: int = MOST) -> int:
    """A whole number from `least` to `most`."""
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r:.60}")
    return value


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return whole(text)


def threads(text: str) -> int:
    """A number of threads."""
    return whole(text, most=MOST_THREADS)


def numbers(text: str) -> list[int]:
    """Positive whole numbers, separated by commas."""
    return [positive(part) for part in text.split(",")]


def seconds(text: str) -> float:
    """A number of seconds; neither negative nor infinite."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(
            f"expected a number of seconds from 0 to {MOST_SECONDS}, got {text!r:.60}"
        )
    return value

# SPDX-License-Identifier: Apache-2.0
"""Types of command line options: a value in its range, or an error that says what was expected."""

from __future__ import annotations

import argparse
import re

MOST = 10**9  # of integers, as in vim-infer
MOST_SECONDS = 10**6
MOST_THREADS = 1024  # as in the core: more than that is a slip


def integer(text: str, least: int = 1, most: int = MOST) -> int:
    """An integer from `least` to `most`."""
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got {text!r:.60}")
    return value


def positive(text: str) -> int:
    """An integer of at least 1."""
    return integer(text)


def threads(text: str) -> int:
    """A number of threads."""
    return integer(text, most=MOST_THREADS)


def numbers(text: str) -> list[int]:
    """Positive integers, separated by commas."""
    return [positive(part) for part in text.split(",")]


def seconds(text: str) -> float:
    """Seconds, from 0 to `MOST_SECONDS`."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(
            f"expected a number of seconds from 0 to {MOST_SECONDS}, got {text!r:.60}"
        )
    return value


def byte_count(text: str) -> int:
    """ "80G", "512M", "1.5T" or plain bytes, by powers of 1024."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    value = float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " ") if found else 0.0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected bytes such as 80G or 512M, got {text!r}")
    return int(value)


def image_size(text: str) -> tuple[int, int]:
    """(height, width) in pixels: "224", or "512x1024"."""
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text.strip().lower())
    if not found:
        raise argparse.ArgumentTypeError(f"expected pixels such as 224 or 512x1024, got {text!r}")
    return int(found[1]), int(found[2] or found[1])


def published_size(text: str) -> str:
    """ "vim_tiny", also by the name of its network for images of 224 pixels, "vim_tiny_patch16_224"."""
    return text.removesuffix("_patch16_224")

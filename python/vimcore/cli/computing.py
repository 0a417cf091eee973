# SPDX-License-Identifier: Apache-2.0
"""Arguments that commands share: with what they compute, and how large the pictures are made."""

from __future__ import annotations

import argparse

from ..utils import options
from ..utils.precision import FLOATS


def add_computing(parser: argparse.ArgumentParser) -> None:
    """`--threads`, `--device` and `--dtype`."""
    parser.add_argument(
        "--threads", type=options.threads, help="CPU threads (default: all cores); do not change the result"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=FLOATS,
        default="float32",
        help="type of activations: float32, bfloat16, on cuda float16 (default: %(default)s)",
    )


def add_img_size(parser: argparse.ArgumentParser, of: str = "") -> None:
    """`--img-size`; of: for which files of weights it is, with a colon and a space."""
    parser.add_argument(
        "--img-size",
        type=options.image_size,
        metavar="N|HxW",
        help=f"{of}another image size than the file's: the position table is resized",
    )

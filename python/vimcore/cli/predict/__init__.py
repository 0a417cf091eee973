# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict`: what weights say of picture files; the file of weights says of which task."""

from __future__ import annotations

import argparse
import importlib

from ...utils import options
from ...utils.precision import FLOATS
from ...weights.metadata import task_of_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE|FOLDER",
        help="image files, or folders of them; clips: folders of frames, or .npy files (T, H, W, C)",
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help="vimcore safetensors file")
    parser.add_argument(
        "--topk",
        type=options.positive,
        default=5,
        metavar="N",
        help="number of classes to show (default: %(default)s)",
    )
    parser.add_argument("--logits", action="store_true", help="also print the logits of all classes")
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
    parser.add_argument(
        "--out", metavar="FOLDER", help="segmentation, detection: write masks and overlays into this folder"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per image")


def run(args: argparse.Namespace) -> int:
    """By the file of the task in this folder."""
    return int(importlib.import_module(f".{task_of_file(args.weights)}", __name__).run(args))

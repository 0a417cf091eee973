# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict`: what weights say of picture files; the file of weights says of which task."""

from __future__ import annotations

import argparse
import importlib

from ...data.named_files import HELP
from ...utils import options
from ...weights.metadata import task_of_file
from ..computing import add_computing, add_img_size
from ..progress import HELP as PROGRESS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE|FOLDER|@LIST",
        help=f"{HELP}; clips: folders of frames, or .npy files (T, H, W, C)",
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
    add_computing(parser)
    parser.add_argument(
        "--batch",
        type=options.positive,
        metavar="N",
        help="classifiers: images computed together (default: 8); does not change the result",
    )
    add_img_size(parser, "classifiers: ")
    parser.add_argument(
        "--out",
        metavar="FILE|FOLDER",
        help="classifiers: write the predictions to FILE, .csv, .json (an array), .jsonl or .parquet; "
        "segmentation, detection: write masks and overlays into FOLDER",
    )
    parser.add_argument("--progress", action="store_true", help=PROGRESS)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per image, or with --out FILE one of them"
    )


def run(args: argparse.Namespace) -> int:
    """By the file of the task in this folder."""
    return int(importlib.import_module(f".{task_of_file(args.weights)}", __name__).run(args))

# SPDX-License-Identifier: Apache-2.0
"""`vimcore plan`."""

from __future__ import annotations

import argparse

from ..config import WIDTHS
from ..tools import plan
from ..utils import options
from ..utils.precision import FLOATS
from .output import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=options.published_size,
        choices=sorted(WIDTHS),
        default="vim_tiny",
        help="published size, also as vim_tiny_patch16_224 (default: %(default)s)",
    )
    parser.add_argument("--weights", metavar="FILE", help="use the architecture of this vimcore file")
    parser.add_argument(
        "--size",
        type=options.image_size,
        metavar="PIXELS",
        help="image size: 224, or height x width as 512x1024 (default: 224, or the file's)",
    )
    parser.add_argument(
        "--batch",
        type=options.positive,
        nargs="+",
        metavar="N",
        help=f"batch sizes (default: {' '.join(map(str, plan.BATCHES))})",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        nargs="+",
        help="default: both, as far as they compute in --dtype",
    )
    parser.add_argument(
        "--dtype",
        choices=FLOATS,
        help="type of activations (default: float32 on the cpu, bfloat16 on cuda)",
    )
    parser.add_argument("--threads", type=options.threads, help="CPU threads (default: all cores)")
    parser.add_argument(
        "--device-memory",
        type=options.byte_count,
        metavar="BYTES",
        help="memory to fit into, as 80G or 512M (default on cpu: this machine's)",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON, with the parts of every sum")


def run(args: argparse.Namespace) -> int:
    found = plan.report(
        args.model,
        args.weights,
        size=args.size,
        batches=args.batch or plan.BATCHES,
        devices=args.device,
        dtype=args.dtype,
        threads=args.threads,
        memory=args.device_memory,
    )
    if args.json:
        print_json(found)
        return 0
    height, width = found["config"]["img_size"]
    print(f"{height} x {width} pixels, {found['tokens']} tokens; copies of weights are estimated")
    print_table(plan.table(found))
    return 0

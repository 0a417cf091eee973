# SPDX-License-Identifier: Apache-2.0
"""`vimcore demo`."""

from __future__ import annotations

import argparse
import importlib

from ..utils import options
from ..utils.extras import required
from .output import print_json

# The module of vimcore.tools with the demo of a task.
SHOWN_BY = {"classify": "demo", "segment": "demo_segment", "detect": "demo_detect"}
NEEDS = {"classify": "demo", "segment": "demo,train", "detect": "demo,dense"}  # extras


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task", choices=SHOWN_BY, default="classify", help="what is learnt (default: %(default)s)"
    )
    parser.add_argument(
        "--out", default="vimcore-demo", metavar="FOLDER", help="output folder (default: %(default)s)"
    )
    parser.add_argument(
        "--epochs", type=options.positive, help="passes over the training data (default: the recipe's)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed; the same seed gives the same weights (default: 0)"
    )
    parser.add_argument(
        "--threads", type=options.threads, help="CPU threads (default: 1); do not change the result"
    )
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    with required("the demo", NEEDS[args.task]):  # matplotlib, too, is missed before the training, not after
        module = importlib.import_module(f"vimcore.tools.{SHOWN_BY[args.task]}")
    metrics = module.run_demo(args.out, args.epochs, args.seed, args.threads, show=not args.json)
    if args.json:
        print_json(metrics)
    return 0

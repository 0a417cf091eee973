# SPDX-License-Identifier: Apache-2.0
"""`vimcore plot`."""

from __future__ import annotations

import argparse

from ..utils import options
from ..utils.extras import required
from .output import print_json
from .streams import complain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder written by `vimcore train`")
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="output folder (default: the run; the current folder for several runs)",
    )
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="default: %(default)s")
    parser.add_argument(
        "--mistakes",
        type=options.positive,
        default=24,
        metavar="N",
        help="number of misclassified images to show (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the names of the files written as JSON")


def run(args: argparse.Namespace) -> int:
    with required("plotting", "demo"):
        from ..plots.runs import plot_runs
    written, notes = plot_runs(args.runs, args.out, args.format, args.mistakes)
    for note in notes:
        complain(note)
    if args.json:
        print_json({"written": written})
    else:
        print("\n".join(written))
    return 0

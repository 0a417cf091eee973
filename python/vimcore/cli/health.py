# SPDX-License-Identifier: Apache-2.0
"""`vimcore health`."""

from __future__ import annotations

import argparse
from collections import Counter

from ..data.named_files import HELP
from ..data.picture_files import passed_over_text
from ..utils import options
from ..utils.extras import required
from .output import print_json
from .streams import complain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="*",
        metavar="IMAGE|FOLDER|@LIST",
        help=f"{HELP} (default: random noise)",
    )
    parser.add_argument("--weights", required=True, metavar="FILE", help="vimcore safetensors file")
    parser.add_argument(
        "--count",
        type=options.positive,
        default=4,
        metavar="N",
        help="number of images to run, the first ones (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the range of every tensor as JSON")


def run(args: argparse.Namespace) -> int:
    with required("the health report", "torch"):
        from ..analysis.health import health_of_file
    passed_over = Counter[str]()
    try:
        found = health_of_file(args.weights, args.images, args.count, passed_over)
    finally:
        if passed_over:
            complain(passed_over_text(passed_over))
    if args.json:
        extra = {"passed_over": dict(sorted(passed_over.items()))} if passed_over else {}
        print_json({**found.to_dict(), **extra})
    else:
        print(found)
    return 0 if found.first_nonfinite is None else 1

# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict`."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter

from ..data.picture_files import passed_over_text
from ..utils import options
from ..utils.files import printable
from .output import print_table
from .streams import complain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders of them")
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
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="type of activations on cuda (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per image")


def run(args: argparse.Namespace) -> int:
    from ..runtime import Runtime
    from ..tools.predict import predict

    runtime = Runtime(args.weights, args.device, args.threads, dtype=args.dtype)
    total = failed = 0
    passed_over = Counter[str]()
    results, following = itertools.tee(predict(runtime, args.images, args.topk, passed_over))
    next(following, None)
    for result, later in itertools.zip_longest(results, following):
        total += 1
        if result.error is not None:
            failed += 1
            complain(f"{result.image}: {result.error}")
        if args.json:  # the last line also tells what was passed over
            print(result.to_json(args.logits, None if later else passed_over), flush=True)
        elif result.error is None:
            print(printable(result.image))
            rows = [[f"{100 * p:7.3f} %", f"{i:>5}", label or ""] for i, label, p in result.top]
            print_table(rows, indent="  ")
            if args.logits:
                assert result.logits is not None
                print("  logits " + " ".join(f"{float(v):.9g}" for v in result.logits))
    if passed_over:
        complain(passed_over_text(passed_over))
    if total == 0:
        raise RuntimeError("no pictures found (JPEG, PNG, PPM, PGM)")
    if failed:
        complain(f"{failed} of {total} images failed")
    return 1 if failed else 0

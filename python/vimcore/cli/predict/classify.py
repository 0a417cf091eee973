# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict`."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter

from ...data.picture_files import passed_over_text
from ...utils.files import printable
from ..output import print_table
from ..streams import complain


def run(args: argparse.Namespace) -> int:
    from ...runtime import Runtime
    from ...tools.predict import predict

    if args.out is not None:
        raise ValueError(
            f"out: {args.weights} is a classifier, whose predictions are printed, with --json by line"
        )
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

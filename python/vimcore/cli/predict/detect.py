# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict` of detectors."""

from __future__ import annotations

import argparse
import itertools
from collections import Counter

from ...data.picture_files import passed_over_text
from ...utils.extras import required
from ...utils.files import literal, printable
from ..output import print_table
from ..streams import complain


def run(args: argparse.Namespace) -> int:
    """Prints the objects in each image; writes overlays and COCO's results with --out."""
    with required("detection", "dense"):
        import faster_coco_eval  # noqa: F401
        import PIL  # noqa: F401
        import torch
        import torchvision  # noqa: F401
    from ...detection import load
    from ...tools.detect import Detecting, corners, detect
    from ...train.device import choose_device

    if args.logits:
        raise ValueError("logits: of classifiers only; leave it away")
    device = choose_device(args.device, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    network = Detecting(load(args.weights, device), getattr(torch, args.dtype))
    total = failed = 0
    passed_over = Counter[str]()
    results, following = itertools.tee(detect(network, args.images, args.out, passed_over))
    next(following, None)
    for result, later in itertools.zip_longest(results, following):
        total += 1
        if result.error is not None:
            failed += 1
            complain(f"{result.image}: {result.error}")
        if args.json:  # the last line also tells what was passed over
            print(result.to_json(None if later else passed_over), flush=True)
        elif result.error is None:
            print(printable(result.image))
            rows = []
            for row in result.rows[: args.topk]:
                sides = " ".join(f"{side:.1f}" for side in corners(row))
                label = literal(result.classes[row["category_id"] - 1])
                rows.append([f"{100 * row['score']:7.3f} %", f"{row['category_id'] - 1:>5}", label, sides])
            print_table(rows or [["nothing"]], indent="  ")
            if len(result.rows) > args.topk:
                print(f"  and {len(result.rows) - args.topk} more; --topk shows them")
            if result.overlay is not None:
                print(f"  {printable(result.overlay)}")
    if passed_over:
        complain(passed_over_text(passed_over))
    if total == 0:
        raise RuntimeError("no pictures found (JPEG, PNG, PPM, PGM)")
    if failed:
        complain(f"{failed} of {total} images failed")
    return 1 if failed else 0

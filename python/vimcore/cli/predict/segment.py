# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict` of networks for segmentation."""

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
    """Prints the areas of the classes in each image; writes masks and overlays with --out."""
    with required("segmentation", "train"):
        import PIL  # noqa: F401
        import torch
    from ...segmentation import load
    from ...tools.segment import Segmenting, segment
    from ...train.device import choose_device

    if args.logits:
        raise ValueError("logits: there are some for every pixel; vimcore.segmentation.load gives them")
    device = choose_device(args.device, args.dtype)
    if args.threads:
        torch.set_num_threads(args.threads)
    network = Segmenting(load(args.weights, device), getattr(torch, args.dtype))
    total = failed = 0
    passed_over = Counter[str]()
    results, following = itertools.tee(segment(network, args.images, args.out, passed_over))
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
            shown = result.areas[: args.topk]
            rows = [[f"{100 * a.share:7.3f} %", f"{a.index:>5}", literal(a.label)] for a in shown]
            print_table(rows, indent="  ")
            if result.mask is not None and result.overlay is not None:
                print(f"  {printable(result.mask)}, {printable(result.overlay)}")
    if passed_over:
        complain(passed_over_text(passed_over))
    if total == 0:
        raise RuntimeError("no pictures found (JPEG, PNG, PPM, PGM)")
    if failed:
        complain(f"{failed} of {total} images failed")
    return 1 if failed else 0

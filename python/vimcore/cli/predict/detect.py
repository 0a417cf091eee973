# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict` of detectors."""

from __future__ import annotations

import argparse
from collections import Counter

from ...data.named_files import pictures_of
from ...utils.extras import required
from ...utils.files import literal
from ..output import print_table
from ..results import as_json, as_lines, tell
from .usage import refuse


def run(args: argparse.Namespace) -> int:
    """Prints the objects in each image; writes overlays and COCO's results with --out."""
    with required("detection", "dense"):
        import faster_coco_eval  # noqa: F401
        import PIL  # noqa: F401
        import torch
        import torchvision  # noqa: F401
    from ...detection import load
    from ...tools.detect import Detecting, Predicted, corners, detect
    from ...train.device import choose_device

    refuse(args, "detection", {})
    device = choose_device(args.device, args.dtype, what="dtype")
    if args.threads:
        torch.set_num_threads(args.threads)
    network = Detecting(load(args.weights, device), getattr(torch, args.dtype))

    def show(result: Predicted) -> None:
        rows = []
        for row in result.rows[: args.topk]:
            sides = " ".join(f"{side:.1f}" for side in corners(row))
            label = literal(result.classes[row["category_id"] - 1])
            rows.append([f"{100 * row['score']:7.3f} %", f"{row['category_id'] - 1:>5}", label, sides])
        print_table(rows or [["nothing"]], indent="  ")
        if len(result.rows) > args.topk:
            print(f"  and {len(result.rows) - args.topk} more; --topk shows them")
        if result.overlay is not None:
            print(f"  {literal(result.overlay)}")

    passed_over = Counter[str]()
    pictures = pictures_of(args.images, passed_over)
    found = detect(network, pictures, args.out)
    lines = as_json(Predicted.to_json) if args.json else as_lines(show)
    return tell(found, len(pictures), passed_over, lines, args.progress)

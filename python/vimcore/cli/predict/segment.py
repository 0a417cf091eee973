# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict` of networks for segmentation."""

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
    """Prints the areas of the classes in each image; writes masks and overlays with --out."""
    with required("segmentation", "train"):
        import PIL  # noqa: F401
        import torch
    from ...segmentation import load
    from ...tools.segment import Segmented, Segmenting, segment
    from ...train.device import choose_device

    refuse(
        args,
        "segmentation",
        {"logits": "there are some for every pixel; vimcore.segmentation.load gives them"},
    )
    device = choose_device(args.device, args.dtype, what="dtype")
    if args.threads:
        torch.set_num_threads(args.threads)
    network = Segmenting(load(args.weights, device), getattr(torch, args.dtype))

    def show(result: Segmented) -> None:
        shown = result.areas[: args.topk]
        rows = [[f"{100 * a.share:7.3f} %", f"{a.index:>5}", literal(a.label)] for a in shown]
        print_table(rows, indent="  ")
        if result.mask is not None and result.overlay is not None:
            print(f"  {literal(result.mask)}, {literal(result.overlay)}")

    passed_over = Counter[str]()
    pictures = pictures_of(args.images, passed_over)
    found = segment(network, pictures, args.out)
    lines = as_json(Segmented.to_json) if args.json else as_lines(show)
    return tell(found, len(pictures), passed_over, lines, args.progress)

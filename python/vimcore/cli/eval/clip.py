# SPDX-License-Identifier: Apache-2.0
"""`vimcore eval` of image-text models."""

from __future__ import annotations

import argparse
from pathlib import Path

from ... import tasks
from ...data.picture_files import passed_over_text
from ...tasks.clip.settings import ClipSettings
from ...train.folder import weights_of
from ...utils.extras import required
from ..output import print_json, print_table
from ..streams import complain

_COLUMNS = ("image_r1", "image_r5", "image_r10", "text_r1", "text_r5", "text_r10")
_HEADINGS = ("image to text R@1", "R@5", "R@10", "text to image R@1", "R@5", "R@10")


def run(args: argparse.Namespace) -> int:
    """Prints the recalls of every file of weights."""
    with required("evaluation of image-text models", "clip"):
        import open_clip  # noqa: F401
    from ...tasks.clip.files import data_of, evaluate
    from ...train.device import choose_device

    for name in ("stride", "mean", "std", "img_size", "out"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name}: not for image-text models; leave it away")
    device = choose_device(args.device, args.dtype, what="dtype")
    rows = [["weights", "images", "captions", *_HEADINGS]]
    for path in args.weights:
        files, config = weights_of(path)
        settings = tasks.read_settings(str(config)) if config else None
        assert settings is None or isinstance(settings, ClipSettings)
        data = data_of(args.data, settings)
        for file in files:
            found = evaluate(
                str(file),
                data,
                settings,
                batch_size=args.batch_size,
                workers=args.workers,
                device=device,
                dtype=args.dtype,
            )
            if args.json:
                facts = {"images": found.images, "captions": found.captions, "skipped": len(found.errors)}
                rate = round(found.images / found.seconds, 2)
                print_json({"weights": found.weights, **facts, **found.values, "images_per_second": rate})
            values = [f"{100 * found.values[name]:.2f} %" for name in _COLUMNS]
            rows.append([found.weights, str(found.images), str(found.captions), *values])
        for name, reason in found.errors.items():
            complain(f"skipped {name}: {reason}")
        if data.images.passed_over:
            complain(passed_over_text(data.images.passed_over))
    if args.html is not None:
        from ...plots.report import report_evaluation

        report_evaluation("clip", None, args.weights[0], rows, Path(args.html))
    if not args.json:
        print_table(rows)
    return 0

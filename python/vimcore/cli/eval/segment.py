# SPDX-License-Identifier: Apache-2.0
"""`vimcore eval` of segmentation."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np

from ... import tasks
from ...data.picture_files import passed_over_text
from ...tasks.segmentation.settings import SegmentationSettings
from ...train.folder import weights_of
from ...utils.files import literal, shortened
from ..output import print_json, print_table
from ..streams import complain

MOST = 20  # classes whose confusion is printed


def run(args: argparse.Namespace) -> int:
    """Prints the scores of every file of weights; of the best one also classes and confusion matrix."""
    from ...tasks.segmentation.files import evaluate
    from ...train.device import choose_device

    if args.stride is not None:
        raise ValueError("stride: patches of networks for segmentation lie side by side; leave it away")
    if args.out and Path(args.out).suffix.lower() not in ("", ".npz"):
        raise ValueError(
            f"out: expected a name that ends with .npz, which is what is written, got {args.out}"
        )
    device = choose_device(args.device, args.dtype, what="dtype")
    results = []
    for path in args.weights:
        files, config = weights_of(path)
        settings = _segmentation(str(config)) if config else None
        for file in files:
            found = evaluate(
                str(file),
                args.data,
                settings,
                reduce_zero_label=args.reduce_zero_label,
                img_size=args.img_size,
                whole=args.whole,
                mean=args.mean,
                std=args.std,
                batch_size=args.batch_size,
                workers=args.workers,
                device=device,
                dtype=args.dtype,
            )
            results.append(found)
            if args.json:
                print_json(_facts(found), ascii_only=False)
    last = results[-1]
    for name, reason in last.counted.errors.items():
        complain(f"skipped {name}: {reason}")
    if last.pairs.images.passed_over:
        complain(passed_over_text(last.pairs.images.passed_over))
    best = max(results, key=lambda found: found.answers.figures().miou)
    if args.out:
        best.answers.save(Path(args.out))
    if args.html is not None:
        from ...plots.report import report_evaluation

        report_evaluation("segment", best.answers, best.weights, _rows(results), Path(args.html))
    if not args.json:
        _print(results, best)
    return 0


def _segmentation(config: str) -> SegmentationSettings:
    settings = tasks.read_settings(config)
    assert isinstance(settings, SegmentationSettings)
    return settings


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _facts(found: Any) -> dict[str, Any]:
    figures, counts, images = found.answers.figures(), found.answers.counts, found.pairs.images
    rows = zip(found.answers.names, figures.iou, figures.accuracy, counts.sum(1))
    return {
        "weights": found.weights,
        "images": found.counted.images,
        "skipped": len(found.counted.errors),
        "miou": _number(figures.miou),
        "macc": _number(figures.macc),
        "aacc": _number(figures.aacc),
        "images_per_second": round(found.counted.images / found.counted.seconds, 2),
        "per_class": {
            name: {"iou": _number(iou), "acc": _number(accuracy), "pixels": int(pixels)}
            for name, iou, accuracy, pixels in rows
        },
        "confusion": counts.tolist(),
        **({"passed_over": dict(images.passed_over)} if images.passed_over else {}),
    }


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.2f} %"


def _rows(results: list[Any]) -> list[list[str]]:
    """The table of all weights."""
    rows = [["weights", "images", "mIoU", "mAcc", "aAcc", "images/s"]]
    for found in results:
        figures, counted = found.answers.figures(), found.counted
        scores = map(_percent, (figures.miou, figures.macc, figures.aacc))
        rate = f"{counted.images / counted.seconds:.1f}"
        rows.append([found.weights, str(counted.images), *scores, rate])
    return rows


def _print(results: list[Any], best: Any) -> None:
    print_table(_rows(results))
    if best.counted.errors:
        print(f"{len(best.counted.errors)} images could not be used and do not count")
    print(f"\n{literal(best.weights)}")
    answers, figures = best.answers, best.answers.figures()
    table = [["class", "pixels", "IoU", "Acc", "most taken for"]]
    for i, name in enumerate(answers.names):
        row = answers.counts[i]
        wrong = np.where(np.arange(len(row)) == i, 0, row)
        most = int(wrong.argmax())
        taken = f"{answers.names[most]} ({100 * wrong[most] / row.sum():.1f} %)" if wrong.any() else ""
        own = _percent(figures.iou[i]), _percent(figures.accuracy[i])
        table.append([literal(name), str(int(row.sum())), *own, literal(taken)])
    print_table(table, indent="  ")
    if len(answers.names) <= MOST:
        print("\nconfusion, % of the true class's pixels: rows true, columns found")
        names = [shortened(name, 10) for name in answers.names]
        shares = 100 * answers.counts / np.maximum(answers.counts.sum(1, keepdims=True), 1)
        body = ([name, *(f"{share:.1f}" for share in row)] for name, row in zip(names, shares))
        print_table([["", *names], *body], indent="  ")

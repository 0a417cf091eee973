# SPDX-License-Identifier: Apache-2.0
"""`vimcore eval` of classifiers."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ... import tasks
from ...data.picture_files import passed_over_text
from ...tasks.classification.settings import ClassificationSettings
from ...train.folder import weights_of
from ...utils.files import literal, shortened
from ..output import print_json, print_table
from ..streams import complain


def run(args: argparse.Namespace) -> int:
    """Prints the scores of every file of weights; of the best one also classes and confusion matrix."""
    from ...tasks.classification.files import evaluate, images_of
    from ...train.device import choose_device

    if args.out and Path(args.out).suffix.lower() not in ("", ".npz"):
        raise ValueError(
            f"out: expected a name that ends with .npz, which is what is written, got {args.out}"
        )
    for name in ("whole", "reduce_zero_label"):
        if getattr(args, name):
            raise ValueError(f"{name}: goes with segmentation, {args.weights[0]} classifies images")
    device = choose_device(args.device, args.dtype, what="dtype")
    results = []
    for path in args.weights:
        files, config = weights_of(path)
        settings = _classification(str(config)) if config else None
        images = images_of(args.data, settings, files[0])
        for file in files:
            found = evaluate(
                file,
                images,
                settings,
                img_size=args.img_size,
                stride=args.stride,
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
    for name, reason in results[-1].outputs.errors.items():
        complain(f"skipped {name}: {reason}")
    if images.passed_over:
        complain(passed_over_text(images.passed_over))
    best = max(results, key=lambda found: found.outputs.accuracy().top1)
    if args.out:
        best.predictions().save(Path(args.out))
    if args.html is not None:
        from ...plots.report import report_evaluation

        report_evaluation("classify", best.predictions(), best.weights, _rows(results), Path(args.html))
    if not args.json:
        _print(results, best)
    return 0


def _classification(config: str) -> ClassificationSettings:
    settings = tasks.read_settings(config)
    if not isinstance(settings, ClassificationSettings):
        raise ValueError(f"{config}: eval knows classification, got task {settings.task}")
    return settings


def _facts(found: Any) -> dict[str, Any]:
    from ...data.classes import passed_over

    scores, predictions = found.outputs.accuracy(), found.predictions()
    return {
        "weights": found.weights,
        "images": scores.images,
        "skipped": len(found.outputs.errors),
        "loss": scores.loss,
        "top1": scores.top1,
        "top5": scores.top5,
        "images_per_second": round(scores.images / found.outputs.seconds, 2),
        "per_class": {
            name: None if math.isnan(share) else share for name, _, share, _ in predictions.per_class()
        },
        "confusion": predictions.confusion().tolist(),
        **({"passed_over": passed_over(found.images)} if found.images.passed_over else {}),
    }


def _rows(results: list[Any]) -> list[list[str]]:
    """The table of all weights."""
    rows: list[list[str]] = [["weights", "images", "top-1", "top-5", "loss", "images/s"]]
    for found in results:
        scores = found.outputs.accuracy()
        rate = scores.images / found.outputs.seconds
        rows.append(
            [
                found.weights,
                str(scores.images),
                f"{100 * scores.top1:.2f} %",
                f"{100 * scores.top5:.2f} %",
                f"{scores.loss:.4f}",
                f"{rate:.1f}",
            ]
        )
    return rows


def _print(results: list[Any], best: Any) -> None:
    print_table(_rows(results))
    if best.outputs.errors:
        print(f"{len(best.outputs.errors)} images could not be read and do not count")
    print(f"\n{literal(best.weights)}")
    table = [["class", "images", "right", "most taken for"]]
    for name, count, share, taken in best.predictions().per_class():
        table.append(
            [literal(name), str(count), "" if math.isnan(share) else f"{100 * share:.1f} %", literal(taken)]
        )
    print_table(table, indent="  ")
    confusion = best.predictions().confusion()
    if len(confusion) <= 20:
        print("\nconfusion: rows true, columns predicted")
        names = [shortened(name, 10) for name in best.images.classes]
        print_table([["", *names], *([n, *map(str, row)] for n, row in zip(names, confusion))], indent="  ")

# SPDX-License-Identifier: Apache-2.0
"""`vimcore eval`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from .. import tasks
from ..data.picture_files import passed_over_text
from ..tasks.classification.settings import ClassificationSettings
from ..tasks.settings import MOST_PROCESSES
from ..train.folder import weights_of
from ..utils.extras import required
from ..utils.files import literal, shortened
from .output import print_json, print_table
from .streams import complain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", nargs="+", metavar="RUN|FILE", help="run folders, or .safetensors files")
    parser.add_argument("--data", help="images, as for train (default: the validation images of the run)")
    parser.add_argument(
        "--img-size",
        type=int,
        nargs="+",
        metavar="N",
        help="evaluate at this image size: side, or height and width",
    )
    parser.add_argument("--stride", type=int, help="evaluate with this stride of the patches, in pixels")
    parser.add_argument(
        "--mean",
        type=float,
        nargs="+",
        metavar="M",
        help="mean of the channels, for .npy images without a run",
    )
    parser.add_argument("--std", type=float, nargs="+", metavar="S", help="standard deviation, likewise")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=2, help="data loading processes (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; do not change the result")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, auto (default: %(default)s)")
    parser.add_argument(
        "--out", metavar="FILE", help="write labels, predictions, probabilities and file names (.npz)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per file of weights")


def run(args: argparse.Namespace) -> int:
    """Prints the scores of every file of weights; of the best one also classes and confusion matrix."""
    with required("training", "train"):
        import timm  # noqa: F401
        import torch
        import torchvision  # noqa: F401
        import tqdm  # noqa: F401
    from ..tasks.classification.files import evaluate, images_of
    from ..train.device import choose_device

    for name in ("threads", "workers"):
        if (getattr(args, name) or 0) > MOST_PROCESSES:
            raise ValueError(f"{name}: expected at most {MOST_PROCESSES}, got {getattr(args, name)}")
    for name in ("batch_size", "threads", "stride", *(["img_size"] if args.img_size else [])):
        value = getattr(args, name)
        if value is not None and (min(value) if isinstance(value, list) else value) < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if args.img_size and len(args.img_size) > 2:
        raise ValueError(f"img_size: expected one or two numbers, got {args.img_size}")
    if args.out and Path(args.out).suffix.lower() not in ("", ".npz"):
        raise ValueError(
            f"out: expected a name that ends with .npz, which is what is written, got {args.out}"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    results = []
    for path in args.weights:
        files, config = weights_of(path)
        settings = _classification(str(config)) if config else None
        images = images_of(args.data, settings)
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
    if not args.json:
        _print(results, best)
    return 0


def _classification(config: str) -> ClassificationSettings:
    settings = tasks.read_settings(config)
    if not isinstance(settings, ClassificationSettings):
        raise ValueError(f"{config}: eval knows classification, got task {settings.task}")
    return settings


def _facts(found: Any) -> dict[str, Any]:
    from ..data.classes import passed_over

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


def _print(results: list[Any], best: Any) -> None:
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
    print_table(rows)
    if best.outputs.errors:
        print(f"{len(best.outputs.errors)} images could not be read and do not count")
    print(f"\n{best.weights}")
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

# SPDX-License-Identifier: Apache-2.0
"""`vimcore eval` of detection."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ... import tasks
from ...data.picture_files import passed_over_text
from ...tasks.detection.settings import DetectionSettings
from ...train.folder import weights_of
from ...utils.extras import required
from ...utils.files import literal
from ..output import print_json, print_table
from ..streams import complain

_COLUMNS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
_HEADINGS = ("AP", "AP50", "AP75", "small", "medium", "large")


def run(args: argparse.Namespace) -> int:
    """Prints COCO's figures of every file of weights; of the best one also those of the classes."""
    with required("evaluation of detectors", "dense"):
        import faster_coco_eval  # noqa: F401
    from ...tasks.detection.files import evaluate
    from ...train.device import choose_device

    for name in ("stride", "mean", "std"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name}: of classifiers only; leave it away")
    if args.out and Path(args.out).suffix.lower() not in ("", ".npz", ".json"):
        raise ValueError(
            f"out: expected a name that ends with .npz or .json (COCO's results), got {args.out}"
        )
    device = choose_device(args.device, args.dtype, what="dtype")
    results = []
    for path in args.weights:
        files, config = weights_of(path)
        settings = tasks.read_settings(str(config)) if config else None
        assert settings is None or isinstance(settings, DetectionSettings)
        for file in files:
            found = evaluate(
                str(file),
                args.data,
                settings,
                img_size=args.img_size,
                batch_size=args.batch_size,
                workers=args.workers,
                device=device,
                dtype=args.dtype,
            )
            results.append(found)
            if args.json:
                print_json(_facts(found), ascii_only=False)
    for name, reason in results[-1].errors.items():
        complain(f"skipped {name}: {reason}")
    aside = {**results[-1].objects.dropped, **results[-1].objects.passed_over}
    if aside:
        complain(passed_over_text(aside))
    best = max(results, key=lambda found: found.answers.figures["box_ap"])
    if args.out:
        _write(best, Path(args.out))
    if args.html is not None:
        from ...plots.report import report_evaluation

        report_evaluation("detect", best.answers, best.weights, _rows(results), Path(args.html))
    if not args.json:
        _print(results, best)
    return 0


def _write(best: Any, path: Path) -> None:
    from ...tasks.detection.task import write_results

    if path.suffix.lower() == ".json":
        write_results(best.objects, best.found.rows, path)
    else:
        best.answers.save(path)


def _kinds(found: Any) -> list[str]:
    return ["box", "mask"] if "mask_ap" in found.answers.figures else ["box"]


def _facts(found: Any) -> dict[str, Any]:
    answers, figures = found.answers, found.answers.figures
    rows = zip(answers.names, answers.box, answers.mask if len(answers.mask) else answers.box)
    return {
        "weights": found.weights,
        "images": len(answers.files),
        "skipped": len(found.errors),
        **{f"{kind}_{name}": figures.get(f"{kind}_{name}") for kind in _kinds(found) for name in _COLUMNS},
        "images_per_second": round(len(answers.files) / found.found.seconds, 2),
        "per_class": {
            name: {
                "box_ap": None if math.isnan(box) else float(box),
                **({"mask_ap": None if math.isnan(mask) else float(mask)} if len(answers.mask) else {}),
            }
            for name, box, mask in rows
        },
        **({"passed_over": dict(found.objects.passed_over)} if found.objects.passed_over else {}),
    }


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.2f} %"


def _rows(results: list[Any]) -> list[list[str]]:
    """The table of all weights."""
    rows = [["weights", "images", "of", *_HEADINGS, "images/s"]]
    for found in results:
        count = len(found.answers.files)
        for kind in _kinds(found):
            figures = [_percent(found.answers.figures.get(f"{kind}_{name}")) for name in _COLUMNS]
            first = kind == "box"
            about = [found.weights, str(count)] if first else ["", ""]
            rows.append([*about, kind, *figures, f"{count / found.found.seconds:.1f}" if first else ""])
    return rows


def _print(results: list[Any], best: Any) -> None:
    print_table(_rows(results))
    if best.errors:
        print(f"{len(best.errors)} pictures could not be used and do not count")
    print(f"\n{literal(best.weights)}")
    answers = best.answers
    table = [["class", "box AP", *(["mask AP"] if len(answers.mask) else [])]]
    for i, name in enumerate(answers.names):
        masks = [_percent(answers.mask[i])] if len(answers.mask) else []
        table.append([literal(name), _percent(answers.box[i]), *masks])
    print_table(table, indent="  ")
    print(
        f"\nof detections with a score of 0.5 or more: {int(answers.missed.sum())} objects missed, "
        f"{int(answers.wrong.sum())} detections of none"
    )

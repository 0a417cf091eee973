# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict` of classifiers."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping

from ...utils.files import literal
from ..output import print_json, print_table
from ..results import as_json, as_lines, tell


def run(args: argparse.Namespace) -> int:
    """Prints the classes of each image; with --out they are written instead, and it is printed where."""
    from ...results import Prediction
    from ...runtime import Runtime
    from ...tools.predict import BATCH, inputs_of, predict
    from ...tools.prediction_files import SUFFIXES, check_out, prediction_file

    if args.out is not None:
        check_out(args.out, SUFFIXES)
    runtime = Runtime(args.weights, args.device, args.threads, args.img_size, args.dtype)

    def show(result: Prediction) -> None:
        rows = [[f"{100 * p:7.3f} %", f"{i:>5}", literal(label or "")] for i, label, p in result.top]
        print_table(rows, indent="  ")
        if args.logits:
            assert result.logits is not None
            print("  logits " + " ".join(f"{float(v):.9g}" for v in result.logits))

    def to_json(result: Prediction, passed_over: Mapping[str, int] | None) -> str:
        return result.to_json(args.logits, passed_over)

    passed_over = Counter[str]()
    names = inputs_of(runtime.config["frames"], args.images, passed_over)
    what = "clips" if runtime.config["frames"] else "images"
    found = predict(runtime, names, args.topk, args.batch or BATCH)
    if args.out is None:
        lines = as_json(to_json) if args.json else as_lines(show)
        return tell(found, len(names), passed_over, lines, args.progress, what)
    with prediction_file(args.out, args.topk, runtime.config["num_classes"], args.logits) as writer:
        status = tell(found, len(names), passed_over, writer.add, args.progress, what)
    if args.json:
        print_json({"written": args.out, "images": len(names)}, ascii_only=False)
    else:
        print(f"{literal(args.out)}: predictions of {len(names)} images")
    return status

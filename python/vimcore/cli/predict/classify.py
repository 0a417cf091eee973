# SPDX-License-Identifier: Apache-2.0
"""`vimcore predict`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping

from ..output import print_table
from .results import tell


def run(args: argparse.Namespace) -> int:
    from ...results import Prediction
    from ...runtime import Runtime
    from ...tools.predict import predict

    if args.out is not None:
        raise ValueError(
            f"out: {args.weights} is a classifier, whose predictions are printed, with --json by line"
        )
    runtime = Runtime(args.weights, args.device, args.threads, dtype=args.dtype)

    def show(result: Prediction) -> None:
        rows = [[f"{100 * p:7.3f} %", f"{i:>5}", label or ""] for i, label, p in result.top]
        print_table(rows, indent="  ")
        if args.logits:
            assert result.logits is not None
            print("  logits " + " ".join(f"{float(v):.9g}" for v in result.logits))

    def to_json(result: Prediction, passed_over: Mapping[str, int] | None) -> str:
        return result.to_json(args.logits, passed_over)

    passed_over = Counter[str]()
    found = predict(runtime, args.images, args.topk, passed_over)
    clips = runtime.config["frames"] is not None
    return tell(found, passed_over, show, to_json if args.json else None, clips)

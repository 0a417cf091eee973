# SPDX-License-Identifier: Apache-2.0
"""What it costs that every call looks whether weights or modules changed: calls without beside calls within
`constant_weights`, in interleaved pairs; and the checksum alone.

    python tests/bench/constant_weights.py [--model NAME] [--batch 1] [--pairs 60] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import vimcore
from vimcore.tools.bench.common import machine


def seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="vim_tiny_patch16_224", choices=vimcore.list_models())
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = vimcore.create_model(args.model).eval()
    images = torch.randn(args.batch, 3, 224, 224)
    plain, constant, checksum = [], [], []
    with torch.no_grad():
        for _ in range(args.pairs + 3):
            plain.append(seconds(lambda: model(images)))
            with model.constant_weights():
                constant.append(seconds(lambda: model(images)))
            core, params = model._weights()
            weights = core.weights(params)
            checksum.append(seconds(lambda weights=weights: weights.look(args.threads)))
    found = {
        name: round(1e3 * median(times[3:]), 3)
        for name, times in (("ms", plain), ("constant_ms", constant), ("checksum_ms", checksum))
    }
    ratio = median(a / b for a, b in zip(plain[3:], constant[3:]))
    print(
        json.dumps(
            {"model": args.model, "batch": args.batch, "threads": args.threads, **found}
            | {"ratio": round(ratio, 4), "megabytes": round(sum(p.nbytes for p in params) / 1e6, 1)}
            | {"machine": machine()}
        )
    )


if __name__ == "__main__":
    main()

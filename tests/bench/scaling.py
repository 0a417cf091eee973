# SPDX-License-Identifier: Apache-2.0
"""How cost and memory of Vim grow with the image: time per token and peak memory of `forward_features`.

    python tests/bench/scaling.py                        # 1024, 2048 and 4096 pixels
    python tests/bench/scaling.py --sides 16384          # 1,048,576 patches

Each side runs in a process of its own, so that its peak is not the peak of another. The state-space model is
linear in the number of tokens: the last column, time per token against the first side, says by how much it is
not.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from typing import Any

WIDTHS = {"vim_tiny": 192, "vim_small": 384, "vim_base": 768}


def measure(model_name: str, side: int, threads: int, repeats: int) -> dict[str, Any]:
    """Median seconds of one image of `side` pixels, and the peak resident memory of this process in bytes."""
    import torch
    import vimcore

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = vimcore.VisionMamba(img_size=side, embed_dim=WIDTHS[model_name], num_classes=0).eval()
    images = torch.randn(1, 3, side, side)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = []
    with torch.inference_mode():
        for _ in range(repeats):
            begin = time.perf_counter()
            tokens = model.forward_features(images)
            seconds.append(time.perf_counter() - begin)
    if not bool(torch.isfinite(tokens).all()):
        raise RuntimeError(f"{side} pixels: the features are not finite")
    return {
        "model": model_name,
        "side": side,
        "tokens": tokens.shape[1],
        "seconds": sorted(seconds)[len(seconds) // 2],
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "before_bytes": before,  # weights, position table and the image itself
    }


def main() -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(WIDTHS), default="vim_tiny")
    parser.add_argument(
        "--sides", default="1024,2048,4096", help="image sides in pixels, separated by commas"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    print("pixels    tokens   seconds  us/token   peak GiB  before GiB  per token / first")
    for side in (int(part) for part in args.sides.split(",")):
        with context.Pool(1) as pool:
            row = pool.apply(measure, (args.model, side, args.threads, args.repeats))
        rows.append(row)
        cost, first = (r["seconds"] / r["tokens"] for r in (row, rows[0]))
        print(
            f"{side:6d}  {row['tokens']:8d}  {row['seconds']:8.3f}  {1e6 * cost:8.2f}  "
            f"{row['peak_bytes'] / 2**30:9.2f}  {row['before_bytes'] / 2**30:10.2f}  {cost / first:17.3f}",
            flush=True,
        )
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

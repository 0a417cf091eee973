# SPDX-License-Identifier: Apache-2.0
"""What a call costs besides computing, plainly and where torch follows it.

    python tests/bench/operators.py [--depth 24] [--rounds 200]

A network of one patch, so that little is computed, with as many parameters as Vim-Ti has. Prints the median
microseconds of a call, all in turns: plain; by the operator, as within torch.func and FLOP counters;
compiled by torch.compile(fullgraph=True), with the backends eager and inductor.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import vimcore
from vimcore.nn.following import follow


def median_us(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Of each call, in turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: 1e6 * statistics.median(found) for name, found in times.items()}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = vimcore.VisionMamba(img_size=16, embed_dim=16, depth=args.depth, num_classes=10).eval()
    images = torch.randn(1, 3, 16, 16)
    plan = model._plan("logits", ())
    eager = torch.compile(model, fullgraph=True, backend="eager")
    inductor = torch.compile(model, fullgraph=True)
    calls: dict[str, Callable[[], object]] = {
        "plain": lambda: model(images),
        "operator": lambda: follow(model, plan, "logits", images, (), None),
        "compiled, eager": lambda: eager(images),
        "compiled, inductor": lambda: inductor(images),
    }
    for title, grad in (("inference", False), ("forward of a training step", True)):
        with torch.set_grad_enabled(grad):
            found = median_us(calls, args.rounds)
        print(title, *(f"{name} {time:.0f} us" for name, time in found.items()), sep="\n  ")


if __name__ == "__main__":
    main()

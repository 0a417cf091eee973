# SPDX-License-Identifier: Apache-2.0
"""What the training loop costs beside forward, backward and optimiser, and what its data path delivers.

Vim-Ti at 224 px with the released recipe on JPEG files of 500 x 375, two classes:

    python tests/bench/training.py --batch 8 --updates 12 [--json FILE]

Overhead: the share of an update's time that is neither the network's forward and backward pass nor the
optimiser's step; images are loaded by processes beside it, as in a run. By the wall clock, and by the
processor time of the main thread (with --threads 1 all of the work), which a busy machine disturbs less.
Data path: images a second that loading processes deliver when nobody else computes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vimcore
from PIL import Image, ImageFilter
from vimcore.data.sampling import derive_seed, seed_all
from vimcore.tasks.classification.settings import ClassificationSettings
from vimcore.tasks.classification.task import Classification
from vimcore.train.lock import Lock
from vimcore.train.presets import PRESETS
from vimcore.train.setup import Setup
from vimcore.train.signals import Signals


def pictures(folder: Path, count: int) -> Path:
    """Smooth noise: of the size and the detail of photographs."""
    rng = np.random.default_rng(0)
    for i in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (375, 500, 3), dtype=np.uint8))
        data = io.BytesIO()
        noise.filter(ImageFilter.GaussianBlur(2)).save(data, "JPEG", quality=90)
        name = folder / f"class {i % 2}" / f"{i:05d}.jpg"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.write_bytes(data.getvalue())
    return folder


def now() -> np.ndarray:
    """Seconds of the wall, and of this thread's processor time."""
    return np.array([time.perf_counter(), time.thread_time()])


class Clock:
    """Adds up the time of wrapped functions."""

    def __init__(self) -> None:
        self.seconds = np.zeros(2)

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = now()
            result = function(*args, **kwargs)
            self.seconds = self.seconds + (now() - begin)
            return result

        return timed


def overhead(task: Classification, run: Setup, updates: int) -> dict[str, float]:
    """Medians of an update, and of what it must do, over `updates` of them after two."""
    clock = Clock()
    model, optimizer, loop = run.state.model, run.state.optimizer, run.state.loop
    model.forward = clock.wrap(model.forward)  # type: ignore[method-assign]
    optimizer.step = clock.wrap(optimizer.step)  # type: ignore[method-assign]
    backward = torch.Tensor.backward
    torch.Tensor.backward = clock.wrap(backward)  # type: ignore[method-assign]
    whole, needed = [], []
    try:
        model.train()
        run.sampler.set_epoch(0)
        batches = iter(run.batches)
        for i in range(updates + 2):
            clock.seconds, begin = np.zeros(2), now()
            sample = next(batches)
            seed_all(derive_seed("update", 0, i, 0))
            update = loop.update([task.prepare(sample, run.device)])
            run.log.step(1, 1, update.loss, update.lr, 0.0, 0)
            run.log.record("step", step=i, loss=update.loss, lr=update.lr)
            if i >= 2:
                whole.append(now() - begin)
                needed.append(clock.seconds)
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
    found = {}
    for i, of in enumerate(("wall", "thread")):
        a, b = [x[i] for x in whole], [x[i] for x in needed]
        found[f"update_{of}_ms"] = round(1e3 * statistics.median(a), 2)
        found[f"needed_{of}_ms"] = round(1e3 * statistics.median(b), 2)
        found[f"overhead_{of}_percent"] = round(100 * statistics.median(1 - y / x for x, y in zip(a, b)), 2)
    return found


def data_path(run: Setup, batches: int) -> float:
    """Images a second of the loading processes, the first batch not counted."""
    run.sampler.set_epoch(1)
    loading = iter(run.batches)
    images, begin = 0, 0.0
    for i in range(batches):
        sample = next(loading)
        if i == 0:
            begin = time.perf_counter()
        else:
            images += len(sample.images)
    return round(images / (time.perf_counter() - begin), 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        data = pictures(Path(name) / "data", max(600, args.batch * (args.updates + 4)))
        changes = {"data": str(data), "batch_size": args.batch, "workers": args.workers, "memory": "fast"}
        task = Classification(ClassificationSettings().merged({**PRESETS["tiny-released"], **changes}))
        folder = Path(name) / "run"
        run = Setup(task, folder, torch.device("cpu"), False, [], Lock(folder), Signals())
        try:
            found: dict[str, Any] = {
                "machine": platform.processor() or platform.machine(),
                "cores": os.cpu_count(),
                "isa": vimcore.build_info()["isa"],
                "torch": torch.__version__,
                "date": time.strftime("%Y-%m-%d"),
                "load": os.getloadavg()[0],
                **{name: value for name, value in vars(args).items() if name != "json"},
                **overhead(task, run, args.updates),
                "data_images_per_second": data_path(run, 12),
            }
        finally:
            run.log.close()
    found["step_images_per_second"] = round(1e3 * args.batch / found["needed_wall_ms"], 1)
    text = json.dumps(found, indent=1)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

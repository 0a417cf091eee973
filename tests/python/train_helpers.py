# SPDX-License-Identifier: Apache-2.0
"""Small image folders and settings for the tests of `vimcore train`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vimcore.cli import main
from vimcore.data.digits import encode_png, load_digits, picture
from vimcore.train.loop import Loop

SMALL = ["--img-size", "16", "--patch-size", "8", "--embed-dim", "16", "--depth", "2", "--batch-size", "8"]
ONCE = ["--repeats", "1", "--mixup", "0", "--cutmix", "0", "--workers", "0", "--threads", "1"]


def folder(path: Path, digits: tuple[int, ...] = (0, 1, 7), each: int = 12, first: int = 0) -> Path:
    """PNG files path/NAME/NNN.png of embedded digits, three sizes, grey and colour."""
    pixels, labels = load_digits()
    for digit in digits:
        (path / f"digit {digit}").mkdir(parents=True)
        for number, index in enumerate(np.flatnonzero(labels == digit)[first : first + each]):
            grey = picture(pixels[index])[: 32 - 4 * (number % 3)]
            colour = np.repeat(grey[:, :, None], 3, 2)
            data = encode_png(colour if number % 2 else grey)
            (path / f"digit {digit}" / f"{number:03d}.png").write_bytes(data)
    return path


def log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without what depends on the machine."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in ("images_per_second", "memory")} for x in lines]


def stopped(run: Path, step: int, *arguments: str) -> Path:
    """A new run that SIGTERM ends after update `step`."""
    with pytest.MonkeyPatch.context() as patch:
        update, made = Loop.update, iter(range(1, step + 1))

        def signalling(self: Loop, batches: Any) -> Any:
            if next(made) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(self, batches)

        patch.setattr(Loop, "update", signalling)
        assert main(["train", *arguments, "--out", str(run)]) == 128 + signal.SIGTERM
    return run


def environment() -> dict[str, str]:
    """For processes of their own: one thread."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}

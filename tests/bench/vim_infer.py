# SPDX-License-Identifier: Apache-2.0
"""vim-infer against its targets: start-up, size of the binary, pictures from files.

    python tests/bench/vim_infer.py --json tests/bench/results/vim-infer.json

- start-up: `vim-infer predict` of one 224-pixel JPEG with Vim-Ti, from the start of the process to its end,
  files in the page cache; in turns with `vim-infer --version`, which is what a process costs by itself.
- size: the binary as installed (stripped, vimcore linked in, CPU only).
- pictures: a folder of 224-pixel JPEGs through `vim-infer bench`, rounds over the folder in turns with as
  many images from memory; the share of the network's own rate is the median over rounds.

Weights and pictures are made from a fixed seed. The exit status is 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

TARGETS = {"start_ms": 60.0, "binary_mb": 5.0, "share": 0.9}


def save_weights(path: Path) -> None:
    """Vim-Ti of random numbers, 1000 classes."""
    import torch
    import vimcore

    torch.manual_seed(0)
    vimcore.create_model("vim_tiny_patch16_224").save(str(path))


def save_pictures(folder: Path, count: int, side: int = 224) -> int:
    """JPEG files with detail of every size, as photographs have; returns their bytes."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    for i in range(count):
        rng = np.random.default_rng(i)
        pixels = np.full((side, side, 3), 128.0)
        for grid, contrast in ((7, 60), (28, 30), (112, 14), (224, 6)):
            for channel in range(3):
                noise = Image.fromarray(rng.normal(0, contrast, (grid, grid)).astype(np.float32))
                pixels[..., channel] += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC))
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{i:04}.jpg", quality=90)
    return sum(path.stat().st_size for path in folder.iterdir())


def milliseconds_of(command: list[str]) -> tuple[float, float]:
    """From the start of a process to its end; of the processors, which a busy machine changes less."""
    begin, before = time.perf_counter(), os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    end, after = time.perf_counter(), os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return 1e3 * (end - begin), 1e3 * used


def measure_start(command: list[str], empty: list[str], rounds: int) -> dict[str, Any]:
    """Milliseconds of both commands, in turns after one run of each that warms the page cache."""
    samples: dict[str, list[float]] = {"start_ms": [], "process_ms": [], "cpu_ms": []}
    for i in range(rounds + 1):
        start, cpu = milliseconds_of(command)
        process, _ = milliseconds_of(empty)
        if i > 0:
            for name, value in (("start_ms", start), ("process_ms", process), ("cpu_ms", cpu)):
                samples[name].append(value)
    medians = {name: median(values) for name, values in samples.items()}
    return {**medians, "fastest_ms": min(samples["start_ms"]), "samples": samples}


def find_binary(given: str | None) -> str:
    """The one given, of build/dev, or beside this Python."""
    root = Path(__file__).resolve().parents[2]
    places = [root / "build/dev/cpp/tools/vim-infer", Path(sys.executable).parent / "vim-infer"]
    found = (
        given or next((str(place) for place in places if place.exists()), None) or shutil.which("vim-infer")
    )
    if not found or not os.access(found, os.X_OK):
        raise FileNotFoundError(
            f"no program {given}" if given else "no vim-infer found; name it with --binary"
        )
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one binary, with machine, build and date."""
    from vimcore.tools.bench.common import machine

    binary = find_binary(args.binary)
    threads = ["--threads", str(args.threads)] if args.threads else []
    build = json.loads(subprocess.run([binary, "info", "--json"], check=True, capture_output=True).stdout)[
        "build"
    ]
    with tempfile.TemporaryDirectory() as name:
        weights, folder = Path(name) / "vim.safetensors", Path(name) / "pictures"
        save_weights(weights)
        bytes_of_pictures = save_pictures(folder, args.images)
        use = ["--weights", str(weights), *threads]
        predict = [binary, "predict", *use, str(folder / "0000.jpg")]
        start = measure_start(predict, [binary, "--version"], args.rounds)
        command = [
            binary,
            "bench",
            *use,
            "--batches",
            "8",
            "--seconds",
            str(args.seconds),
            "--json",
            str(folder),
        ]
        files = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["files"]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "build": build,
        "threads": args.threads,
        "binary_bytes": os.stat(binary).st_size,
        "start": start,
        "files": {**files, "bytes_per_picture": bytes_of_pictures // args.images},
        "targets": TARGETS,
    }


def verdicts(report: dict[str, Any]) -> list[tuple[str, bool]]:
    """A line for each target, and whether it is met."""
    start, files, size = report["start"], report["files"], report["binary_bytes"] / 1e6
    rates = f"{files['images_per_s']:.1f} of {files['network_alone_per_s']:.1f} images/s"
    return [
        (
            f"start-up  {start['start_ms']:.1f} ms, fastest {start['fastest_ms']:.1f}, an empty process "
            f"{start['process_ms']:.1f}, {start['cpu_ms']:.0f} of all processors (target: below "
            f"{TARGETS['start_ms']:.0f})",
            start["start_ms"] < TARGETS["start_ms"],
        ),
        (f"binary    {size:.2f} MB (target: below {TARGETS['binary_mb']:.0f})", size < TARGETS["binary_mb"]),
        (
            f"pictures  {rates}, share {files['share']:.3f}, {files['rounds']} rounds of {files['images']} "
            f"(target: at least {TARGETS['share']})",
            files["share"] >= TARGETS["share"],
        ),
    ]


def main(words: list[str] | None = None) -> int:
    """Prints the figures; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--binary", help="default: of build/dev, else the installed one")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument(
        "--images", type=int, default=64, help="pictures in the folder (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=31, help="starts to measure (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="for the pictures (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write everything to FILE")
    args = parser.parse_args(words)
    try:
        report = measure(args)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        print(f"vim_infer.py: {error}", file=sys.stderr)
        return 1
    for line, met in verdicts(report):
        print(line + ("" if met else "  MISSED"))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(met for _, met in verdicts(report)) else 1


if __name__ == "__main__":
    sys.exit(main())

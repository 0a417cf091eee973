# SPDX-License-Identifier: Apache-2.0
"""Whether the digits, trained in bfloat16 on the CPU, are recognised as well as those trained in float32.

    nice python tests/bench/digits_bf16.py                    # five seeds in both types, minutes of one core
    nice python tests/bench/digits_bf16.py --out tests/bench/results --jobs 2

Network and recipe are those of `vimcore demo`; only the type of the activations differs, in training and in
evaluation. Each run is a process with one thread. The table goes to stdout. With --out,
FOLDER/digits-bf16.json (every run, machine, versions, date) is written after every run, and
FOLDER/digits-bf16.md at the end; a run that the file has from the same version, kernels and epochs is not
made again, so an interrupted measurement goes on. The same seeds give the same numbers on the same
instruction set. Status 1: the mean accuracy in bfloat16 is more than 0.3 points below that in float32.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TYPES = ("float32", "bfloat16")
MOST = 0.003  # of accuracy that bfloat16 may lose, mean over the seeds
NAME = "digits-bf16"


def run(task: tuple[str, int, int]) -> dict[str, Any]:
    """Trains one network: (type, seed, epochs)."""
    import torch
    import vimcore
    from vimcore.data.digits import encode_png, jiggle, load_digits, picture, split_digits
    from vimcore.tools import demo
    from vimcore.train.in_memory import evaluate, fit

    dtype, seed, epochs = task
    torch.set_num_threads(1)
    pictures, labels = load_digits()
    learnt, held_out = split_digits(labels)
    images = demo.network_input([encode_png(picture(digit)) for digit in pictures])
    targets = torch.from_numpy(labels)
    torch.manual_seed(seed)
    model = vimcore.VisionMamba(**demo.MODEL)
    recipe = {**demo.RECIPE, "warmup": min(demo.RECIPE["warmup"], epochs / 5)}
    begin = time.process_time()
    history = fit(
        model,
        (images[learnt], targets[learnt]),
        epochs=epochs,
        seed=seed,
        augment=jiggle,
        progress=False,
        precision=dtype,
        **recipe,
    )
    seconds = time.process_time() - begin
    truth = images[held_out], targets[held_out]
    result = evaluate(model, truth, precision=dtype)
    return {
        "dtype": dtype,
        "seed": seed,
        "epochs": epochs,
        "accuracy": result.accuracy,
        "loss": result.loss,
        "train_loss": history.loss[-1],
        "held_out": len(held_out),
        "cpu_seconds": round(seconds, 2),
        **here(),
    }


def here() -> dict[str, Any]:
    """What a number depends on besides type and seed."""
    import vimcore

    built = vimcore.build_info()
    return {"isa": built["isa"], "bf16": built["bf16"], "version": vimcore.__version__}


def described(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The report of these runs."""
    from vimcore.tools.bench import common as bench

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": bench.machine(),
        "versions": bench.versions(),
        "allowed_loss": MOST,
        "mean": {name: mean(runs, name) for name in TYPES if any(r["dtype"] == name for r in runs)},
        "runs": list(runs),
    }


def mean(runs: Sequence[dict[str, Any]], dtype: str) -> float:
    """Accuracy over the seeds."""
    return statistics.fmean(run["accuracy"] for run in runs if run["dtype"] == dtype)


def markdown(report: dict[str, Any]) -> str:
    """A row for each seed, then the means."""
    runs = {(run["dtype"], run["seed"]): run for run in report["runs"]}
    first = report["runs"][0]
    lines = [
        f"Digits of `vimcore demo`, {first['epochs']} epochs, right of {first['held_out']} held out; one is "
        f"{100 / first['held_out']:.2f} points. {report['machine']['cpu']} ({first['isa']}, bfloat16 by "
        f"{first['bf16']}), one thread, {report['date'][:10]}.",
        "",
        "| seed | float32, % | bfloat16, % | CPU seconds, float32 | bfloat16 |",
        "|---|---|---|---|---|",
    ]
    for seed in sorted({seed for _, seed in runs}):
        mine = [runs[dtype, seed] for dtype in TYPES]
        cells = [f"{100 * r['accuracy']:.2f}" for r in mine] + [f"{r['cpu_seconds']:.0f}" for r in mine]
        lines.append(f"| {seed} | " + " | ".join(cells) + " |")
    means = [f"**{100 * report['mean'][dtype]:.2f}**" for dtype in TYPES]
    spent = [f"{sum(r['cpu_seconds'] for (d, _), r in runs.items() if d == dtype):.0f}" for dtype in TYPES]
    lines.append("| mean; sum of seconds | " + " | ".join([*means, *spent]) + " |")
    return "\n".join(lines) + "\n"


def known(file: Path | None, epochs: int) -> dict[tuple[str, int], dict[str, Any]]:
    """Runs that need not be made again, by type and seed."""
    if file is None or not file.is_file():
        return {}
    wanted = {**here(), "epochs": epochs}
    runs = json.loads(file.read_text(encoding="utf-8"))["runs"]
    return {
        (run["dtype"], run["seed"]): run for run in runs if {name: run.get(name) for name in wanted} == wanted
    }


def measure(seeds: Sequence[int], epochs: int, jobs: int, file: Path | None) -> dict[str, Any]:
    """Makes the runs that are missing, and writes the report after each."""
    from vimcore.utils.files import write_text

    found = known(file, epochs)
    tasks = [(dtype, seed, epochs) for seed in seeds for dtype in TYPES if (dtype, seed) not in found]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
        for i, result in enumerate(pool.map(run, tasks), 1):
            found[result["dtype"], result["seed"]] = result
            done = f"{100 * result['accuracy']:.2f} %, {result['cpu_seconds']:.0f} s"
            print(f"[{i}/{len(tasks)}] {result['dtype']}, seed {result['seed']}: {done}", file=sys.stderr)
            if file is not None:
                write_text(file, json.dumps(described(list(found.values())), indent=1) + "\n")
    return described([found[dtype, seed] for seed in seeds for dtype in TYPES])


def numbers(text: str) -> list[int]:
    """Type of an option: numbers separated by commas."""
    return [int(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2, 3, 4], help="default: 0,1,2,3,4")
    parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="processes side by side (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write JSON and Markdown")
    args = parser.parse_args(argv)
    file = None
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        file = args.out / f"{NAME}.json"
    report = measure(args.seeds, args.epochs, args.jobs, file)
    print(markdown(report), end="")
    if args.out is not None:
        (args.out / f"{NAME}.md").write_text(markdown(report), encoding="utf-8")
    lost = report["mean"]["float32"] - report["mean"]["bfloat16"]
    print(f"bfloat16 loses {100 * lost:.2f} points; {100 * MOST:g} are allowed", file=sys.stderr)
    return 0 if lost <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The paper's ablations on handwritten digits: five direction strategies and five class-token designs.

    python tests/bench/ablation.py                       # five seeds, twenty minutes of one core
    python tests/bench/ablation.py --seeds 0,1 --epochs 20 --jobs 2

Every row is the network and the recipe of `vimcore demo` with patches of 4 x 4 pixels, that is 64 of them,
and only 200 digits to learn from: with all of them every row comes near 100 %. Only the option named in the
row differs; the seed draws weights, order and augmentation. As in the paper, directions are compared without
a class token (mean of the tokens), designs of the read-out with the full bidirectional block; the tables
share a row.
The tables go to stdout; with --out, FOLDER/ablation.json (every run, machine, versions, date) and
FOLDER/ablation.md are written. The same seeds give the same numbers on the same instruction set.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import functools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PATCH = 4
NO_TOKEN = {"class_token": "none", "pool": "mean"}
DIRECTIONS: dict[str, dict[str, Any]] = {
    "none": {"directions": "none", **NO_TOKEN},
    "bidirectional sequence": {"directions": "sequence", **NO_TOKEN},
    "bidirectional block": {"directions": "block", **NO_TOKEN},
    "bidirectional SSM": {"directions": "ssm", **NO_TOKEN},
    "bidirectional SSM + conv1d": {"directions": "ssm_conv", **NO_TOKEN},
}
READ_OUTS: dict[str, dict[str, Any]] = {
    "mean pool": {"class_token": "none", "pool": "mean"},
    "max pool": {"class_token": "none", "pool": "max"},
    "head token": {"class_token": "head"},
    "double token": {"class_token": "double"},
    "middle token": {"class_token": "middle"},
}
TABLES = {"direction strategy": DIRECTIONS, "class-token design": READ_OUTS}
SHARED = {"mean pool": "bidirectional SSM + conv1d"}  # the same network in both tables, trained once
EXPLAINED = (
    "Vim with {depth} blocks of width {width} on {train} digits ({patches} patches each), epochs: {epochs}; "
    "{held_out} held-out digits, one is {one:.2f} %; mean ± sample standard deviation of seeds {seeds}."
)


@functools.lru_cache(maxsize=1)
def digits(limit: int) -> tuple[Any, Any]:
    """((images, labels) to learn from, those held out), as `vimcore demo` has them."""
    import torch
    from vimcore.data.digits import encode_png, load_digits, picture, split_digits
    from vimcore.tools import demo

    pictures, labels = load_digits()
    train, held_out = split_digits(labels)
    train = train[:limit]
    images = demo.network_input([encode_png(picture(digit)) for digit in pictures])
    targets = torch.from_numpy(labels)
    return (images[train], targets[train]), (images[held_out], targets[held_out])


def run(task: tuple[str, dict[str, Any], int, int, int]) -> dict[str, Any]:
    """Trains one network from one seed on one thread."""
    import torch
    import vimcore
    from vimcore.data.digits import jiggle
    from vimcore.tools import demo
    from vimcore.train.in_memory import evaluate, fit

    name, options, seed, epochs, limit = task
    torch.set_num_threads(1)
    train, held_out = digits(limit)
    torch.manual_seed(seed)
    patches = {"patch_size": PATCH, "stride": PATCH}
    model = vimcore.VisionMamba(**{**demo.MODEL, **patches, **options}, memory="fast")
    recipe = {**demo.RECIPE, "warmup": min(demo.RECIPE["warmup"], epochs / 5)}
    history = fit(model, train, epochs=epochs, seed=seed, augment=jiggle, progress=False, **recipe)
    result = evaluate(model, held_out)
    return {
        "name": name,
        "seed": seed,
        "accuracy": result.accuracy,
        "loss": result.loss,
        "train_loss": history.loss[-1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(history.seconds, 2),
        "digits": [len(train[0]), len(held_out[0])],
    }


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; of one value the deviation is unknown."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation}


def shown(values: dict[str, float | None], scale: float, digits: int) -> str:
    """ "98.61 ± 0.43", or the mean alone."""
    parts = [value for value in values.values() if value is not None]
    return " ± ".join(f"{scale * value:.{digits}f}" for value in parts)


def summary(table: dict[str, dict[str, Any]], runs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row for each name: spread of accuracy and loss over the seeds."""
    for name in table:
        mine = [r for r in runs if r["name"] == SHARED.get(name, name)]
        yield {
            "name": name,
            "options": table[name],
            "parameters": mine[0]["parameters"],
            "accuracy": spread([r["accuracy"] for r in mine]),
            "loss": spread([r["loss"] for r in mine]),
        }


def markdown(report: dict[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [f"{report['explained']} {report['machine']['cpu']}, {report['date'][:10]}."]
    for title, rows in report["tables"].items():
        lines += ["", f"| {title} | parameters | right, % | cross-entropy |", "|---|---|---|---|"]
        for row in rows:
            accuracy, loss = shown(row["accuracy"], 100, 2), shown(row["loss"], 1, 4)
            lines.append(f"| {row['name']} | {row['parameters']:,} | {accuracy} | {loss} |")
    return "\n".join(lines) + "\n"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Trains everything and returns the report."""
    from vimcore import build_info
    from vimcore.tools import demo
    from vimcore.tools.bench import common as bench

    networks = {name: o for table in TABLES.values() for name, o in table.items() if name not in SHARED}
    tasks = [(n, o, seed, args.epochs, args.digits) for seed in args.seeds for n, o in networks.items()]
    runs = []
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
        for i, result in enumerate(pool.map(run, tasks), 1):  # in the order of the tasks
            runs.append(result)
            done = f"{100 * result['accuracy']:.2f} %, {result['seconds']:.0f} s"
            print(f"[{i}/{len(tasks)}] {result['name']}, seed {result['seed']}: {done}", file=sys.stderr)
    train, held_out = runs[0]["digits"]
    explained = EXPLAINED.format(
        depth=demo.MODEL["depth"],
        width=demo.MODEL["embed_dim"],
        patches=(demo.MODEL["img_size"] // PATCH) ** 2,
        train=train,
        held_out=held_out,
        epochs=args.epochs,
        seeds=", ".join(map(str, args.seeds)),
        one=100 / held_out,
    )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": bench.machine(),
        "versions": bench.versions(),
        "isa": build_info()["isa"],
        "explained": explained,
        "recipe": {**demo.RECIPE, "epochs": args.epochs},
        "seeds": args.seeds,
        "tables": {title: list(summary(table, runs)) for title, table in TABLES.items()},
        "runs": runs,
    }


def integers(least: int) -> Callable[[str], int]:
    """Type of an option: an integer that is at least `least`."""

    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return int(text)

    return integer


def seeds(text: str) -> list[int]:
    """Type of an option: numbers separated by commas, none twice."""
    found = [int(part) for part in text.split(",")]
    if len(set(found)) != len(found):
        raise argparse.ArgumentTypeError(f"a seed stands twice in {text!r}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2, 3, 4], help="default: 0,1,2,3,4")
    parser.add_argument("--epochs", type=integers(1), default=60, help="default: %(default)s")
    parser.add_argument(
        "--digits", type=integers(1), default=200, help="to learn from (default: %(default)s)"
    )
    parser.add_argument("--jobs", type=integers(1), default=1, help="processes side by side (default: 1)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write JSON and Markdown")
    args = parser.parse_args(argv)
    report = measure(args)
    print(markdown(report), end="")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "ablation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (args.out / "ablation.md").write_text(markdown(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""The mIoU column of the paper's direction ablation (its Table 4) on scenes of handwritten digits.

    python tests/bench/segmentation_ablation.py --runs RUNS      # 45 runs, a minute or two of one core each
    python tests/bench/segmentation_ablation.py --runs RUNS --jobs 2 --out tests/bench/results

Five direction strategies without a class token from three seeds, each with three heads, one after the other:
four convolutions (FCN), one convolution, and the head of the paper's column, a Segmenter of two layers. As
the paper's, the Segmenter's backbones are trained before, with the same strategy: each head begins with the
backbone of the one before. With fewer convolutions, more of the recognising is left to the backbone; without
these steps a Segmenter learns little in this time. A run is `vimcore train --preset digits-scenes` with head,
directions and seed changed: RUNS/NAME is the run, RUNS/NAME/cell.json its result.
A script that was stopped and is started again goes on where it was: runs with a result are not repeated,
others continue from their checkpoint.
The tables go to stdout; with --out, FOLDER/segmentation-ablation.json and .md are written.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

DIRECTIONS = {
    "none": "none",
    "sequence": "bidirectional sequence",
    "block": "bidirectional block",
    "ssm": "bidirectional SSM",
    "ssm_conv": "bidirectional SSM + conv1d",
}


class Head(NamedTuple):
    """A column: its title, how `vimcore train` gets it, and the column whose backbones it begins with."""

    title: str
    flags: list[str]
    start: str | None


HEADS = {
    "fcn": Head("FCN, 4 convolutions of 64 channels", ["--head", "fcn"], None),  # the preset's
    "fcn1": Head(
        "FCN, 1 convolution, on the first table's backbones", ["--head", "fcn", "--head-convs", "1"], "fcn"
    ),
    "segmenter": Head(
        "Segmenter, 2 layers, on the second table's backbones",
        ["--head", "segmenter", "--head-dropout", "0", "--lr", "0.001"],  # 0.003 is too fast
        "fcn1",
    ),
}
EPOCH = 1000  # scenes between two looks at whether to stop
EXPLAINED = (
    "Vim with {depth} blocks of width {width}, patches of {patch} x {patch} px, without class token, on "
    "scenes of {side} x {side} px; {scenes} scenes for each head to learn from, none of them twice, "
    "the same number of updates in every row; mIoU over {classes} classes on {valid} held-out scenes, "
    "mean ± sample standard deviation of seeds {seeds}."
)
LIMITS = (
    "What this shows: how the strategies order on a small task of its own, within the spread of the seeds. "
    "What it cannot show: the paper's figures, which are of Vim-Ti, pre-trained on ImageNet with each "
    "strategy and trained on ADE20K; here networks are small, runs are short, nothing but these scenes was "
    "seen before, and a scan crosses the whole image in {tokens} steps. Rows have different numbers of "
    "parameters and take different times. Differences within the deviations say nothing."
)


def name_of(head: str, directions: str, seed: int) -> str:
    return f"{head}-{directions}-seed{seed}"


def command(head: str, directions: str, seed: int, scenes: int) -> list[str]:
    """Arguments of vimcore for one run, without --out and --init."""
    epochs, each = max(scenes // EPOCH, 1), min(scenes, EPOCH)
    run = ["train", "--task", "segment", "--preset", "digits-scenes", "--directions", directions]
    length = ["--scenes", str(each), "--epochs", str(epochs), "--eval-every", str(epochs)]
    rest = ["--seed", str(seed), "--threads", "1", "--track", "none", "--json"]
    return [*run, *HEADS[head].flags, *length, *rest]


def launched(arguments: Sequence[str]) -> tuple[str, float]:
    """What `vimcore ARGUMENTS` printed, and its CPU seconds.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    code = [sys.executable, "-m", "vimcore", *arguments]
    limited = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=limited)
    try:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            process.terminate()
            process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"vimcore {' '.join(arguments)}: status {process.returncode}\n{said[-2000:]}")
    return said, used.ru_utime + used.ru_stime


def cell(runs: Path, head: str, directions: str, seed: int, scenes: int) -> dict[str, Any]:
    """The result of one run: read, or else trained, continued where it was stopped.

    Raises:
        ValueError: what stands in `runs` is of another length.
        RuntimeError: training failed.
    """
    folder = runs / name_of(head, directions, seed)
    result, arguments = folder / "cell.json", command(head, directions, seed, scenes)
    if result.exists():
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        if found["arguments"] != arguments:
            raise ValueError(f"{folder}: was run as {' '.join(found['arguments'])}; name another --runs")
        return found
    start, before = [], HEADS[head].start
    if before is not None:
        cell(runs, before, directions, seed, scenes)  # there already, unless it was not asked for
        start = ["--init", str(runs / name_of(before, directions, seed) / "best.safetensors")]
    begun = (folder / "checkpoint.pt").exists()
    if begun:
        said, seconds = launched(["train", "--resume", str(folder), "--json"])
    else:
        said, seconds = launched([*arguments, *start, "--out", str(folder)])
    summary = json.loads(said.strip().splitlines()[-1])
    found = {
        "head": head,
        "directions": directions,
        "seed": seed,
        **{metric: summary["best"][metric] for metric in ("miou", "macc", "aacc", "weights")},
        "parameters": parameters(folder / "best.safetensors"),
        "updates": summary["updates"],
        "cpu_seconds": None if begun else round(seconds, 1),  # of a run in one piece
        "arguments": arguments,
    }
    from vimcore.utils.files import write_text

    write_text(result, json.dumps(found, indent=1) + "\n")
    return found


def row(runs: Path, heads: Sequence[str], directions: str, seed: int, scenes: int) -> list[dict[str, Any]]:
    """The results of these heads, one after the other: each begins with what the one before learnt."""
    return [cell(runs, head, directions, seed, scenes) for head in heads]


def parameters(path: Path) -> int:
    from vimcore.weights.info import describe_file

    return int(describe_file(str(path))["parameters"])


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; of one value the deviation is unknown."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation}


def shown(values: dict[str, float | None]) -> str:
    """Shares in percent: "48.61 ± 0.43", or the mean alone."""
    return " ± ".join(f"{100 * value:.2f}" for value in values.values() if value is not None)


def summary(cells: Sequence[dict[str, Any]], head: str) -> Iterator[dict[str, Any]]:
    """One row for each strategy that was run: spread over the seeds."""
    for directions in DIRECTIONS:
        mine = [c for c in cells if (c["head"], c["directions"]) == (head, directions)]
        if not mine:
            continue
        seconds = [c["cpu_seconds"] for c in mine if c["cpu_seconds"] is not None]
        yield {
            "directions": directions,
            "name": DIRECTIONS[directions],
            "parameters": mine[0]["parameters"],
            "miou": spread([c["miou"] for c in mine]),
            "aacc": spread([c["aacc"] for c in mine]),
            "cpu_seconds": statistics.median(seconds) if seconds else None,
        }


def markdown(report: dict[str, Any]) -> str:
    """The tables as Markdown."""
    machine = report["machine"]
    lines = [f"{report['explained']} {machine['cpu']}, {report['isa']}, {report['date'][:10]}."]
    for title, rows in report["tables"].items():
        columns = f"| {title} | parameters | mIoU, % | pixels right, % | CPU s |"
        lines += ["", columns, "|---|---|---|---|---|"]
        for row in rows:
            seconds = "" if row["cpu_seconds"] is None else f"{row['cpu_seconds']:.0f}"
            figures = f"{shown(row['miou'])} | {shown(row['aacc'])} | {seconds}"
            lines.append(f"| {row['name']} | {row['parameters']:,} | {figures} |")
    lines += ["", report["limits"]]
    return "\n".join(lines) + "\n"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Trains what is missing and returns the report."""
    from vimcore import build_info
    from vimcore.data.scenes import CLASSES, VALIDATION
    from vimcore.tools.bench import common as bench
    from vimcore.train.presets import PRESETS

    args.runs.mkdir(parents=True, exist_ok=True)
    cells: list[dict[str, Any]] = []
    total = len(args.heads) * len(args.seeds) * len(args.directions)
    wanted = itertools.product(args.seeds, args.directions)
    with ThreadPoolExecutor(args.jobs) as pool:  # each waits for a process
        waiting = [pool.submit(row, args.runs, args.heads, d, seed, args.scenes) for seed, d in wanted]
        try:
            for done in as_completed(waiting):
                cells += done.result()
                row_of = "{directions}, seed {seed}".format_map(cells[-1])
                found = ", ".join(f"{c['head']} {100 * c['miou']:.2f} %" for c in done.result())
                print(f"[{len(cells)}/{total}] {row_of}: {found}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    preset = PRESETS["digits-scenes"]
    side, patch = preset["img_size"][0], preset["patch_size"]
    explained = EXPLAINED.format(
        depth=preset["depth"],
        width=preset["embed_dim"],
        patch=patch,
        side=side,
        scenes=args.scenes,
        classes=len(CLASSES),
        valid=VALIDATION,
        seeds=", ".join(map(str, args.seeds)),
    )
    names = [*DIRECTIONS]
    in_order = sorted(cells, key=lambda c: (c["head"], c["seed"], names.index(c["directions"])))
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": bench.machine(),
        "versions": bench.versions(),
        "isa": build_info()["isa"],
        "explained": explained,
        "limits": LIMITS.format(tokens=(side // patch) ** 2),
        "seeds": args.seeds,
        "tables": {HEADS[head].title: list(summary(in_order, head)) for head in args.heads},
        "runs": in_order,
    }


def integers(text: str) -> list[int]:
    """Type of an option: numbers separated by commas, none twice."""
    found = [int(part) for part in text.split(",")]
    if len(set(found)) != len(found) or min(found) < 0:
        raise argparse.ArgumentTypeError(f"expected numbers, each once, got {text!r}")
    return found


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Type of an option: some of these, separated by commas; in their own order."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(known) or len(set(found)) != len(found):
            raise argparse.ArgumentTypeError(f"expected some of {','.join(known)}, got {text!r}")
        return sorted(found, key=known.index)

    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER", help="of the runs, kept")
    parser.add_argument("--seeds", type=integers, default=[0, 1, 2], help="default: 0,1,2")
    parser.add_argument(
        "--heads", type=some_of([*HEADS]), default=[*HEADS], help=f"default: {','.join(HEADS)}"
    )
    parser.add_argument(
        "--directions",
        type=some_of([*DIRECTIONS]),
        default=[*DIRECTIONS],
        help=f"default: {','.join(DIRECTIONS)}",
    )
    parser.add_argument(
        "--scenes", type=int, default=3000, help=f"of a run, in epochs of {EPOCH} (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, choices=(1, 2), default=1, help="processes side by side (default: 1)"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write JSON and Markdown")
    args = parser.parse_args(argv)
    if args.scenes < 1 or (args.scenes > EPOCH and args.scenes % EPOCH):
        parser.error(f"--scenes: expected a multiple of {EPOCH}, or fewer, got {args.scenes}")
    report = measure(args)
    print(markdown(report), end="")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / "segmentation-ablation"
        path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

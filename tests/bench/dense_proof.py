# SPDX-License-Identifier: Apache-2.0
"""What `vimcore demo` of a dense task reaches on digits-scenes, over seeds, and in how many CPU seconds.

    python tests/bench/dense_proof.py --task segment      # three seeds, one thread each
    python tests/bench/dense_proof.py --task detect --out tests/bench/results

Each seed is a process of its own, whose CPU seconds are measured from outside: starting, drawing scenes,
training, evaluation and figures. The table goes to stdout; with --out, FOLDER/dense-TASK.json (every run,
machine, versions, date) and FOLDER/dense-TASK.md are written. Status 1: the median of a score is below what
is demanded, or the median of the training's CPU seconds above it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# Of each task: scores of metrics.json with the median demanded; what the table calls them.
SCORES: dict[str, dict[str, tuple[float, str]]] = {
    "segment": {"miou": (0.57, "mIoU"), "macc": (0.0, "mAcc"), "aacc": (0.0, "aAcc")},
    "detect": {
        "box_ap": (0.55, "box AP"),
        "box_ap50": (0.0, "box AP50"),
        "mask_ap": (0.38, "mask AP"),
        "mask_ap50": (0.0, "mask AP50"),
    },
}
TRAINING = "train_cpu_seconds"  # of a detector: after those of the backbone
SECONDS = 240.0  # of CPU, for the training


def measured(task: str, seed: int, arguments: Sequence[str], runs: Path | None) -> dict[str, Any]:
    """The metrics of one demo, and its CPU seconds.

    Args:
        runs: folder that keeps the demos, and gives a detector the backbone of the same seed's segmentation.

    Raises:
        RuntimeError: it failed; says why.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = (runs or Path(scratch)) / f"{task}-{seed}"
        backbone = folder.with_name(f"segment-{seed}") / "run"
        if task == "detect" and backbone.is_dir() and not folder.exists():
            shutil.copytree(backbone, folder / "backbone")  # what the demo would train again, to the bit
        command = [sys.executable, "-m", "vimcore", "demo", "--task", task, "--seed", str(seed)]
        command += ["--out", str(folder), "--json", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        out, err = Path(scratch) / "out", Path(scratch) / "err"
        with open(out, "wb") as stdout, open(err, "wb") as stderr:
            process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
            _, status, used = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"seed {seed}: {err.read_text().strip().splitlines()[-1]}")
        return {**json.loads(out.read_text()), "cpu_seconds": round(used.ru_utime + used.ru_stime, 2)}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What the JSON file holds."""
    from vimcore import build_info
    from vimcore.utils.machine import cpu_name, version_of

    runs = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for run in pool.map(lambda seed: measured(args.task, seed, args.arguments, args.runs), args.seeds):
            runs.append(run)
            print(json.dumps(run), file=sys.stderr, flush=True)
    return {
        "task": args.task,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{cpu_name()}, {os.cpu_count()} threads",
        "load": round(os.getloadavg()[2], 2),
        "versions": {name: version_of(name) for name in ("vimcore", "torch", "numpy", "timm")},
        "isa": build_info()["isa"],
        "seeds": args.seeds,
        "arguments": args.arguments,
        "demanded": {name: least for name, (least, _) in SCORES[args.task].items() if least},
        "median": {name: median(runs, name) for name in (*SCORES[args.task], TRAINING)},
        "runs": runs,
    }


def median(runs: Sequence[dict[str, Any]], name: str) -> float:
    """Of all seeds."""
    return float(statistics.median(run[name] for run in runs))


def markdown(report: dict[str, Any]) -> str:
    """The table, and a sentence on where it comes from."""
    names = SCORES[report["task"]]
    titles = [title for _, title in names.values()]
    lines = [
        f"`vimcore demo --task {report['task']}` on digits-scenes, scores of {report['runs'][0]['held_out']} "
        f"held-out scenes. {report['machine']} ({report['isa']}), one thread, load {report['load']}, "
        f"{report['date'][:10]}.",
        "",
        "| seed | " + " | ".join(titles) + " | CPU seconds of training | CPU seconds in all |",
        "|" + "---|" * (len(titles) + 3),
    ]
    for run in report["runs"]:
        scores = " | ".join(f"{run[name]:.4f}" for name in names)
        lines.append(f"| {run['seed']} | {scores} | {run[TRAINING]:.0f} | {run['cpu_seconds']:.0f} |")
    of_all = " | ".join(f"**{report['median'][name]:.4f}**" for name in names)
    whole = median(report["runs"], "cpu_seconds")
    lines.append(f"| median | {of_all} | {report['median'][TRAINING]:.0f} | {whole:.0f} |")
    return "\n".join(lines) + "\n"


def seeds(text: str) -> list[int]:
    """Type of an option: numbers separated by commas."""
    return [int(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=SCORES, required=True)
    parser.add_argument("--seeds", type=seeds, default=[0, 1, 2], help="default: 0,1,2")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write JSON and Markdown")
    parser.add_argument("--jobs", type=int, default=1, help="demos at a time (default: 1)")
    parser.add_argument(
        "--runs", type=Path, metavar="FOLDER", help="keep the demos; detectors start from its backbones"
    )
    parser.add_argument("arguments", nargs="*", help="further ones of `vimcore demo`, after --")
    args = parser.parse_args(argv)
    report = measure(args)
    print(markdown(report), end="")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        name = f"dense-{args.task}"
        (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (args.out / f"{name}.md").write_text(markdown(report), encoding="utf-8")
    reached = all(report["median"][name] >= least for name, least in report["demanded"].items())
    return 0 if reached and report["median"][TRAINING] <= SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""What `vimcore train --task clip` reaches on digits in colours: accuracy by names alone.

    python tests/bench/clip_proof.py                                  # three seeds, one thread each
    python tests/bench/clip_proof.py --out tests/bench/results
    python tests/bench/clip_proof.py --loss siglip --out tests/bench/results

A run learns 40 pairs of digit and colour from pictures with captions; 20 pairs are never shown. Then each
held-out digit in each colour is classified by 60 names in 5 sentences. Each seed is a process of its own,
whose CPU seconds are measured from outside. The table goes to stdout; with --out, FOLDER/clip-digits.json
(of siglip: clip-digits-siglip) with every run, machine, versions and date, and the table as .md. Status 1: a
seed is below what is demanded of every one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEMANDED = {"seen": 0.95, "unseen": 0.75}  # of every seed
TITLES = {"seen": "pairs seen", "unseen": "pairs never seen", "digit": "digit alone"}


def scores(path: Path) -> dict[str, float]:
    """Shares of held-out pictures that a file of weights names right.

    Returns:
        seen, unseen: digit and colour by 60 names (chance 1.7 %), of pairs trained on and of others.
        digit: the digit alone, by sentences without a colour.
    """
    import numpy as np
    import torch
    import vimcore.clip
    from vimcore import _core
    from vimcore._core import Preprocess
    from vimcore.data.coloured_digits import COLOURS, DIGITS, NAMES, TEMPLATES, coloured_digits, is_held_out

    model = vimcore.clip.load(path)
    images, _ = coloured_digits(held_out=True)
    assert images.pixels is not None
    steps = Preprocess(**model.visual.preprocess)
    pixels = torch.from_numpy(np.stack([_core.preprocess_pixels(one, steps) for one in images.pixels]))

    def found(names: Sequence[str]) -> Any:
        classify = vimcore.clip.zero_shot(model, names, TEMPLATES)
        with torch.no_grad():
            return torch.cat([classify(part).argmax(1) for part in pixels.split(256)]).numpy()

    digits, colours = np.divmod(images.labels, len(COLOURS))
    unseen = np.array([is_held_out(d, c) for d, c in zip(digits, colours)])
    right = found(NAMES) == images.labels
    return {
        "seen": float(right[~unseen].mean()),
        "unseen": float(right[unseen].mean()),
        "digit": float((found(DIGITS) == digits).mean()),
    }


def measured(seed: int, loss: str, arguments: Sequence[str]) -> dict[str, Any]:
    """The scores of one run, and its CPU seconds.

    Raises:
        RuntimeError: it failed; says why.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [sys.executable, "-m", "vimcore", "train", "--preset", "digits-clip", "--loss", loss]
        command += ["--seed", str(seed), "--out", str(folder), "--track", "none", *arguments]
        err = Path(scratch) / "err"
        with open(err, "wb") as stderr:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr, env=environment)
            _, status, used = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError(f"seed {seed}: {err.read_text().strip().splitlines()[-1]}")
        seconds = round(used.ru_utime + used.ru_stime, 1)
        return {"seed": seed, **scores(folder / "last.safetensors"), "cpu_seconds": seconds}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What the JSON file holds."""
    import torch
    from vimcore import build_info
    from vimcore.utils.machine import cpu_name, version_of

    torch.set_num_threads(1)
    runs = []
    for seed in args.seeds:
        runs.append(measured(seed, args.loss, args.arguments))
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    return {
        "loss": args.loss,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{cpu_name()}, {os.cpu_count()} threads",
        "load": round(os.getloadavg()[2], 2),
        "versions": {name: version_of(name) for name in ("vimcore", "torch", "open_clip_torch", "timm")},
        "isa": build_info()["isa"],
        "arguments": args.arguments,
        "demanded": DEMANDED,
        "runs": runs,
    }


def missed(report: dict[str, Any]) -> list[str]:
    """What is below what is demanded."""
    found = []
    for run in report["runs"]:
        low = [name for name, least in report["demanded"].items() if run[name] < least]
        found += [f"seed {run['seed']}: {TITLES[name]} {100 * run[name]:.1f} %" for name in low]
    return found


def markdown(report: dict[str, Any]) -> str:
    """The table, and a sentence on where it comes from."""
    lines = [
        f"`vimcore train --preset digits-clip --loss {report['loss']}`: accuracy by names alone on held-out "
        f"digits in colours. {report['machine']} ({report['isa']}), one thread, load {report['load']}, "
        f"{report['date'][:10]}.",
        "",
        "| seed | " + " | ".join(TITLES.values()) + " | CPU seconds |",
        "|" + "---|" * (len(TITLES) + 2),
    ]
    for run in report["runs"]:
        shares = " | ".join(f"{100 * run[name]:.1f} %" for name in TITLES)
        lines.append(f"| {run['seed']} | {shares} | {run['cpu_seconds']:.0f} |")
    medians = {name: statistics.median(run[name] for run in report["runs"]) for name in TITLES}
    shares = " | ".join(f"**{100 * value:.1f} %**" for value in medians.values())
    seconds = statistics.median(run["cpu_seconds"] for run in report["runs"])
    lines.append(f"| median | {shares} | {seconds:.0f} |")
    asked = ", ".join(f"{TITLES[name]} {100 * least:.0f} %" for name, least in report["demanded"].items())
    low = missed(report)
    state = f"Missed by {'; '.join(low)}" if low else "All reached"
    lines += ["", f"Demanded of every seed: {asked}. {state}."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loss", choices=("clip", "siglip"), default="clip")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write JSON and Markdown")
    parser.add_argument("arguments", nargs="*", help="further ones of `vimcore train`, after --")
    args = parser.parse_args(argv)
    report = measure(args)
    print(markdown(report), end="")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        name = "clip-digits" + ("" if args.loss == "clip" else f"-{args.loss}")
        (args.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (args.out / f"{name}.md").write_text(markdown(report), encoding="utf-8")
    return 1 if missed(report) else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""What pretraining without labels gives to handwritten digits of which few have labels.

    python tests/bench/pretrain_digits.py --runs RUNS                        # forty minutes of one core
    python tests/bench/pretrain_digits.py --runs RUNS --jobs 2 --out tests/bench/results

Needs scikit-learn. `vimcore train` pretrains on the 1,438 training digits without their labels, by the
presets digits-mim and digits-ar2. Then n labels a class are given (five subsets), and `vimcore train` learns
from these digits alone, from the pretrained weights by --init or from scratch: the same network, recipe and
layer decay. Accuracy is that of the last weights on the held-out 359; nothing is chosen by it. The probe is a
logistic regression on the mean of the tokens, each feature standardised over the unlabelled digits.

What is done is kept in RUNS and not done again, so that a run that was stopped goes on; after a change of a
preset it takes another RUNS. After a change of one preset `--arms mim --known RESULTS/pretrain-digits.json`
finds that arm anew and takes the others from the earlier figures, as the table then says.
The table goes to stdout; with --out, FOLDER/pretrain-digits.json (every figure, machine, versions, date) and
FOLDER/pretrain-digits.md are written. Status 1: a gain is below what is demanded.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cells
import numpy as np

ARMS = {"none": "", "mim": "digits-mim", "ar2": "digits-ar2"}  # presets of their pretraining
SUBSETS = range(5)
PROBES = (10, 2)  # labels a class


@dataclass(frozen=True)
class Tuning:
    """A recipe of fine-tuning: labels a class, updates, augmentation, and the title of its column."""

    labels: int
    updates: int
    augment: str
    title: str


TUNINGS = {
    "plain-10": Tuning(10, 200, "none", "plain fine-tuning, 10 labels"),
    "jiggle-10": Tuning(10, 300, "jiggle", "augmented, 10 labels"),
    "jiggle-2": Tuning(2, 300, "jiggle", "augmented, 2 labels"),
}
PROBE_TITLES = {f"probe-{n}": f"probe, {n} labels" for n in PROBES}
TITLES = {**PROBE_TITLES, **{name: tuning.title for name, tuning in TUNINGS.items()}}
# Points over no pretraining that are demanded: on every subset (mean over the seeds), or in the mean.
DEMANDED = {
    "probe-10": ("every subset", 20.0),
    "plain-10": ("mean", 2.0),
    "jiggle-2": ("mean", 2.5),
    "jiggle-10": ("mean", -0.5),
}
NETWORK = ["--class-token", "none"]  # as digits-mim and digits-ar2 have it
QUIET = ["--track", "none", "--eval-every", "1000000", "--log-every", "100"]


def pretraining(arm: str, seed: int, epochs: int | None) -> list[str]:
    """Arguments of `vimcore train`."""
    length = [] if epochs is None else ["--epochs", str(epochs)]
    return ["--preset", ARMS[arm], "--seed", str(seed), *length, *QUIET]


def tuning(name: str, seed: int, updates: int | None) -> list[str]:
    """Arguments of `vimcore train`, but for data and weights."""
    t = TUNINGS[name]
    updates = updates or t.updates
    flags = ["--preset", "digits", *NETWORK, "--seed", str(seed), "--batch-size", str(min(50, 10 * t.labels))]
    flags += ["--updates", str(updates), "--warmup-updates", str(updates // 20), "--layer-decay", "0.75"]
    return [*flags, "--ema", "0", "--augment", t.augment, *QUIET]


# ---- digits ------------------------------------------------------------------------------------------------


def subset(labels: np.ndarray, train: np.ndarray, count: int, number: int) -> np.ndarray:
    """Indices of `count` training digits of each class."""
    order = np.random.RandomState(100 + number).permutation(train)
    return np.concatenate([order[labels[order] == digit][:count] for digit in range(10)])


def write_digits(folder: Path) -> None:
    """Pictures of all digits and the lists of those to learn from, and of the held-out ones, if not there."""
    from vimcore.data.digits import encode_png, load_digits, picture, split_digits
    from vimcore.utils.files import write_text

    last = "held-out"
    if (folder / f"{last}.csv").exists():
        return  # another process may be reading them
    folder.mkdir(parents=True, exist_ok=True)
    digits, labels = load_digits()
    train, held_out = split_digits(labels)
    for i, digit in enumerate(digits):
        (folder / f"{i:04d}.png").write_bytes(encode_png(picture(digit)))
    parts = {(n, s): subset(labels, train, n, s) for n in {10, *PROBES} for s in SUBSETS}
    for name, indices in {**{f"{n}-{s}": part for (n, s), part in parts.items()}, last: held_out}.items():
        rows = "".join(f"{i:04d}.png,{labels[i]}\n" for i in indices)
        write_text(folder / f"{name}.csv", "path,label\n" + rows)


@functools.lru_cache(maxsize=1)
def inputs() -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """Images of all digits as the network takes them, labels, indices of training and held-out digits."""
    from vimcore.data.digits import encode_png, load_digits, picture, split_digits
    from vimcore.tools.demo import network_input

    digits, labels = load_digits()
    return network_input([encode_png(picture(d)) for d in digits]), labels, *split_digits(labels)


# ---- cells -------------------------------------------------------------------------------------------------


def probe(weights: Path, labels: int, number: int) -> float:
    """Share of the held-out digits that a linear classifier of frozen features gets right."""
    from sklearn.linear_model import LogisticRegression

    x, (_, y, train, held_out) = features(weights), inputs()
    x = (x - x[train].mean(0)) / x[train].std(0)
    few = subset(y, train, labels, number)
    return float(LogisticRegression(max_iter=10_000).fit(x[few], y[few]).score(x[held_out], y[held_out]))


@functools.lru_cache(maxsize=1)
def features(weights: Path) -> np.ndarray:
    """(N, D) float64, the mean over the patches, of every digit."""
    import torch
    import vimcore

    torch.set_num_threads(1)
    model = vimcore.VisionMamba.load(weights).eval()
    with torch.no_grad():
        found = torch.cat([model.forward_features(part).mean(1) for part in inputs()[0].split(128)])
    return found.double().numpy()


@dataclass(frozen=True)
class Work:
    """All cells of one arm and seed, one after another.

    Attributes:
        known: cells of an earlier run, from which all are taken; None: they are found.
    """

    arm: str
    seed: int
    runs: Path
    epochs: int | None
    updates: int | None
    known: list[cells.Cell] | None = None

    @property
    def name(self) -> str:
        return f"{self.arm}-{self.seed}"

    def found(self) -> Iterator[cells.Cell]:
        """Those that are known, and those that are found."""
        weights, start = self.runs / f"{self.name}.safetensors", []
        if self.arm == "none" and self.known is None:
            cells.untrained(weights, "digits-mim", seed=self.seed)
        elif self.arm != "none":
            flags = pretraining(self.arm, self.seed, self.epochs)
            yield self._cell("pretraining", None, flags, functools.partial(self._pretrained, flags))
            weights = self.runs / self.name / "last.safetensors"
            start = ["--init", str(weights)]
        for s in SUBSETS:
            for n in PROBES:
                yield self._cell(f"probe-{n}", s, [], functools.partial(self._probed, weights, n, s))
        for s in SUBSETS:
            for name in TUNINGS:
                flags = tuning(name, self.seed, self.updates)
                make = functools.partial(self._tuned, name, s, [*flags, *start])
                yield self._cell(name, s, flags, make)

    def _cell(self, what: str, number: int | None, flags: list[str], make: Any) -> cells.Cell:
        name = what if number is None else f"{what}-{number}"
        key = {"arm": self.arm, "seed": self.seed, "what": what, "subset": number, "flags": flags}
        if self.known is not None:
            return self._taken(self.known, key)
        return cells.kept(self.runs / "cells" / f"{self.name}-{name}.json", key, make)

    def _taken(self, known: list[cells.Cell], key: dict[str, Any]) -> cells.Cell:
        for cell in known:
            if {name: cell.get(name) for name in key} == key:
                return cell
        raise ValueError(f"--known: {self.name}, {key['what']} {key['subset']}: no figure of these settings")

    def _pretrained(self, flags: list[str]) -> dict[str, Any]:
        summary = cells.train(self.runs / self.name, flags)
        return {"loss": summary["best"]["loss"], "cpu_seconds": summary["cpu_seconds"]}

    def _probed(self, weights: Path, labels: int, number: int) -> dict[str, Any]:
        used = time.process_time()
        accuracy = probe(weights, labels, number)
        return {"accuracy": accuracy, "cpu_seconds": round(time.process_time() - used, 2)}

    def _tuned(self, name: str, number: int, flags: list[str]) -> dict[str, Any]:
        import shutil

        digits, folder = self.runs / "digits", self.runs / f"{self.name}-{name}-{number}"
        data = [f"{TUNINGS[name].labels}-{number}.csv", "held-out.csv"]
        where = ["--data", str(digits / data[0]), "--val", str(digits / data[1])]
        summary = cells.train(folder, [*where, *flags])
        shutil.rmtree(folder)
        folder.with_suffix(".txt").unlink()
        return {"accuracy": summary["best"]["top1"], "cpu_seconds": summary["cpu_seconds"]}


def worked(work: Work) -> list[cells.Cell]:
    """All cells of it."""
    return list(work.found())


# ---- report ------------------------------------------------------------------------------------------------


def mean(found: Sequence[cells.Cell], what: str, arm: str, number: int | None = None) -> float:
    """Points in 100, over the seeds, of a subset or of all."""
    mine = [c for c in found if c["what"] == what and c["arm"] == arm and number in (None, c["subset"])]
    return 100 * statistics.fmean(c["accuracy"] for c in mine)


def gains(found: Sequence[cells.Cell]) -> dict[str, dict[str, Any]]:
    """Of every arm and column, points over no pretraining: in the mean, and of every subset."""
    gained: dict[str, dict[str, Any]] = {}
    for arm in [arm for arm in ARMS if ARMS[arm]]:
        gained[arm] = {}
        for what in TITLES:
            by_subset = [mean(found, what, arm, s) - mean(found, what, "none", s) for s in SUBSETS]
            whole = mean(found, what, arm) - mean(found, what, "none")
            gained[arm][what] = {"mean": round(whole, 2), "subsets": [round(gain, 2) for gain in by_subset]}
    return gained


def missed(gained: dict[str, dict[str, Any]]) -> list[str]:
    """What is below what is demanded."""
    lines = []
    for arm, columns in gained.items():
        for what, (kind, least) in DEMANDED.items():
            gain = columns[what]["mean"] if kind == "mean" else min(columns[what]["subsets"])
            if gain < least:
                lines.append(f"{arm}, {TITLES[what]}: {gain:+.1f} points, demanded {least:+.1f} ({kind})")
    return lines


def markdown(report: dict[str, Any]) -> str:
    """The tables, and where they come from."""
    epochs = ", ".join(f"{arm} {count}" for arm, count in report["epochs"].items())
    found, seeds, titles = report["cells"], ", ".join(map(str, report["seeds"])), " | ".join(TITLES.values())
    lines = [
        "Per cent right of 359 held-out digits, labels a class: means over "
        f"{len(SUBSETS)} subsets of labelled digits and seeds {seeds}. Vim with 4 blocks of width 64, "
        f"16 patches. Epochs of pretraining: {epochs}. {report['machine']} ({report['isa']}), one thread, "
        f"{report['date'][:10]}.",
        "",
        f"| pretraining | {titles} | CPU seconds of pretraining, a seed |",
        "|" + "---|" * (len(TITLES) + 2),
    ]
    for arm in ARMS:
        values = " | ".join(f"{mean(found, what, arm):.1f}" for what in TITLES)
        used = [c["cpu_seconds"] for c in found if c["what"] == "pretraining" and c["arm"] == arm]
        known = [seconds for seconds in used if seconds is not None]
        lines.append(f"| {arm} | {values} | {f'{statistics.fmean(known):.0f}' if known else '-'} |")
    if report["known"] is not None:
        k = report["known"]
        where = f"{k['machine']} ({k['isa']}), {k['date'][:10]}"
        lines += ["", f"Found in an earlier run and taken from it: {', '.join(k['arms'])}. {where}."]
    lines += ["", "Points over none: mean (least to most of the subsets).", ""]
    lines += [f"| pretraining | {titles} |", "|" + "---|" * (len(TITLES) + 1)]
    for arm, columns in report["gains"].items():
        spreads = [(c["mean"], min(c["subsets"]), max(c["subsets"])) for c in columns.values()]
        texts = [f"{whole:+.1f} ({least:+.1f} to {most:+.1f})" for whole, least, most in spreads]
        lines.append(f"| {arm} | {' | '.join(texts)} |")
    asked = [
        f"{TITLES[what]} {least:+.1f}{'' if kind == 'mean' else ' on ' + kind}"
        for what, (kind, least) in DEMANDED.items()
    ]
    state = f"Missed: {'; '.join(report['missed'])}." if report["missed"] else "All reached."
    lines += ["", f"Demanded: {'; '.join(asked)}. {state}"]
    return "\n".join(lines) + "\n"


def epochs_of(arm: str, args: argparse.Namespace, earlier: dict[str, Any] | None) -> int:
    """Of its pretraining."""
    from vimcore.train.presets import PRESETS

    if earlier is not None and arm not in args.arms:
        return int(earlier["epochs"][arm])
    return int(args.epochs or PRESETS[ARMS[arm]]["epochs"])


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What the JSON file holds."""
    write_digits(args.runs / "digits")
    earlier = json.loads(args.known.read_text(encoding="utf-8")) if args.known else None
    works = []
    for seed in args.seeds:
        for arm in ARMS:
            known = None if arm in args.arms or earlier is None else earlier["cells"]
            epochs = args.epochs if known is None else None  # theirs are the presets'
            works.append(Work(arm, seed, args.runs, epochs, args.updates, known))
    found = cells.side_by_side(worked, works, args.jobs)
    gained = gains(found)
    return {
        **cells.origin(["scikit-learn"]),
        "seeds": args.seeds,
        "known": earlier
        and {
            "arms": [arm for arm in ARMS if arm not in args.arms],
            **{name: earlier[name] for name in ("date", "machine", "isa", "versions")},
        },
        "epochs": {arm: epochs_of(arm, args, earlier) for arm in ARMS if ARMS[arm]},
        "demanded": DEMANDED,
        "gains": gained,
        "missed": missed(gained),
        "cpu_seconds": round(sum(c["cpu_seconds"] or 0 for c in found)),
        "cells": found,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cells.add_arguments(parser)
    parser.add_argument("--updates", type=int, help="of fine-tuning (default: 200 plain, 300 augmented)")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS], help="found anew (default: all)")
    parser.add_argument("--known", type=Path, metavar="JSON", help="earlier figures, for the other arms")
    args = parser.parse_args(argv)
    if (args.known is None) != (set(args.arms) == {*ARMS}):
        parser.error("--known: earlier figures stand for the arms that --arms leaves out; both or neither")
    report = measure(args)
    cells.write(args.out, "pretrain-digits", report, markdown(report))
    return 1 if report["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on few photographs by the preset `finetune`: from drawn weights, and from pretrained ones.

    python tests/bench/finetune_photos.py --runs RUNS                  # twenty minutes of one core
    python tests/bench/finetune_photos.py --runs RUNS --jobs 2 --out tests/bench/results

Needs scikit-image and scikit-learn: a class is one of the pictures in their packages, in grey. Squares
of 96 pixels are cut at random from the left half of each to learn from, from the right half to test. `vimcore
train --task pretrain` sees the former without labels; then `vimcore train --init` learns from them, by its
default preset. Accuracy is that of the averaged weights of the last update; nothing is chosen by it.

What is done is kept in RUNS and not done again, so that a run that was stopped goes on.
The table goes to stdout; with --out, FOLDER/finetune-photos.json (every figure, machine, versions, date) and
FOLDER/finetune-photos.md are written. Status 1: fewer points over chance than demanded.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cells
import numpy as np

# Those that are in the packages themselves, large enough and of one texture or thing on both sides.
PICTURES = {
    "skimage": (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "chelsea.png",
        "coffee.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
    ),
    "sklearn": ("china.jpg", "flower.jpg"),
}
PLACES = {"skimage": "data", "sklearn": "datasets/images"}
CLASSES = sum(map(len, PICTURES.values()))
SQUARE, EACH = 96, 20  # pixels; of a class, to learn from, and again to test
ARMS = {"scratch": "", "mim": "digits-mim", "ar2": "digits-ar2"}  # whose recipes the photographs borrow
STATISTICS = "grey levels alone"
DEMANDED = 30.0  # points over chance
PRETRAINING: dict[str, Any] = {
    "img_size": (48,),
    "augment": "crop",
    "mean": (0.45,),
    "std": (0.25,),
    "batch_size": 16,  # so few images make more updates
}
QUIET = ["--workers", "0", "--threads", "1", "--track", "none", "--eval-every", "1000000"]
LIMITS = (
    "It shows that the recipe learns from {count} pictures, and what pretraining on the same ones adds. "
    "It cannot show recognition of things: a class is one photograph, so all its squares share light, "
    "sharpness and grain, and the histogram of a square tells much. It says nothing of other photographs of "
    "the same thing, of larger networks, or of weights from ImageNet."
)


def grey(package: str, name: str) -> np.ndarray:
    """(H, W) uint8 of a picture that is in a package."""
    from importlib import resources

    from PIL import Image

    with (resources.files(package) / PLACES[package] / name).open("rb") as file:
        return np.asarray(Image.open(file).convert("L"))


def squares(pixels: np.ndarray, generator: np.random.Generator) -> dict[str, list[np.ndarray]]:
    """Squares of the left half to learn from, of the right half to test."""
    middle = pixels.shape[1] // 2
    found: dict[str, list[np.ndarray]] = {"learn": [], "test": []}
    for part, half in (("learn", pixels[:, :middle]), ("test", pixels[:, middle:])):
        for _ in range(EACH):
            y, x = (int(generator.integers(side - SQUARE + 1)) for side in half.shape)
            found[part].append(np.ascontiguousarray(half[y : y + SQUARE, x : x + SQUARE]))
    return found


def cut(folder: Path, seed: int) -> None:
    """Writes the squares as folder/learn/CLASS/NN.png and folder/test/CLASS/NN.png."""
    from vimcore.data.digits import encode_png

    generator = np.random.default_rng(seed)
    for package, names in PICTURES.items():
        for name in names:
            for part, found in squares(grey(package, name), generator).items():
                place = folder / part / name.partition(".")[0]
                place.mkdir(parents=True, exist_ok=True)
                for number, square in enumerate(found):
                    (place / f"{number:02d}.png").write_bytes(encode_png(square))


def by_grey_levels(folder: Path) -> float:
    """Share right by a logistic regression on the histogram of each square, of 16 grey levels."""
    from PIL import Image
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    parts = []
    for part in ("learn", "test"):
        files = sorted((folder / part).glob("*/*.png"))
        bins = [np.bincount(np.asarray(Image.open(f)).ravel() // 16, minlength=16) for f in files]
        parts.append((np.array(bins, float), [file.parent.name for file in files]))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10_000)).fit(*parts[0])
    return float(model.score(*parts[1]))


def flags_of(settings: dict[str, Any]) -> list[str]:
    """The settings as flags."""
    found = []
    for name, value in settings.items():
        texts = map(str, value if isinstance(value, tuple) else (value,))
        found += ["--" + name.replace("_", "-"), *texts]
    return found


def worked(seed: int, runs: Path, epochs: int | None, tuned: int | None) -> list[cells.Cell]:
    """All cells of a seed."""
    photos = runs / f"photos-{seed}"
    if not (photos / "done").exists():
        cut(photos, seed)
        (photos / "done").touch()

    def cell(arm: str, what: str, flags: list[str], make: Any) -> cells.Cell:
        key = {"arm": arm, "seed": seed, "what": what, "flags": flags}
        return cells.kept(runs / "cells" / f"{arm.split()[0]}-{seed}-{what}.json", key, make)

    found = [cell(STATISTICS, "tuned", [], functools.partial(_counted, photos))]
    for arm, preset in ARMS.items():
        folder = runs / f"{arm}-{seed}"
        weights = folder / "last.safetensors"
        if preset:
            flags = ["--preset", preset, "--seed", str(seed), *flags_of(PRETRAINING), *QUIET]
            flags += [] if epochs is None else ["--epochs", str(epochs)]
            make = functools.partial(_pretrained, folder, photos, flags)
            found.append(cell(arm, "pretrained", flags, make))
        else:
            folder.mkdir(exist_ok=True)
            data = str(photos / "learn")
            cells.untrained(weights, "digits-mim", seed=seed, data=data, **PRETRAINING)
        flags = ["--seed", str(seed), "--lr", "2e-3", "--crop-pct", "1", *QUIET]
        flags += [] if tuned is None else ["--epochs", str(tuned)]
        make = functools.partial(_tuned, runs / f"{arm}-{seed}-tuned", photos, weights, flags)
        found.append(cell(arm, "tuned", flags, make))
    return found


def _counted(photos: Path) -> dict[str, Any]:
    used = time.process_time()
    return {"accuracy": by_grey_levels(photos), "cpu_seconds": round(time.process_time() - used, 2)}


def _pretrained(folder: Path, photos: Path, flags: list[str]) -> dict[str, Any]:
    summary = cells.train(folder, ["--data", str(photos / "learn"), *flags])
    return {"loss": summary["best"]["loss"], "cpu_seconds": summary["cpu_seconds"]}


def _tuned(folder: Path, photos: Path, weights: Path, flags: list[str]) -> dict[str, Any]:
    data = ["--data", str(photos / "learn"), "--val", str(photos / "test"), "--init", str(weights)]
    summary = cells.train(folder, [*data, *flags])
    lines = map(json.loads, (folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    last = [line for line in lines if line["kind"] == "eval" and line["weights"] == "ema"][-1]
    return {"accuracy": last["top1"], "cpu_seconds": summary["cpu_seconds"]}


# ---- report ------------------------------------------------------------------------------------------------


def accuracies(found: Sequence[cells.Cell], arm: str) -> list[float]:
    """Per cent right of each seed."""
    return [100 * c["accuracy"] for c in found if c["arm"] == arm and c["what"] == "tuned"]


def missed(found: Sequence[cells.Cell]) -> list[str]:
    """Arms that are not far enough above chance, on average over the seeds."""
    over = {arm: statistics.fmean(accuracies(found, arm)) - 100 / CLASSES for arm in ARMS}
    return [f"{arm}: {points:.1f} points over chance" for arm, points in over.items() if points < DEMANDED]


def markdown(report: dict[str, Any]) -> str:
    """The table, where it comes from, and what it cannot show."""
    found, tested = report["cells"], CLASSES * EACH
    lines = [
        f"Per cent right of {tested} squares of {CLASSES} classes (chance: {100 / CLASSES:.1f}); "
        f"{EACH} squares a class to learn from, preset finetune. Vim with 4 blocks of width 64, 48 x 48 "
        f"pixels, grey. {report['machine']} ({report['isa']}), one thread, {report['date'][:10]}.",
        "",
        "| weights to start from | "
        + " | ".join(f"seed {seed}" for seed in report["seeds"])
        + " | mean | CPU seconds of pretraining | of fine-tuning |",
        "|" + "---|" * (len(report["seeds"]) + 4),
    ]
    for arm in (STATISTICS, *ARMS):
        values = accuracies(found, arm)
        used = [_seconds(found, arm, what) for what in ("pretrained", "tuned")]
        cut_up = " | ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {arm} | {cut_up} | **{statistics.fmean(values):.1f}** | {' | '.join(used)} |")
    state = f"Missed: {'; '.join(report['missed'])}" if report["missed"] else "All arms reach it"
    lines += ["", f"Demanded: {DEMANDED:.0f} points over chance in the mean. {state}.", ""]
    lines.append(LIMITS.format(count=tested))
    return "\n".join(lines) + "\n"


def _seconds(found: Sequence[cells.Cell], arm: str, what: str) -> str:
    known = [c["cpu_seconds"] for c in found if (c["arm"], c["what"]) == (arm, what)]
    known = [seconds for seconds in known if seconds is not None]
    return f"{statistics.fmean(known):.0f}" if known else "-"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """What the JSON file holds."""
    work = functools.partial(worked, runs=args.runs, epochs=args.epochs, tuned=args.tuned)
    args.runs.mkdir(parents=True, exist_ok=True)
    found = cells.side_by_side(work, args.seeds, args.jobs)
    return {
        **cells.origin(["scikit-image", "scikit-learn"]),
        "pictures": PICTURES,
        "seeds": args.seeds,
        "demanded": DEMANDED,
        "missed": missed(found),
        "cells": found,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cells.add_arguments(parser)
    parser.add_argument("--tuned", type=int, metavar="EPOCHS", help="of fine-tuning (default: the preset's)")
    args = parser.parse_args(argv)
    report = measure(args)
    cells.write(args.out, "finetune-photos", report, markdown(report))
    return 1 if report["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())

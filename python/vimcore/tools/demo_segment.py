# SPDX-License-Identifier: Apache-2.0
"""`vimcore demo --task segment`: a small Vim learns to find and name handwritten digits in coloured scenes.

The recipe is the preset digits-scenes, by the engine of `vimcore train`; pictures are segmented as
`vimcore predict` does it, from the file of the best weights.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import _core, tasks
from ..data.scenes import CLASSES, PALETTE, VALIDATION, Scenes
from ..plots.segments import plot_images, plot_runs
from ..segmentation import load
from ..tasks.segmentation.answers import Worst, confusion, figures, read_answers
from ..tasks.segmentation.settings import SegmentationSettings
from ..tasks.segmentation.task import Segmentation
from ..train.folder import BEST, CONFIG
from ..train.presets import recipe
from ..train.run import train
from ..utils.files import atomic, write_text
from .segment import Segmenting, segment

SHOWN = 12  # scenes in the figure


def run_demo(
    out: str | os.PathLike[str] = "vimcore-demo",
    epochs: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    *,
    show: bool = True,
) -> dict[str, Any]:
    """Trains, reloads, segments held-out scenes and draws; the same seed gives the same weights bit for bit.

    Args:
        out: folder for run/ (as of `vimcore train`), scenes/*.png, masks/*.png, metrics.json, scenes.png,
            curves.png, confusion.png and worst.png.
        epochs: of new scenes each, as many as the preset says; default: its number.
        threads: default 1.
        show: tables on stdout.

    Returns:
        What metrics.json holds.

    Raises:
        ValueError: `out` holds a run of something else.
    """
    begin, cpu = time.perf_counter(), time.process_time()
    folder = Path(out)
    run = folder / "run"
    _make_room(run)
    folder.mkdir(parents=True, exist_ok=True)
    typed: dict[str, Any] = {"seed": seed, "track": ("none",)}
    typed |= {} if epochs is None else {"epochs": epochs}
    typed |= {} if threads is None else {"threads": threads}
    settings, notes = recipe(SegmentationSettings, "digits-scenes", typed)
    before = torch.get_num_threads()
    try:
        summary = train(Segmentation(settings), run, notes=notes)
        trained = time.process_time() - cpu
        shown = _segmented(folder, run / BEST)
    finally:
        torch.set_num_threads(before)
    answers = read_answers(run / "eval.npz")
    found = answers.figures()
    title = f"Held-out scenes: {100 * found.miou:.1f} % mIoU, {100 * found.aacc:.1f} % of all pixels right"
    captions = [_caption(one) for one in shown]
    plot_images(shown, captions, CLASSES, np.array(PALETTE, np.uint8), folder / "scenes.png", title)
    plot_runs([str(run)], str(folder))
    metrics = {
        "miou": found.miou,
        "macc": found.macc,
        "aacc": found.aacc,
        "iou": {name: float(value) for name, value in zip(CLASSES, found.iou)},
        "held_out": VALIDATION,
        "scenes": settings.scenes * settings.epochs,
        "seconds": round(time.perf_counter() - begin, 2),
        "train_seconds": summary["seconds"],
        "train_cpu_seconds": round(trained, 2),
        "seed": seed,
        "epochs": settings.epochs,
        "threads": settings.threads,
        "isa": _core.build_info()["isa"],
    }
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    if show:
        _print(answers.counts, metrics, folder)
    return metrics


def _make_room(run: Path) -> None:
    """Takes an earlier demo's run away, and nothing else."""
    if not run.exists():
        return
    config = run / CONFIG
    if not config.is_file() or tasks.read_settings(str(config)).data != "digits-scenes":
        raise ValueError(f"{run}: is not of an earlier demo; name another --out")
    shutil.rmtree(run)


def _segmented(folder: Path, weights: Path) -> list[Worst]:
    """Held-out scenes as pictures, segmented as a user would, with their truth."""
    pictures, draw = folder / "scenes", Scenes(held_out=True).draw
    pictures.mkdir(exist_ok=True)
    names = []
    for index in range(SHOWN):
        name = pictures / f"scene{index:02d}.png"
        with atomic(name) as file:
            Image.fromarray(draw(index).image).save(file, "PNG")
        names.append(str(name))
    shown = []
    for index, result in enumerate(segment(Segmenting(load(weights)), names, str(folder / "masks"))):
        if result.classes is None:
            raise RuntimeError(f"{result.image}: {result.error}")
        scene = draw(index)
        shown.append(Worst(index, scene.image, scene.mask, result.classes))
    return shown


def _caption(one: Worst) -> str:
    of = figures(confusion(one.truth, one.found, len(CLASSES)))
    return f"{100 * of.aacc:.1f} % of the pixels right"


def _print(counts: Any, metrics: dict[str, Any], folder: Path) -> None:
    print(f"\n{VALIDATION} scenes of held-out digits, in their own pixels:\n")
    print("  class         pixels   IoU      taken for")
    for i, name in enumerate(CLASSES):
        row = counts[i]
        order = [int(k) for k in np.argsort(-row, kind="stable") if k != i and row[k]][:3]
        taken = ", ".join(f"{CLASSES[k]} ({100 * row[k] / row.sum():.1f} %)" for k in order)
        iou = metrics["iou"][name]
        text = "" if math.isnan(iou) else f"{100 * iou:5.1f} %"
        print(f"  {name:<12}{int(row.sum()):>8}   {text}  {taken}")
    print(
        f"\n{100 * metrics['miou']:.1f} % mIoU after {metrics['scenes']:,} scenes and "
        f"{metrics['train_cpu_seconds']:.0f} CPU seconds; {metrics['seconds']:.0f} seconds in all.\n\n"
        f"Look at {folder}/scenes.png, worst.png, confusion.png and curves.png, or segment pictures of your "
        f"own:\nvimcore predict --weights {folder}/run/{BEST} {folder}/scenes --out masks"
    )

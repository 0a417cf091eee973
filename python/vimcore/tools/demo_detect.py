# SPDX-License-Identifier: Apache-2.0
"""`vimcore demo --task detect`: finds handwritten digits in coloured scenes, each with its box and mask.

Trains a backbone by segmentation of such scenes, then a detector on it, both by the engine of `vimcore
train`; then uses the file as `vimcore predict` does, on scenes that were held out.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import faster_coco_eval  # noqa: F401  without it nothing could be evaluated: missed before the training
import numpy as np
import torch

from .. import _core, tasks
from ..data.digits import encode_png
from ..data.object_sources import scenes as drawn_scenes
from ..data.objects import Objects
from ..detection import load
from ..plots.curves import plot_curves
from ..plots.objects import SCORED, plot_pictures, plot_worst
from ..tasks.detection.answers import Worst, quality, read_answers, shown_of, sure
from ..train.folder import BEST, CHECKPOINT, CONFIG, LOG
from ..train.log import read_log
from ..train.presets import recipe
from ..train.run import train
from ..utils.files import write_text
from .detect import Detecting, detect

WEIGHTS = "vim_objects.safetensors"
BACKBONE, DETECTOR = "digits-scenes", "digits-objects"  # presets
SHOWN = 12  # scenes


def run_demo(
    out: str | os.PathLike[str] = "vimcore-demo",
    epochs: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    *,
    scenes: int | None = None,
    show: bool = True,
) -> dict[str, Any]:
    """Trains, saves, reloads, finds and draws; the same seed gives the same file bit for bit.

    Stopped and called again with the same arguments, it goes on.

    Args:
        out: folder for vim_objects.safetensors, metrics.json, curves.png, found.png, worst.png, scenes/*.png,
            and the runs backbone/ and detector/.
        epochs: of each of the two runs; default: their presets'.
        threads: default 1.
        scenes: of an epoch; default: the presets'.
        show: tables on stdout.

    Returns:
        What metrics.json holds.
    """
    for name, value in (("epochs", epochs), ("threads", threads), ("scenes", scenes)):
        if value is not None and value < 1:
            raise ValueError(f"[demo] {name}: expected at least 1, got {value}")
    say = print if show else _silent
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    given = {"epochs": epochs, "seed": seed, "threads": threads, "scenes": scenes}
    typed = {name: value for name, value in given.items() if value is not None}
    before = torch.get_num_threads()
    try:
        say(f"1. A backbone learns to name the pixels of scenes ({folder / 'backbone'})")
        first = _trained(folder / "backbone", BACKBONE, typed)
        say(f"2. A detector learns to find the digits, from that backbone ({folder / 'detector'})")
        start = {**typed, "init": str(folder / "backbone" / BEST)}
        second = _trained(folder / "detector", DETECTOR, start)
        torch.set_num_threads(threads or 1)
        metrics = _shown(folder, say)
    finally:
        torch.set_num_threads(before)
    metrics |= {
        "backbone_cpu_seconds": first,
        "train_cpu_seconds": second,
        "seed": seed,
        "threads": threads or 1,
        "isa": _core.build_info()["isa"],
    }
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    say(
        f"box AP {100 * metrics['box_ap']:.1f} %, mask AP {100 * metrics['mask_ap']:.1f} % on "
        f"{metrics['held_out']} held-out scenes.\n\n"
        f"Look at {folder}/found.png, worst.png and curves.png, or find digits in pictures of your own:\n"
        f"vimcore predict --weights {folder / WEIGHTS} --out found {folder}/scenes"
    )
    return metrics


def _trained(folder: Path, preset: str, typed: dict[str, Any]) -> float | None:
    """A run of a preset, begun or gone on with; its CPU seconds, None where it went on.

    Raises:
        ValueError: the folder holds a run of other settings.
    """
    kind = tasks.settings_type({"task": "segment" if preset == BACKBONE else "detect"})
    wanted, notes = recipe(kind, preset, typed)
    every = wanted.epochs if preset == BACKBONE else 1
    wanted = wanted.merged({"eval_every": every, "track": ("none",)})
    resume = (folder / CHECKPOINT).exists()
    if resume:
        found = tasks.read_settings(str(folder / CONFIG))
        changed = [name for name, value in typed.items() if getattr(found, name) != value]
        if found.task != wanted.task or changed:
            what = ", ".join(changed) or "task"
            raise ValueError(f"[demo] {folder}: holds a run of another {what}; name another --out")
        wanted = found
    begin = time.process_time()
    train(tasks.create(wanted), folder, resume, notes)
    return None if resume else round(time.process_time() - begin, 2)


def _shown(folder: Path, say: Any) -> dict[str, Any]:
    """From here on as a user would: weights from the file, scenes from their pictures."""
    shutil.copyfile(folder / "detector" / BEST, folder / WEIGHTS)
    answers = read_answers(folder / "detector" / "eval.npz")
    objects = drawn_scenes(len(answers.files), held_out=True)
    files = _write_scenes(folder / "scenes", objects)
    network = Detecting(load(folder / WEIGHTS))
    found = []
    for index, result in enumerate(detect(network, files)):
        if result.error is not None:
            raise RuntimeError(f"{result.image}: {result.error}")
        truth = shown_of(objects.truth(index, masks=True), result.size)
        pixels = objects.read(index, masks=False).pixels
        found.append(Worst(index, pixels, truth, sure(shown_of(result.rows, result.size))))
    captions = []
    for one in found:
        _, missed, wrong = quality(one.truth, one.found)
        captions.append(f"{missed} missed, {wrong} wrong" if missed or wrong else "right")
    title = f"Held-out scenes: box AP {100 * answers.figures['box_ap']:.1f} %, "
    title += f"mask AP {100 * answers.figures['mask_ap']:.1f} %"
    plot_pictures(found, captions, answers.names, folder / "found.png", title)
    plot_worst(answers, folder / "worst.png", SHOWN)
    plot_curves({"the detector": read_log(folder / "detector" / LOG)}, folder / "curves.png", SCORED)
    say("\n  digit  box AP  mask AP")
    for name, box, mask in zip(answers.names, answers.box, answers.mask):
        say(f"  {name:>5}  {100 * box:5.1f} %  {100 * mask:5.1f} %")
    say("")
    return {
        **answers.figures,
        "held_out": len(answers.files),
        "missed": int(answers.missed.sum()),
        "wrong": int(answers.wrong.sum()),
        "objects": int(sum(len(objects.truth(i, masks=False)) for i in range(len(objects)))),
        "box_ap_of_class": _numbers(answers.box),
        "mask_ap_of_class": _numbers(answers.mask),
    }


def _numbers(values: Any) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def _write_scenes(folder: Path, objects: Objects) -> list[str]:
    """The first held-out scenes as PNG files; replaces those of an earlier run."""
    folder.mkdir(exist_ok=True)
    files = []
    for index in range(min(SHOWN, len(objects))):
        name = folder / f"scene_{index:02d}.png"
        name.write_bytes(encode_png(objects.read(index, masks=False).pixels))
        files.append(str(name))
    return files


def _silent(*_: object) -> None:
    """Takes the place of `print`."""

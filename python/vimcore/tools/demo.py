# SPDX-License-Identifier: Apache-2.0
"""`vimcore demo`: trains a small Vim on real handwritten digits, saves, reloads and explains it.

The digits are 8 x 8 images; they are written as 32 x 32 pictures, and both training and prediction read those
pictures through the same decoder and preprocessing.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .. import _core
from ..analysis.saliency import saliency
from ..data import pictures as images
from ..data.digits import MEAN, SIDE, STD, encode_png, jiggle, load_digits, picture, split_digits
from ..io import save_model
from ..nn.vision_mamba import VisionMamba
from ..plots.demo import plot_curve, plot_maps, plot_predictions
from ..results import Prediction
from ..runtime import Runtime
from ..train.in_memory import evaluate, fit
from ..train.presets import DIGITS
from ..utils.files import write_text
from .predict import predict

LABELS = [str(digit) for digit in range(10)]
PREPROCESS: dict[str, Any] = {
    "resize": SIDE,
    "crop": [SIDE, SIDE],
    "mean": [MEAN],
    "std": [STD],
    "interpolation": "bicubic",
}
MODEL: dict[str, Any] = {
    "img_size": SIDE,
    "num_classes": 10,
    "stride": DIGITS["patch_size"],  # 4 x 4 patches and the class token in the middle: 17 tokens
    "directions": "ssm_conv",
    "class_token": "middle",
    **{name: DIGITS[name] for name in ("patch_size", "in_chans", "embed_dim", "depth")},
}
RECIPE: dict[str, Any] = {
    "warmup": DIGITS["warmup_epochs"],
    "label_smoothing": 0.1,
    **{name: DIGITS[name] for name in ("batch_size", "lr", "weight_decay", "ema")},
}
EPOCHS: int = DIGITS["epochs"]
THREADS: int = DIGITS["threads"]


def network_input(pictures: list[bytes]) -> torch.Tensor:
    """PNG files to (B, 1, 32, 32) float32, as `vimcore predict` does it."""
    steps = _core.Preprocess(**PREPROCESS)
    return torch.from_numpy(np.stack([images.network_input(data, "digit", steps) for data in pictures]))


def run_demo(
    out: str | os.PathLike[str] = "vimcore-demo",
    epochs: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    *,
    progress: bool = True,
    show: bool = True,
) -> dict[str, Any]:
    """Trains, saves, reloads, classifies and draws; the same seed gives the same file bit for bit.

    Args:
        out: folder for vim_digits.safetensors, metrics.json, curve.png, predictions.png, maps.png and
            digits/*.png.
        epochs: passes over the training digits, default 20.
        threads: default 1.
        progress: a bar on stderr.
        show: tables on stdout.

    Returns:
        What metrics.json holds.
    """
    epochs = EPOCHS if epochs is None else epochs
    if epochs < 1:
        raise ValueError(f"[demo] epochs: expected at least 1, got {epochs}")
    if threads is not None and threads < 1:
        raise ValueError(f"[demo] threads: expected at least 1, got {threads}")
    begin = time.perf_counter()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    threads = THREADS if threads is None else threads
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        say = print if show else _silent
        digits, labels = load_digits()
        train, held_out = split_digits(labels)
        files = [encode_png(picture(digit)) for digit in digits]
        images, targets = network_input(files), torch.from_numpy(labels)
        model = _new_model(seed)
        say(
            f"{len(train)} digits to learn from, {len(held_out)} held out; "
            f"Vim with {MODEL['depth']} blocks and "
            f"{sum(p.numel() for p in model.parameters()):,} parameters, {_count(threads, 'thread')}\n"
        )
        history = fit(
            model,
            (images[train], targets[train]),
            (images[held_out], targets[held_out]),
            epochs=epochs,
            seed=seed,
            augment=jiggle,
            progress=progress,
            **{**RECIPE, "warmup": min(RECIPE["warmup"], epochs / 5)},
        )
        weights = folder / "vim_digits.safetensors"
        save_model(model, weights, LABELS, PREPROCESS)
        names = _write_digits(folder / "digits", held_out, labels, files)

        # From here on as a user would: the weights from the file, the digits from their pictures, no torch.
        results = list(predict(Runtime(weights, threads=threads), [str(name) for name in names]))
        bad = [result for result in results if result.error is not None]
        if bad:
            raise RuntimeError(f"{bad[0].image}: {bad[0].error}")
        truth = labels[held_out]
        guesses = np.array([result.top[0][0] for result in results])
        accuracy = float((guesses == truth).mean())
        trained = evaluate(model, (images[held_out], targets[held_out])).logits.argmax(1).numpy()
        if not np.array_equal(trained, guesses):
            raise RuntimeError("the reloaded network answers differently from the one that was trained")

        _print_tables(say, results, truth, folder)
        shown = _interesting(results, truth, 4)
        shades = np.stack([picture(digit) for digit in digits[held_out]])
        plot_curve(history, folder / "curve.png")
        plot_predictions(
            shades[shown],
            truth[shown],
            [results[i].top[0] for i in shown],
            accuracy,
            folder / "predictions.png",
        )
        mapped = _one_of_each(results, truth)
        maps = saliency(model, images[held_out][mapped], target=guesses[mapped].tolist()).numpy()
        plot_maps(
            shades[mapped], maps, truth[mapped], [results[i].top[0] for i in mapped], folder / "maps.png"
        )
        metrics = {
            "accuracy": accuracy,
            "held_out": len(held_out),
            "wrong": int((guesses != truth).sum()),
            "seconds": round(time.perf_counter() - begin, 2),
            "train_seconds": round(history.seconds, 2),
            "seed": seed,
            "epochs": epochs,
            "threads": threads,
            "isa": _core.build_info()["isa"],
            "loss": history.loss,
            "valid_accuracy": history.valid_accuracy,
        }
        write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        say(
            f"{100 * accuracy:.2f} % of the held-out digits are right; "
            f"{metrics['seconds']:.0f} seconds in all.\n\n"
            f"Look at {folder}/predictions.png, maps.png and curve.png, or classify pictures of your own\n"
            f"(white digit on black): vimcore predict --weights {weights} {folder}/digits"
        )
        return metrics
    finally:
        torch.set_num_threads(before)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _silent(*_: object) -> None:
    """Takes the place of `print`."""


def _new_model(seed: int) -> VisionMamba:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VisionMamba(**MODEL, memory="fast")


def _write_digits(
    folder: Path, index: NDArray[np.int64], labels: NDArray[np.int64], files: list[bytes]
) -> list[Path]:
    """Writes a PNG per held-out digit, named by number and true digit; replaces those of an earlier run."""
    folder.mkdir(exist_ok=True)
    names = []
    for i in index:
        name = folder / f"{i:04d}_is_{labels[i]}.png"
        name.write_bytes(files[i])
        names.append(name)
    return names


def _interesting(results: list[Prediction], truth: NDArray[np.int64], rows: int) -> list[int]:
    """Indices to show, one column per digit: mistakes, the least certain correct one, then others."""
    columns = []
    for digit in range(10):
        mine = [i for i in range(len(truth)) if truth[i] == digit]
        wrong = [i for i in mine if results[i].top[0][0] != digit]
        right = [i for i in mine if results[i].top[0][0] == digit]
        doubtful = sorted(right, key=lambda i: results[i].top[0][2])[:1]
        ordinary = [i for i in right if i not in doubtful]
        columns.append((wrong[: rows - 1] + doubtful + ordinary + wrong)[:rows])
    return [column[row] for row in range(rows) for column in columns]


def _one_of_each(results: list[Prediction], truth: NDArray[np.int64]) -> list[int]:
    """Per digit the most certain correct image, or the first image if none is correct."""
    chosen = []
    for digit in range(10):
        of_digit = [i for i in range(len(truth)) if truth[i] == digit]
        right = [i for i in of_digit if results[i].top[0][0] == digit]
        chosen.append(max(right, key=lambda i: results[i].top[0][2]) if right else of_digit[0])
    return chosen


def _print_tables(say: Any, results: list[Prediction], truth: NDArray[np.int64], folder: Path) -> None:
    guesses = np.array([result.top[0][0] for result in results])
    sure = np.array([result.top[0][2] for result in results])
    say("\nHeld-out digits, read from their PNG files by the reloaded network:\n")
    say("  digit  pictures  right   mean p  taken for")
    for digit in range(10):
        mine = truth == digit
        right = mine & (guesses == digit)
        others = sorted(set(guesses[mine & ~right].tolist()))
        taken = ", ".join(f"{other} ({int((guesses[mine] == other).sum())})" for other in others)
        say(f"  {digit:>5}  {mine.sum():>8}  {right.sum():>5}   {sure[mine].mean():.3f}   {taken}".rstrip())
    wrong = np.flatnonzero(guesses != truth)
    examples = (
        list(wrong[:8])
        + [i for i in range(0, len(truth), max(len(truth) // 6, 1)) if i not in set(wrong[:8])][:6]
    )
    say("\n  picture                       truth   answer   p      second")
    for i in examples:
        path = os.path.relpath(results[i].image, folder)
        first, second = results[i].top[0], results[i].top[1]
        mark = "" if first[0] == truth[i] else "   wrong"
        answer = f"{first[1]:>6}   {first[2]:.3f}  {second[1]} ({second[2]:.3f})"
        say(f"  {path:<28}  {truth[i]:>5}   {answer}{mark}")
    say("")

# SPDX-License-Identifier: Apache-2.0
"""Flags and output of `vimcore train` and `vimcore eval`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import typing
from pathlib import Path
from typing import Any

from .. import tasks
from ..data.picture_files import passed_over_text
from ..tasks.classification.settings import ClassificationSettings
from ..tasks.settings import MOST_PROCESSES, Settings, read_toml
from ..train.folder import CONFIG, resumed, weights_of
from ..train.presets import DEFAULT, PRESETS, recipe
from ..utils.files import literal, shortened
from .streams import complain


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting, named as in the TOML file."""
    parser.description = (
        "Train a Vision Mamba on images. Settings come from --preset, then --config, then flags; the run "
        "folder keeps them. Several processes: torchrun --nproc-per-node=N -m vimcore train ...; on several "
        "machines that share the run folder: torchrun --nnodes=M --nproc-per-node=N --rdzv-backend=c10d "
        "--rdzv-endpoint=HOST:29500 -m vimcore train ... on each."
    )
    parser.usage = (
        "vimcore train --data DATA [--preset NAME] [--out RUN] [SETTING ...]\n"
        "       vimcore train --resume RUN"
    )
    parser.add_argument("--out", metavar="RUN", help="folder of the run (default: vimcore-train)")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run from its checkpoint, bit for bit")
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        metavar="NAME",
        help=f"published recipe: {', '.join(PRESETS)} (default: {DEFAULT})",
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings, such as RUN/config.toml")
    parser.add_argument("--dry-run", action="store_true", help="print the settings as TOML and stop")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    kind = tasks.settings_type({})
    types = typing.get_type_hints(kind)
    groups = {section: parser.add_argument_group(section) for section in kind.SECTIONS}
    for field in dataclasses.fields(kind):
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": field.name}
        wanted = types[field.name]
        if type(None) in typing.get_args(wanted):
            wanted = typing.get_args(wanted)[0]
        text = field.metadata["help"].replace("%", "%%")
        if field.default not in (None, ()):
            text += f" (default: {_shown(field.default)})"
        if wanted is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(wanted) is tuple:
            options |= {"nargs": "+", "type": typing.get_args(wanted)[0], "metavar": "X"}
        else:
            options |= {"type": wanted, "metavar": wanted.__name__.upper()}
            if field.metadata["choices"]:
                options |= {"choices": field.metadata["choices"], "metavar": None}
        flag = "--" + field.name.replace("_", "-")
        groups[field.metadata["section"]].add_argument(flag, help=text, **options)


def _shown(value: Any) -> str:
    return " ".join(f"{v:.4g}" for v in value) if isinstance(value, tuple) else str(value)


def _settings(args: argparse.Namespace) -> tuple[Settings, list[str]]:
    """The settings of the run, and notes on what was changed though nobody typed it."""
    names = {field.name for field in dataclasses.fields(tasks.settings_type(vars(args)))}
    flags = {name: value for name, value in vars(args).items() if name in names}
    if args.resume is not None:
        if args.out or args.preset or args.config:
            raise ValueError(
                "--resume: the run has its settings; --out, --preset, --config do not go with it"
            )
        kind = tasks.settings_type(read_toml(str(Path(args.resume) / CONFIG)))
        return resumed(kind, Path(args.resume), flags), []
    of_file = read_toml(args.config) if args.config else {}
    kind = tasks.settings_type({**of_file, **flags})
    if args.config:
        of_file = read_toml(args.config, kind)
    settings, notes = recipe(kind, args.preset or DEFAULT, {**of_file, **flags})
    if "-long-" in (args.preset or "") and settings.init is None:
        raise ValueError(f"init: {args.preset} fine-tunes; name the weights to start from with --init")
    return settings, notes


def _diagnose(model: Any, batch: Any) -> str:
    """The health of a network at the images that broke it."""
    from ..analysis.health import health

    images, _ = batch
    return str(health(model, images[:8]))


def train(args: argparse.Namespace) -> int:
    """Runs, prints the summary; the status of a signal that stopped it is the shell's."""
    settings, notes = _settings(args)
    if args.dry_run:
        print(settings.to_toml())
        for note in notes:
            complain(note)
        return 0
    from ..train.run import train as run
    from ..train.signals import Stopped

    folder = Path(args.resume or args.out or "vimcore-train")
    try:
        task = tasks.create(settings)
        summary = run(task, folder, args.resume is not None, notes, _diagnose)
    except Stopped as stopped:
        complain(str(stopped))
        return stopped.status
    if not summary:
        return 0  # not the process that writes
    if args.json:
        print(json.dumps(summary))
        return 0
    best = summary["best"]
    rows = [
        ("best", ", ".join(metric.text(best[metric.name]) for metric in task.metrics)),
        ("", f"{best['weights']} weights after epoch {best['epoch']}"),
        ("time", f"{summary['seconds']:.0f} s, {summary['images_per_second']:.1f} images/s"),
        ("skipped", f"{summary['skipped']} images that could not be read"),
        ("files", f"{folder}: best.safetensors, last.safetensors, checkpoint.pt, log.jsonl, eval.npz"),
    ]
    for name, value in rows:
        print(f"{name:<8} {value}")
    return 0


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `vimcore eval`."""
    parser.add_argument("weights", nargs="+", metavar="RUN|FILE", help="run folders, or .safetensors files")
    parser.add_argument("--data", help="as for train (default: what the run was validated on)")
    parser.add_argument(
        "--img-size", type=int, nargs="+", metavar="N", help="other image size: side, or height and width"
    )
    parser.add_argument("--stride", type=int, help="other stride of the patches, in pixels")
    parser.add_argument("--mean", type=float, nargs="+", metavar="M", help="of .npy images without a run")
    parser.add_argument("--std", type=float, nargs="+", metavar="S", help="of .npy images without a run")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes that load (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of the CPU; changes no result")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, auto (default: %(default)s)")
    parser.add_argument(
        "--out", metavar="FILE", help="write labels, predictions, probabilities, files (.npz)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per file of weights")


def evaluate(args: argparse.Namespace) -> int:
    """Prints scores of all files, and of the best one every class and the confusion."""
    import torch

    from ..tasks.classification.files import evaluate as run
    from ..tasks.classification.files import images_of
    from ..train.device import choose_device

    for name in ("threads", "workers"):
        if (getattr(args, name) or 0) > MOST_PROCESSES:
            raise ValueError(f"{name}: expected at most {MOST_PROCESSES}, got {getattr(args, name)}")
    for name in ("batch_size", "threads", "stride", *(["img_size"] if args.img_size else [])):
        value = getattr(args, name)
        if value is not None and (min(value) if isinstance(value, list) else value) < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if args.img_size and len(args.img_size) > 2:
        raise ValueError(f"img_size: expected one or two numbers, got {args.img_size}")
    if args.out and Path(args.out).suffix.lower() not in ("", ".npz"):
        raise ValueError(
            f"out: expected a name that ends with .npz, which is what is written, got {args.out}"
        )
    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    results = []
    for path in args.weights:
        files, config = weights_of(path)
        settings = _classification(str(config)) if config else None
        images = images_of(args.data, settings)
        for file in files:
            found = run(
                file,
                images,
                settings,
                img_size=args.img_size,
                stride=args.stride,
                mean=args.mean,
                std=args.std,
                batch_size=args.batch_size,
                workers=args.workers,
                device=device,
            )
            results.append(found)
            if args.json:
                print(json.dumps(_facts(found), ensure_ascii=False), flush=True)
    for name, reason in results[-1].outputs.errors.items():
        complain(f"skipped {name}: {reason}")
    if images.passed_over:
        complain(passed_over_text(images.passed_over))
    best = max(results, key=lambda found: found.outputs.accuracy().top1)
    if args.out:
        best.predictions().save(Path(args.out))
    if not args.json:
        _print(results, best)
    return 0


def _classification(config: str) -> ClassificationSettings:
    settings = tasks.read_settings(config)
    if not isinstance(settings, ClassificationSettings):
        raise ValueError(f"{config}: eval knows classification, got task {settings.task}")
    return settings


def _facts(found: Any) -> dict[str, Any]:
    from ..data.classes import passed_over

    scores, predictions = found.outputs.accuracy(), found.predictions()
    return {
        "weights": found.weights,
        "images": scores.images,
        "skipped": len(found.outputs.errors),
        "loss": scores.loss,
        "top1": scores.top1,
        "top5": scores.top5,
        "images_per_second": round(scores.images / found.outputs.seconds, 2),
        "per_class": {
            name: None if math.isnan(share) else share for name, _, share, _ in predictions.per_class()
        },
        "confusion": predictions.confusion().tolist(),
        **({"passed_over": passed_over(found.images)} if found.images.passed_over else {}),
    }


def _print(results: list[Any], best: Any) -> None:
    from . import _print_table

    rows: list[list[str]] = [["weights", "images", "top-1", "top-5", "loss", "images/s"]]
    for found in results:
        scores = found.outputs.accuracy()
        rate = scores.images / found.outputs.seconds
        rows.append(
            [
                found.weights,
                str(scores.images),
                f"{100 * scores.top1:.2f} %",
                f"{100 * scores.top5:.2f} %",
                f"{scores.loss:.4f}",
                f"{rate:.1f}",
            ]
        )
    _print_table(rows)
    if best.outputs.errors:
        print(f"{len(best.outputs.errors)} images could not be read and do not count")
    print(f"\n{best.weights}")
    table = [["class", "images", "right", "most taken for"]]
    for name, count, share, taken in best.predictions().per_class():
        table.append(
            [literal(name), str(count), "" if math.isnan(share) else f"{100 * share:.1f} %", literal(taken)]
        )
    _print_table(table, indent="  ")
    confusion = best.predictions().confusion()
    if len(confusion) <= 20:
        print("\nconfusion: rows true, columns predicted")
        names = [shortened(name, 10) for name in best.images.classes]
        _print_table([["", *names], *([n, *map(str, row)] for n, row in zip(names, confusion))], indent="  ")

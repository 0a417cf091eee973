# SPDX-License-Identifier: Apache-2.0
"""`vimcore train`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import tasks
from ..tasks.architecture import with_architecture
from ..tasks.settings import Settings, read_toml
from ..train.folder import BEST, CHECKPOINT, CONFIG, LAST, LOG, config_of, resumed
from ..train.presets import DEFAULTS, FINE_TUNING, PRESETS, SAME, default_preset, overruled, recipe, task_of
from ..train.presets_segment import OF_ADE20K, for_own_masks
from ..utils.extras import required
from ..utils.files import literal
from .output import print_json
from .streams import complain


def add_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """One flag for each setting of the task that the arguments name, named as in the TOML file."""
    kind, named, init = _named(arguments)
    task = next(name for name in tasks.NAMES if tasks.settings_type({"task": name}) is kind)
    parser.set_defaults(kind=kind)
    parser.description = (
        f"Train a Vision Mamba on images, here: to {task} (--task {'|'.join(tasks.NAMES)}; each has settings "
        "of its own). Settings are taken from --preset, then --config, then flags, and "
        "are kept in the run folder. Several processes: torchrun --nproc-per-node=N -m vimcore train ...; on "
        "several machines that share the run folder: torchrun --nnodes=M --nproc-per-node=N "
        "--rdzv-backend=c10d --rdzv-endpoint=HOST:29500 -m vimcore train ... on each."
    )
    parser.usage = (
        "vimcore train --data DATA [--preset NAME] [--out RUN] [SETTING ...]\n"
        "       vimcore train --resume RUN [--epochs N]"
    )
    parser.add_argument("--out", metavar="RUN", help="folder of the run (default: vimcore-train)")
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="resume a run from its checkpoint, with bit-identical results; with a greater --epochs "
        "(or --updates) it becomes longer: from there its learning rate is that of a run which was so long "
        "from the start",
    )
    tuned = default_preset(task, "")
    of_init = f", with --init {tuned}" if tuned != DEFAULTS[task] else ""
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        metavar="NAME",
        help=f"published recipe: {', '.join(name for name in PRESETS if task_of(name) == task)} "
        f"(default: {DEFAULTS[task]}{of_init})",
    )
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings, such as RUN/config.toml")
    parser.add_argument("--dry-run", action="store_true", help="print the settings as TOML and stop")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--verbose", action="store_true", help="print all settings at the start")
    preset = named or default_preset(task, init)
    parser.description += f" Defaults below are those of preset {preset}."
    usual = kind().merged(PRESETS[preset])
    types = typing.get_type_hints(kind)
    groups = {section: parser.add_argument_group(section) for section in kind.SECTIONS}
    for field in dataclasses.fields(kind):
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": field.name}
        wanted = types[field.name]
        if type(None) in typing.get_args(wanted):
            wanted = typing.get_args(wanted)[0]
        text = _described(field, usual).replace("%", "%%")
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


def _described(field: dataclasses.Field[Any], usual: Settings) -> str:
    """What `--help` says of a setting."""
    text, value = str(field.metadata["help"]), getattr(usual, field.name)
    if field.name in OF_ADE20K:  # by other data not taken over from the preset
        value = field.default
    if value in (None, ()) or field.name in _said_otherwise(usual):
        return text
    if field.default is None:  # the text says what follows without a preset
        text = re.sub(r"[;,]? default:? [^;]*$", "", text)
    return f"{text} (default: {_shown(value)})"


def _said_otherwise(usual: Settings) -> set[str]:
    """Settings that others stand in place of."""
    names = {"epochs"} if usual.updates is not None else set()
    if usual.warmup_updates is not None or usual.warmup_share is not None:
        names.add("warmup_epochs")
    return names


def _named(arguments: Sequence[str]) -> tuple[type[Settings], str | None, str | None]:
    """Settings of the task that these arguments speak of, preset, init; what is wrong is told later."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in ("--task", "--preset", "--config", "--resume", "--init"):
        parser.add_argument(flag)
    values: dict[str, Any] = {}
    try:
        args, _ = parser.parse_known_args(arguments)
        if args.preset in PRESETS:
            values = {"task": task_of(args.preset)}
        file = args.config or (args.resume and str(Path(args.resume) / CONFIG))
        if file:
            values = {**values, **read_toml(file)}
        if args.task:
            values = {"task": args.task}
        kind = tasks.settings_type(values)
    except (argparse.ArgumentError, OSError, ValueError):
        return tasks.settings_type({}), None, None
    fits = args.preset in PRESETS and tasks.settings_type({"task": task_of(args.preset)}) is kind
    return kind, args.preset if fits else None, args.init


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _published(init: str | None) -> dict[str, str]:
    """The checkpoint of a name that `vimcore download` lists, in place of the name; else nothing."""
    from ..hub.published import PUBLISHED

    if init not in PUBLISHED or os.path.exists(init):
        return {}
    from ..hub.pretrained import checkpoint_of

    return {"init": os.fspath(checkpoint_of(PUBLISHED[init]))}


def _settings(args: argparse.Namespace) -> tuple[Settings, list[str]]:
    """The settings of the run, and notes on what was changed without being asked for."""
    names = {field.name for field in dataclasses.fields(args.kind)}
    flags = {name: value for name, value in vars(args).items() if name in names}
    if args.resume is not None:
        if args.out or args.preset or args.config:
            raise ValueError(
                "--resume: the run has its settings; --out, --preset, --config do not go with it"
            )
        kind = tasks.settings_type(read_toml(config_of(Path(args.resume))))
        return resumed(kind, Path(args.resume), flags), []
    of_file = read_toml(args.config) if args.config else {}
    of_preset = {"task": task_of(args.preset)} if args.preset else {}
    kind = tasks.settings_type({**of_preset, **of_file, **flags})
    if args.preset and tasks.settings_type(of_preset) is not kind:
        raise ValueError(
            f"preset: {args.preset} is a recipe to {of_preset['task']}, got task {flags.get('task')}"
        )
    if kind is not args.kind:
        raise ValueError("write --task, --preset and --config in full: the settings follow from them")
    if args.config:
        of_file = read_toml(args.config, kind)
    for name in flags:
        if both := sorted(set(SAME.get(name, ())) & set(flags)):
            what = "warm-up" if "warmup" in name else "the run"
            raise ValueError(f"{name}, {both[0]}: both give the length of {what}; name one of them")
    typed = {**{name: value for name, value in of_file.items() if name not in overruled(flags)}, **flags}
    typed |= _published(typed.get("init"))
    task = next(name for name in tasks.NAMES if tasks.settings_type({"task": name}) is kind)
    preset = args.preset or default_preset(task, typed.get("init"))
    if typed.get("init") is None and preset in FINE_TUNING:
        raise ValueError(f"init: {preset} fine-tunes; name the weights to start from with --init")
    notes = []
    if preset == "finetune":
        if args.preset is None:
            notes.append("preset finetune, as --init is given; --preset names another")
        typed, more = with_architecture(typed)
        notes += more
    if task == "segment":
        typed, more = for_own_masks(preset, typed)
        notes += more
    settings, more = recipe(kind, preset, {"task": task, **typed})
    return settings, [*notes, *more]


def _diagnose(model: Any, batch: Any) -> str:
    """The health report of a network on the images whose loss is not finite."""
    from ..analysis.health import health

    images, _ = batch
    return str(health(model, images[:8]))


def run(args: argparse.Namespace) -> int:
    """Trains and prints the summary; a run stopped by a signal exits with 128 + its number, as in a shell."""
    with required("training", "train"):  # named now, not after the work
        import timm  # noqa: F401
        import torchvision  # noqa: F401
        import tqdm  # noqa: F401
    settings, notes = _settings(args)
    if args.dry_run:
        print(settings.to_toml())
        for note in notes:
            complain(note)
        return 0
    from ..train.run import train
    from ..train.signals import Stopped

    folder = Path(args.resume or args.out or "vimcore-train")
    try:
        task = tasks.create(settings)
        diagnose = _diagnose if settings.task == "classify" else None
        summary = train(task, folder, args.resume is not None, notes, diagnose, args.verbose)
    except Stopped as stopped:
        complain(str(stopped))
        return stopped.status
    if not summary:
        return 0  # not the process that writes
    if args.json:
        print_json(summary)
        return 0
    best = summary["best"]
    rows = [
        ("best", ", ".join(metric.text(best[metric.name]) for metric in task.metrics)),
        ("", f"{best['weights']} weights after epoch {best['epoch']}"),
        ("time", f"{summary['seconds']:.0f} s, {summary['images_per_second']:.1f} images/s"),
        ("skipped", f"{summary['skipped']} images that could not be read"),
        (
            "files",
            f"{folder}: {', '.join((BEST, LAST, CHECKPOINT, LOG, *task.files))}",
        ),
    ]
    for name, value in rows:
        print(f"{name:<8} {literal(value)}")
    return 0

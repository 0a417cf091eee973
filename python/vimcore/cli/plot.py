# SPDX-License-Identifier: Apache-2.0
"""`vimcore plot`."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from .. import tasks
from ..train.folder import CONFIG
from ..utils import options
from ..utils.extras import required
from ..utils.files import literal
from .output import print_json
from .streams import complain

# The module of vimcore.plots that draws the runs of a task.
DRAWN_BY = {
    "classify": "runs",
    "segment": "segments",
    "detect": "objects",
    "pretrain": "reconstructions",
    "clip": "captions",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN|REPORT",
        help="folders written by `vimcore train`, or files by `vimcore bench --json`",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="output folder (default: the run; the current folder for several runs)",
    )
    parser.add_argument(
        "--format",
        choices=("png", "svg", "html"),
        default="png",
        help="html: a report of each run, report.html, one file that opens anywhere (default: %(default)s)",
    )
    parser.add_argument(
        "--mistakes",
        type=options.positive,
        default=24,
        metavar="N",
        help="number of the worst images to show (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the names of the files written as JSON")


def run(args: argparse.Namespace) -> int:
    with required("plotting", "demo"):
        if all(Path(run).is_file() for run in args.runs):
            from ..plots.bench import plot_reports

            if args.format == "html":
                raise ValueError(f"format: html is for runs, {args.runs[0]} is a report of a benchmark")
            written, notes = plot_reports(args.runs, args.out, args.format)
        elif args.format == "html":
            from ..plots.report import report_runs

            written, notes = report_runs(args.runs, args.out, args.mistakes)
        else:
            module = importlib.import_module(f"vimcore.plots.{DRAWN_BY[_task(args.runs)]}")
            written, notes = module.plot_runs(args.runs, args.out, args.format, args.mistakes)
    for note in notes:
        complain(note)
    if args.json:
        print_json({"written": written})
    else:
        print("\n".join(map(literal, written)))
    return 0


def _task(runs: list[str]) -> str:
    """Of the runs; a folder without settings is of a classifier."""
    configs = {run: Path(run) / CONFIG for run in runs}
    kinds = {
        tasks.read_settings(str(config)).task if config.exists() else "classify": run
        for run, config in configs.items()
    }
    if len(kinds) > 1:
        shown = ", ".join(f"{run} ({task})" for task, run in kinds.items())
        raise ValueError(f"runs: of several tasks, which have no common figures: {shown}")
    return next(iter(kinds))

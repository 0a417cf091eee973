# SPDX-License-Identifier: Apache-2.0
"""`vimcore eval`: weights against images with their truth; the run or file says of which task."""

from __future__ import annotations

import argparse
import importlib

from ... import tasks
from ...tasks.settings import MOST_PROCESSES
from ...tools.prediction_files import check_out
from ...train.folder import weights_of
from ...utils.extras import required
from ...utils.precision import FLOATS
from ...weights.metadata import task_of_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", nargs="+", metavar="RUN|FILE", help="run folders, or .safetensors files")
    parser.add_argument("--data", help="images, as for train (default: the validation images of the run)")
    parser.add_argument(
        "--img-size",
        type=int,
        nargs="+",
        metavar="N",
        help="evaluate at this image size: side, or height and width",
    )
    parser.add_argument(
        "--stride", type=int, help="classifiers: evaluate with this stride of the patches, in pixels"
    )
    parser.add_argument(
        "--mean",
        type=float,
        nargs="+",
        metavar="M",
        help="classifiers: mean of the channels, for .npy images without a run",
    )
    parser.add_argument("--std", type=float, nargs="+", metavar="S", help="standard deviation, likewise")
    parser.add_argument(
        "--whole", action="store_true", help="segmentation: look at whole images, not by windows"
    )
    parser.add_argument(
        "--reduce-zero-label",
        action="store_true",
        default=None,
        help="segmentation: 0 of masks is no class, k is class k - 1 (default: as the run has it)",
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="also write a report on the best of these weights: one file, which opens in any browser",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument(
        "--workers", type=int, default=2, help="data loading processes (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; do not change the result")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, auto (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=FLOATS,
        default="float32",
        help="type of activations: float32, bfloat16, on cuda float16 (default: %(default)s)",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="write labels, predictions, probabilities and file names (.npz)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per file of weights")


def run(args: argparse.Namespace) -> int:
    """Checks what all tasks share; the file of the task in this folder does the rest."""
    with required("training", "train"):
        import timm  # noqa: F401
        import torch
        import torchvision  # noqa: F401
        import tqdm  # noqa: F401
    for name in ("threads", "workers"):
        if (getattr(args, name) or 0) > MOST_PROCESSES:
            raise ValueError(f"{name}: expected at most {MOST_PROCESSES}, got {getattr(args, name)}")
    for name in ("batch_size", "threads", "stride", *(["img_size"] if args.img_size else [])):
        value = getattr(args, name)
        if value is not None and (min(value) if isinstance(value, list) else value) < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if args.img_size and len(args.img_size) > 2:
        raise ValueError(f"img_size: expected one or two numbers, got {args.img_size}")
    kinds = {_task(path): path for path in args.weights}
    if len(kinds) > 1:
        shown = ", ".join(f"{path} ({task})" for task, path in kinds.items())
        raise ValueError(f"weights: of several tasks, whose scores do not compare: {shown}")
    (task,) = kinds
    if args.html is not None:
        check_out(args.html, (".html", ".htm"), "html")
        with required("a report", "demo"):
            import matplotlib  # noqa: F401
            import PIL  # noqa: F401
    if args.threads:
        torch.set_num_threads(args.threads)
    return int(importlib.import_module(f".{task}", __name__).run(args))


def _task(path: str) -> str:
    """Of a run folder, or of a file."""
    files, config = weights_of(path)
    return tasks.read_settings(str(config)).task if config else task_of_file(files[0])

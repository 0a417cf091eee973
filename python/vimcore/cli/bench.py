# SPDX-License-Identifier: Apache-2.0
"""`vimcore bench`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from ..config import WIDTHS
from ..tools.bench import NECKS, PEERS, USUAL_PEERS, Options
from ..tools.bench import run as measure
from ..utils import options
from ..utils.arguments import gpu_number
from ..utils.precision import FLOATS, check_precision


def _peer_names(text: str) -> list[str]:
    """Type of an option: names of peers, separated by commas; none for an empty text."""
    names = [part for part in text.split(",") if part]
    if unknown := [name for name in names if name not in PEERS]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(PEERS)}, got {','.join(unknown)!r}")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        type=options.published_size,
        choices=sorted(WIDTHS),
        default="vim_tiny",
        help="published size, also as vim_tiny_patch16_224 (default: vim_tiny)",
    )
    parser.add_argument(
        "--sizes",
        type=options.numbers,
        default=[224, 512, 1248],
        help="image sides in pixels (default: 224,512,1248)",
    )
    parser.add_argument("--batch", type=options.numbers, default=[1, 8], help="batch sizes (default: 1,8)")
    parser.add_argument("--train", action="store_true", help="forward and backward with a cross-entropy loss")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=FLOATS,
        help="type of activations, of the peers too (default: float32 on the cpu, bfloat16 on cuda)",
    )
    parser.add_argument(
        "--memory",
        choices=("least", "lean", "fast"),
        default="lean",
        help="how much the backward pass keeps, with --train (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=options.threads, default=2, help="CPU threads on both sides (default: 2)"
    )
    parser.add_argument(
        "--peers",
        type=_peer_names,
        help=f"some of {','.join(PEERS)}; '' for none (default: {','.join(USUAL_PEERS)}; with bfloat16 on "
        "the cpu also vimcore-float32)",
    )
    parser.add_argument(
        "--neck",
        choices=NECKS,
        default="none",
        help="simple: backbone and feature pyramid instead of a classifier, on both sides "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--peak-memory",
        action="store_true",
        help="also measure the peak memory, in processes of their own",
    )
    parser.add_argument(
        "--peers-dir",
        type=Path,
        help="folder of deit.py and vim_torch.py (default: a checkout's tests/bench)",
    )
    parser.add_argument(
        "--pairs", type=options.positive, default=15, help="pairs of samples for each figure (default: 15)"
    )
    parser.add_argument(
        "--seconds",
        type=options.seconds,
        default=60.0,
        help="start no new pair of a figure after this many seconds (default: 60)",
    )
    parser.add_argument(
        "--sample", type=options.seconds, default=0.1, help="length of a sample in seconds (default: 0.1)"
    )
    parser.add_argument(
        "--pause", type=options.seconds, default=0.03, help="rest before a sample in seconds (default: 0.03)"
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write a report with all samples to FILE; - is standard output"
    )


def run(args: argparse.Namespace) -> int:
    """Measures and writes the report.

    Raises:
        ValueError: an option does not fit; before anything is measured.
    """
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    gpu_number("--device", args.device)
    check_precision("--dtype", dtype, args.device)
    if args.peers is None:
        beside = ["vimcore-float32"] if args.device == "cpu" and dtype != "float32" else []
        args.peers = [*beside, *USUAL_PEERS]
    if small := [side for side in args.sizes if side < 16]:
        raise ValueError(f"--sizes: an image of {small[0]} pixels is smaller than a patch of 16")
    if args.json not in (None, "-"):
        place = Path(args.json)
        if place.is_dir() or not os.access(place.parent, os.W_OK):  # known now, not after minutes
            raise ValueError(f"--json {args.json}: no file can be written there")
    if args.train and args.neck != "none":
        raise ValueError(f"--neck {args.neck}: is measured without --train; there is nothing to learn there")
    given = {name: value for name, value in vars(args).items() if name in Options.__dataclass_fields__}
    table = sys.stderr if args.json == "-" else sys.stdout
    report = measure(Options(**{**given, "dtype": dtype, "table": table}))
    if args.json == "-":
        json.dump(report, sys.stdout, indent=1)
        print()
    elif args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    return 0

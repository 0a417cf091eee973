# SPDX-License-Identifier: Apache-2.0
"""`vimcore convert`."""

from __future__ import annotations

import argparse
import json

from ..utils.extras import required
from ..utils.files import literal
from .output import print_json, print_table

IMAGENET, CLASSES = "imagenet-1k", 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        help="checkpoint of the authors, timm, Lightning, mmsegmentation ...: .pth (needs torch) or "
        ".safetensors",
    )
    parser.add_argument("destination", help="vimcore safetensors file to write")
    parser.add_argument(
        "--weights",
        choices=("model", "ema"),
        default="model",
        help="which weights of a training checkpoint: trained or averaged (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set an option of VisionMamba, or of a head, that the tensors do not determine; may be repeated",
    )
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help=f"class names, one per line or a JSON list; {IMAGENET} for those of ImageNet (needs timm)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights in the file, which 16 bits make about half as large (default: as the source, "
        "float32 or wider)",
    )
    parser.add_argument("--json", action="store_true", help="print configuration and assumptions as JSON")


def run(args: argparse.Namespace) -> int:
    from .. import _core
    from ..hub.pretrained import imagenet_names
    from ..weights.convert import parse_setting, read_labels
    from ..weights.convert_dense import convert
    from ..weights.metadata import LABELS_KEY, TASK_KEY

    settings = dict(parse_setting(text) for text in args.set)
    if args.labels == IMAGENET:
        with required(f"--labels {IMAGENET}", "train"):
            import timm  # noqa: F401
        labels = imagenet_names()
    else:
        labels = read_labels(args.labels) if args.labels else None
    config, assumptions = convert(
        args.source,
        args.destination,
        weights=args.weights,
        settings=settings,
        labels=labels,
        dtype=args.dtype,
    )
    written = _core.safetensors_header(args.destination)[1]
    if config["num_classes"] == CLASSES and not {LABELS_KEY, TASK_KEY} & set(written):
        assumptions.append(f"labels none; if these are ImageNet's {CLASSES} classes: --labels {IMAGENET}")
    if args.json:
        print_json({"config": config, "assumptions": assumptions, "written": args.destination})
        return 0
    print("architecture:")
    print_table([[key, json.dumps(value)] for key, value in config.items()], indent="  ")
    print("assumed (change with --set):" if assumptions else "nothing had to be assumed")
    for text in assumptions:
        print(f"  {literal(text)}")
    print(f"written: {literal(str(args.destination))}")
    return 0

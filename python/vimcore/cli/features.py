# SPDX-License-Identifier: Apache-2.0
"""`vimcore features`."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping

import numpy as np

from ..data.named_files import HELP
from ..utils import options
from ..utils.files import printable
from .computing import add_computing, add_img_size
from .output import print_json
from .progress import HELP as PROGRESS
from .results import tell
from .streams import complain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER|@LIST", help=HELP)
    parser.add_argument(
        "--weights", required=True, metavar="FILE", help="vimcore safetensors file of any task"
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE",
        help=".npz: arrays `features` and `images`, the pictures' names; .npy: the features alone; .csv: a "
        "row a picture; .safetensors: `features`, the names as JSON in the metadata key vimcore.images",
    )
    parser.add_argument(
        "--tokens",
        action="store_true",
        help="all tokens of each picture (N, L, D) instead of one vector (N, D), of registers (N, n D)",
    )
    parser.add_argument(
        "--batch",
        type=options.positive,
        default=8,
        metavar="N",
        help="images computed together (default: %(default)s); does not change the result",
    )
    add_img_size(parser)
    add_computing(parser)
    parser.add_argument("--progress", action="store_true", help=PROGRESS)
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(args: argparse.Namespace) -> int:
    """Writes the features of all pictures that can be read; status 1 where some cannot."""
    from ..tools.embedders import open_embedder
    from ..tools.features import SUFFIXES, Feature, features, write_features
    from ..tools.predict import inputs_of
    from ..tools.prediction_files import check_out

    suffix = check_out(args.out, SUFFIXES)
    if args.tokens and suffix == ".csv":
        raise ValueError(
            f"out: with --tokens a picture has a table of its own, which {args.out} cannot hold; .npz can"
        )
    embedder = open_embedder(args.weights, args.device, args.threads, args.img_size, args.dtype)
    passed_over = Counter[str]()
    names = inputs_of(embedder.frames, args.images, passed_over)
    images: list[str] = []
    rows: list[np.ndarray] = []

    def keep(feature: Feature, _: Mapping[str, int] | None) -> None:
        if feature.values is not None:
            images.append(feature.image)
            rows.append(feature.values)

    found = features(embedder, names, args.tokens, args.batch)
    status = tell(
        found, len(names), passed_over, keep, args.progress, "clips" if embedder.frames else "images"
    )
    if not images:
        raise RuntimeError(f"nothing gave features, so nothing is written to {args.out}")
    values = np.stack(rows)
    write_features(args.out, suffix, images, values)
    if status and suffix == ".npy":
        complain(f"{args.out}: has no rows for images that failed, and no names; .npz and .csv have names")
    if args.json:
        about = {"written": args.out, "images": len(images), "failed": len(names) - len(images)}
        more = {"passed_over": dict(sorted(passed_over.items()))} if passed_over else {}
        print_json({**about, "width": values.shape[-1], **more}, ascii_only=False)
    else:
        what = "clips" if embedder.frames else "pictures"
        print(f"{printable(args.out)}: features {values.shape} of {len(images)} {what}")
    return status

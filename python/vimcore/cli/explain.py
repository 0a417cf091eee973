# SPDX-License-Identifier: Apache-2.0
"""`vimcore explain`."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from ..data.named_files import HELP, pictures_of
from ..data.picture_files import FORMATS_TEXT, passed_over_text
from ..utils import options
from ..utils.extras import required
from ..utils.files import literal, shortened
from .output import print_json, print_table
from .streams import complain

WHAT = ("attention", "rollout", "erf", "pca", "norms", "relevance", "saliency")


def _what(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in WHAT:
            raise argparse.ArgumentTypeError(f"expected some of {','.join(WHAT)}, got {name!r:.60}")
    return names


def _layers(text: str) -> list[int]:
    return [options.integer(part, least=-options.MOST) for part in text.split(",")]


def _token(text: str) -> str | tuple[int, int]:
    if text == "class":
        return text
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"expected 'class' or ROW,COLUMN of a patch, got {text!r:.60}")
    return options.integer(parts[0], least=0), options.integer(parts[1], least=0)


def _dtype(text: str) -> str:
    if text != "float32":
        raise argparse.ArgumentTypeError(
            f"{text!r:.60}: explanations are computed in float32, in which what they divide adds up again; "
            "`vimcore health` tells what 16 bits change"
        )
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER|@LIST", help=HELP)
    parser.add_argument(
        "--weights",
        required=True,
        metavar="FILE",
        help="vimcore safetensors file of a classifier or backbone",
    )
    parser.add_argument(
        "--what",
        type=_what,
        metavar="LIST",
        help="some of attention (weights that the scans imply), rollout (these over all layers), erf "
        "(effective receptive field), pca (features as colours), norms (of tokens), relevance (MambaLRP), "
        "saliency (integrated gradients), separated by commas (default: all)",
    )
    parser.add_argument(
        "--out", default="explained", metavar="FOLDER", help="output folder (default: %(default)s)"
    )
    parser.add_argument(
        "--layers",
        type=_layers,
        metavar="LIST",
        help="layers of attention and norms, such as 0,5,-1; the last one also of erf and pca (default: all)",
    )
    parser.add_argument(
        "--token",
        type=_token,
        metavar="class|ROW,COLUMN",
        help="whose attention (default: the class token; without one the middle patch)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--target", metavar="CLASS", help="class to explain, by label or number (default: the predicted one)"
    )
    which.add_argument(
        "--topk",
        type=options.positive,
        default=1,
        metavar="N",
        help="explain the N most probable classes (default: %(default)s)",
    )
    parser.add_argument(
        "--start",
        type=lambda text: options.integer(text, least=0),
        default=0,
        metavar="LAYER",
        help="first layer of the rollout (default: %(default)s)",
    )
    parser.add_argument(
        "--img-size",
        type=options.image_size,
        metavar="PIXELS",
        help="side, or HEIGHTxWIDTH, to see the images at (default: the network's)",
    )
    parser.add_argument("--format", choices=("png", "svg"), default="png", help="default: %(default)s")
    parser.add_argument("--threads", type=options.threads, help="CPU threads (default: all cores)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--dtype", type=_dtype, default="float32", help="float32, which explanations need")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per image, and one for figures of all"
    )


def run(args: argparse.Namespace) -> int:
    with required("the explanation of networks", "demo"):
        import torch
        from tqdm import tqdm

        from ..tools.explain import Explainer, Wishes

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    wishes = Wishes(args.what, args.layers, args.token, args.target, args.topk, args.start, args.format)
    explainer = Explainer(args.weights, Path(args.out), wishes, args.img_size, args.device)
    passed_over = Counter[str]()
    paths = pictures_of(args.images, passed_over)
    if passed_over:
        complain(passed_over_text(passed_over))
    if not paths:
        raise RuntimeError(f"no pictures found ({FORMATS_TEXT})")
    failed = 0
    with tqdm(
        total=len(paths) * len(explainer.what),
        unit="figure",
        file=sys.stderr,
        dynamic_ncols=True,
        leave=False,
        disable=None,  # on what is no terminal
    ) as bar:
        steps = -1

        def watch(image: str, what: str) -> None:
            nonlocal steps
            steps += 1
            bar.n = min(steps, bar.total)
            bar.set_postfix_str(f"{shortened(os.path.basename(image), 32)}: {what}")

        for found in explainer.explain(paths, watch):
            with tqdm.external_write_mode(file=sys.stderr):
                failed += found.error is not None
                _print(found, args.json)
        together = explainer.finish(watch)
    if together:
        _print_together(together, args.json)
    if failed:
        complain(f"{failed} of {len(paths)} images failed")
    return 1 if failed else 0


def _print(found: Any, as_json: bool) -> None:
    if found.error is not None:
        complain(f"{found.image}: {found.error}")
    if as_json:
        rest = {"error": found.error} if found.error else {"targets": found.targets, "written": found.written}
        print_json({"image": found.image, **rest})
    elif found.error is None:
        print(literal(found.image))
        for target in found.targets:
            label = literal(target["label"] or "")
            print(f"  {100 * target['p']:7.3f} %  {target['index']:>5}  {label}".rstrip())
            for what in ("relevance", "saliency"):
                if what in target:
                    areas = target[what]
                    text = f"deletion {areas['deletion']:.3f}, insertion {areas['insertion']:.3f}"
                    print(f"    {what}: area of {text}")
        for name in found.written:
            print(f"  {literal(name)}")


def _print_together(together: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(together)
        return
    if "erf" in together:
        print("effective receptive field")
        rows = [["share", "side, px", "of image"]]
        for row in together["erf"]["sides"]:
            side = "-" if row["side"] is None else str(row["side"])
            rows.append([f"{row['share']:.0%}", side, "-" if row["area"] is None else f"{row['area']:.1%}"])
        print_table(rows, indent="  ")
    for name in together["written"]:
        print(literal(name))

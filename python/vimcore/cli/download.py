# SPDX-License-Identifier: Apache-2.0
"""`vimcore download`."""

from __future__ import annotations

import argparse
import os
from dataclasses import asdict
from pathlib import Path

from ..utils.files import literal
from .output import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="network whose weights to fetch; without it, what there is"
    )
    parser.add_argument(
        "--out", metavar="F", help="vimcore safetensors file to write (default: NAME.safetensors, here)"
    )
    parser.add_argument(
        "--weights",
        choices=("model", "ema"),
        default="model",
        help="which weights of the checkpoint: trained or averaged (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights in the file (default: float32)",
    )
    parser.add_argument(
        "--force", action="store_true", help="download again, and replace the file that is there"
    )
    parser.add_argument("--json", action="store_true", help="print facts as JSON")
    parser.epilog = (
        "Checkpoints stay in the cache of huggingface_hub. Variables: HF_HOME, HF_HUB_CACHE (where it is), "
        "HF_HUB_OFFLINE (nothing is downloaded), HF_ENDPOINT (a mirror), HF_TOKEN (who asks). Needs the "
        "packages torch and huggingface_hub (extra hub)."
    )


def run(args: argparse.Namespace) -> int:
    from ..hub.published import LICENCE, PUBLISHED

    if args.name is None:
        facts = [{**asdict(weights), "page": weights.page} for weights in PUBLISHED.values()]
        if args.json:
            print_json({"weights": facts, "licence": LICENCE})
            return 0
        rows = [["name", "ImageNet top-1", "download", "from"]]
        rows += [
            [w.name, f"{w.top1:.1f} %", f"{w.megabytes} MB", f"{w.repo}/{w.file}"] for w in PUBLISHED.values()
        ]
        print_table(rows)
        print(f"licence: {LICENCE}")
        return 0
    from ..hub.pretrained import download
    from ..hub.published import published

    published(args.name)
    out = Path(args.out or f"{args.name}.safetensors")
    if out.exists() and not args.force:
        raise FileExistsError(f"{os.fspath(out)}: is there; name another --out, or replace it by --force")
    found = download(args.name, out, average=args.weights == "ema", dtype=args.dtype, force=args.force)
    weights = found.weights
    facts_of = {
        "name": weights.name,
        "page": weights.page,
        "licence": LICENCE,
        "checkpoint": os.fspath(found.checkpoint),
        "sha256": found.sha256,
        "config": found.config,
        "assumptions": found.assumptions,
        "written": os.fspath(out),
    }
    if args.json:
        print_json(facts_of)
        return 0
    for key in ("page", "licence", "checkpoint", "sha256"):
        print(f"{key}: {literal(str(facts_of[key]))}")
    for text in found.assumptions:
        print(f"assumed: {text}")
    print(f"written: {literal(os.fspath(out))}")
    return 0

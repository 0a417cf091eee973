# SPDX-License-Identifier: Apache-2.0
"""`vimcore export`."""

from __future__ import annotations

import argparse
import sys

from .output import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", required=True, metavar="FILE", help="vimcore file of a classifier")
    parser.add_argument("--onnx", metavar="FILE.onnx", help="write for ONNX Runtime")
    parser.add_argument(
        "--openvino",
        metavar="FILE.xml",
        help="write for OpenVINO, weights beside it in .bin; where the CPU has bfloat16, OpenVINO computes "
        "in it unless INFERENCE_PRECISION_HINT is f32",
    )
    parser.add_argument("--pt2", metavar="FILE.pt2", help="write for torch.export.load, without vimcore")
    parser.add_argument(
        "--img-size",
        type=int,
        nargs="+",
        metavar="N",
        help="side, or height and width in pixels (default: as stored); the file is for this size, any batch",
    )
    parser.add_argument("--threads", type=int, help="of the comparison with the core (default: all cores)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per file written")


def run(args: argparse.Namespace) -> int:
    """Writes what was asked for, one after the other."""
    from ..utils.extras import required

    with required("export", "export"):  # also where torch is too old to have loops
        from ..export import FORMATS, export

    wanted = [(kind, getattr(args, kind)) for kind in FORMATS if getattr(args, kind)]
    if not wanted:
        raise ValueError("name at least one file to write: --onnx, --openvino or --pt2")
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"threads: expected at least 1, got {args.threads}")
    if args.img_size and len(args.img_size) > 2:
        raise ValueError(f"img_size: expected one or two numbers, got {args.img_size}")
    size = args.img_size and (args.img_size[0], args.img_size[-1])
    rows = [["file", "difference", "ms/image", "vimcore's"]]
    for kind, out in wanted:
        done = export(args.weights, kind, out, size, args.threads, _tell)
        facts = {
            "files": list(done.files),
            "difference": done.difference,
            "ms_per_image": round(done.milliseconds, 3),
            "vimcore_ms_per_image": round(done.core_milliseconds, 3),
        }
        if args.json:
            print_json(facts, ascii_only=False)
        times = f"{done.milliseconds:.1f}", f"{done.core_milliseconds:.1f}"
        rows.append([" ".join(done.files), f"{done.difference:.1e}", *times])
    if not args.json:
        print_table(rows)
    return 0


def _tell(text: str) -> None:
    print(f"vimcore: {text} ...", file=sys.stderr, flush=True)

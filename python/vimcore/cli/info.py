# SPDX-License-Identifier: Apache-2.0
"""`vimcore info`."""

from __future__ import annotations

import argparse
import json

from ..weights.info import describe_file
from .output import print_json, print_table

_OF_TASKS = (
    "embed_dim",
    "options",
    "window",
    "stride",
    "resize",
    "ids",
)  # of networks with heads, where they have them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="FILE", help="vimcore safetensors file")
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    facts = describe_file(args.weights)
    if args.json:
        print_json(facts, ascii_only=False)
        return 0
    names = facts.get("classes") or facts["labels"]
    shown = (
        "none"
        if names is None
        else ", ".join(names[:10]) + (f", ... ({len(names)})" if len(names) > 10 else "")
    )
    tokens, (rows, columns), frames = facts["tokens"], facts["grid"], facts["config"]["frames"]
    of_frames, unit = (f"{frames} frames of ", "clip") if frames else ("", "image")
    print_table(
        [
            ["file", f"{facts['file']} ({facts['bytes'] / 1e6:.2f} MB, {', '.join(facts['types'])})"],
            ["parameters", f"{facts['parameters']:,}"],
            ["flops", f"{facts['flops'] / 1e9:.4g} G multiply-adds per {unit}, scans included"],
            [
                "tokens",
                f"{tokens}: {of_frames}{rows} x {columns} patches, class tokens: {facts['class_tokens']}",
            ],
            *([["task", f"{facts['task']}, head {facts['head']}"]] if "task" in facts else []),
            *([[key, json.dumps(facts[key])] for key in _OF_TASKS if facts.get(key) is not None]),
            *([] if facts.get("task") == "clip" else [["classes" if "task" in facts else "labels", shown]]),
            ["preprocess", "none" if facts["preprocess"] is None else json.dumps(facts["preprocess"])],
        ]
    )
    print("architecture")
    print_table([[key, json.dumps(value)] for key, value in facts["config"].items()], indent="  ")
    return 0

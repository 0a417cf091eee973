# SPDX-License-Identifier: Apache-2.0
"""`vimcore doctor`."""

from __future__ import annotations

import argparse
from typing import Any

from .output import print_json, print_table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(args: argparse.Namespace) -> int:
    from ..tools.selftest import report

    facts = report()
    status = 0 if facts["ok"] else 1
    if args.json:
        print_json(facts)
        return status
    for title in ("build", "machine"):
        print(title)
        print_table(
            [[k, _shown(v)] for k, v in facts[title].items()],
            indent="  ",
        )
    print("self-test")
    print_table([[row["check"], row["status"], row["detail"]] for row in facts["checks"]], indent="  ")
    print("all is well" if facts["ok"] else "something is wrong: see the failed lines above")
    return status


def _shown(value: Any) -> str:
    """Lists as words; what there is nothing of (kernels, a unit for bf16) as "none"."""
    text = ", ".join(value) if isinstance(value, list) else str(value)
    return text or "none"

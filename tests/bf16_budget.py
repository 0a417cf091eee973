#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Counts the instructions of the innermost loops that multiply in bfloat16, from a library's machine code.

    python tests/bf16_budget.py build/dev/libvimcore.a

For units that the machine at hand lacks, AMX above all, this is what can be known without them: how many
products a step has, and what else is issued beside them. Exit status: 0 within the budget, 1 beyond it, 2
if it could not be counted. Needs objdump. Budgets hold for gcc 12 and clang 14.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import NamedTuple

Instruction = tuple[int, str, str]  # address, name, operands


class Budget(NamedTuple):
    """Of one loop. `products` and `loads` exactly, of all instructions that many at most.

    A step of AMX: 32 x 32 sums over 32 numbers, four products of four tiles. One of pairs, unrolled twice:
    8 x 48 sums over 4 numbers, with 8 numbers broadcast and 3 vectors loaded for every 24 products.
    """

    function: str
    product: str
    products: int
    loads: int  # of tiles
    most: int


BUDGETS = (
    Budget(r"amx::gemm<vimcore::cpu::bf16>\(", "tdpbf16ps", 4, 4, 34),
    Budget(r"amx::gemm_tn<vimcore::cpu::bf16>\(", "tdpbf16ps", 4, 4, 34),
    Budget(r"avx512bf16::pair_tile<vimcore::cpu::bf16, 8, 3>\(", "vdpbf16ps", 48, 0, 92),
    Budget(r"avx512bf16::pair_tile<float, 8, 3>\(", "vdpbf16ps", 48, 0, 92),
)


class Failure(Exception):
    """Why nothing could be counted."""


def functions(library: str) -> dict[str, list[Instruction]]:
    """The instructions of every function with products, by its name."""
    tool = shutil.which("objdump")
    if tool is None:
        raise Failure("no objdump on the PATH (package binutils)")
    command = [tool, "--disassemble", "--demangle", "--no-show-raw-insn", library]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failure(done.stderr.strip() or f"objdump: status {done.returncode}")
    found: dict[str, list[Instruction]] = {}
    own: list[Instruction] = []
    for line in done.stdout.splitlines():
        if head := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            own = found.setdefault(head[1], [])
        elif code := re.match(r"\s+([0-9a-f]+):\t(\S+)\s*(.*)$", line):
            own.append((int(code[1], 16), code[2], code[3]))
    return {name: code for name, code in found.items() if any("dpbf16ps" in op for _, op, _ in code)}


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """What lies between a jump backwards and where it goes."""
    places = {address: i for i, (address, _, _) in enumerate(code)}
    found = []
    for i, (address, name, operands) in enumerate(code):
        target = re.match(r"[0-9a-f]+", operands) if name.startswith("j") else None
        begin = places.get(int(target[0], 16)) if target else None
        if begin is not None and code[begin][0] <= address:
            found.append(code[begin : i + 1])
    return found


def count(budget: Budget, code: list[Instruction]) -> tuple[str, bool]:
    """A line for the innermost loop with products, and whether it is within the budget."""

    def many(loop: list[Instruction], name: str) -> int:
        return sum(op == name for _, op, _ in loop)

    inner = min((loop for loop in loops(code) if many(loop, budget.product)), key=len, default=None)
    if inner is None:
        return f"no loop with {budget.product}", False
    products, loads = many(inner, budget.product), many(inner, "tileloadd")
    spilled = [i for i in inner if re.search(r"\(%rsp\)", i[2]) and re.search(r"%[xyzt]mm", i[2])]
    fits = (products, loads) == (budget.products, budget.loads) and len(inner) <= budget.most and not spilled
    text = f"{products} {budget.product} (budget {budget.products}), {loads} tile loads ({budget.loads})"
    return f"{text}, {len(inner)} instructions ({budget.most}), {len(spilled)} vectors on the stack (0)", fits


def main(arguments: list[str]) -> int:
    """The exit status."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        known, status = functions(arguments[0]), 0
    except Failure as failure:
        print(f"bf16_budget: {failure}", file=sys.stderr)
        return 2
    for budget in BUDGETS:
        names = [name for name in known if re.search(budget.function, name)]
        if len(names) != 1:
            print(f"bf16_budget: {arguments[0]}: no function {budget.function}", file=sys.stderr)
            return 2
        text, fits = count(budget, known[names[0]])
        print(f"{'' if fits else 'BEYOND '}{names[0].split('(')[0].removeprefix('void ')}: {text}")
        status |= not fits
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

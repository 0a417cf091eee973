"""Reads the log of a Ninja build with -Xptxas=-v: a table of registers and spills.

A tuned kernel that spills is a fault.

python tests/cuda/registers.py LOG [ARCHITECTURES]: with the number of architectures, a kernel that was not
compiled for all of them is a fault, too.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

# no kernel of these files may spill
TUNED = ("scan/forward_tuned", "scan/backward_tuned", "norm", "norm_backward", "conv1d", "conv1d_backward")
# ... but this one few bytes: it takes all registers there are, and N = 32 and unaligned tensors need more on
# some architectures. On sm_90, sass_backward.py sees to it that none are inside a recurrence.
FEW = "scan_backward_tuned<", 96

# What occupancy is reckoned with: kernels by file and pattern of their name, and most registers of a thread.
MOST = (
    ("conv1d", re.compile(r"conv_window<.*, 2>"), 96),  # 7 blocks of 96 threads on a multiprocessor
    ("scan/forward_tuned", re.compile(r"scan_tuned<.*, 16, 8, 32, true>"), 168),  # 6 blocks of 64
)


def demangled(names: list[str]) -> dict[str, str]:
    """Names of kernels without namespaces and arguments, as kernel<float, 4>."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    short = {}
    for name, line in zip(names, text.splitlines()):
        bare = (
            line.replace("(anonymous namespace)::", "").replace("vimcore::cuda::", "").removeprefix("void ")
        )
        short[name] = re.sub(r"\((?:int|unsigned int|bool)\)", "", bare).split("(")[0]
    return short


def read(log: str) -> dict[tuple[str, str], dict[str, tuple[int, int]]]:
    """(file, kernel) -> architecture -> registers, bytes of spills."""
    table: dict[tuple[str, str], dict[str, tuple[int, int]]] = defaultdict(dict)
    file, kernel, architecture, spills = "", "", "", 0
    for line in log.splitlines():
        if found := re.search(r"Building CUDA object .*/cuda/([\w/]+)\.cu\.o", line):
            file = found[1]
        elif found := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            kernel, architecture, spills = found[1], found[2], 0
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills += int(found[1]) + int(found[2])
        elif (found := re.search(r"Used (\d+) registers", line)) and kernel:
            table[file, kernel][architecture] = int(found[1]), spills
            kernel = ""
    return table


def barriers(log: str) -> dict[tuple[str, str], int]:
    """(kernel, architecture) -> barriers of a block, where there are several."""
    found: dict[tuple[str, str], int] = {}
    kernel = architecture = ""
    for line in log.splitlines():
        if begins := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            kernel, architecture = begins[1], begins[2]
        elif (used := re.search(r"used (\d+) barriers", line)) and used[1] not in ("0", "1"):
            found[kernel, architecture] = int(used[1])
    return found


def main(log: str, expected: int) -> int:
    table, several = read(Path(log).read_text()), barriers(Path(log).read_text())
    names = demangled([kernel for _, kernel in table])
    architectures = sorted({a for row in table.values() for a in row}, key=int)
    print("registers, + bytes of spills, / barriers of a block where more than one;")
    print("all blocks of a multiprocessor have 64 barriers on sm_90 and sm_100, 24 on sm_120")
    print(f"{'':64}", *(f"{'sm_' + a:>8}" for a in architectures))
    faults = []
    for (file, kernel), row in sorted(table.items(), key=lambda item: (item[0][0], names[item[0][1]])):
        label = f"{file}: {names[kernel]}"
        cells = [f"{r}+{s}" if s else str(r) for r, s in (row.get(a, (0, 0)) for a in architectures)]
        also = [several.get((kernel, a), 0) for a in architectures]
        cells = [f"{cell}/{b}" if b else cell for cell, b in zip(cells, also, strict=True)]
        print(f"{label:64}", *(f"{cell:>8}" for cell in cells))
        few = FEW[1] if names[kernel].startswith(FEW[0]) else 0
        spills = {a: s for a, (_, s) in row.items() if s > few and file in TUNED}
        faults += [f"{label} spills {s} bytes on sm_{a}" for a, s in spills.items()]
        if expected and len(row) != expected:
            faults.append(f"{label} was compiled for {len(row)} architectures, not for {expected}")
    for (file, kernel), row in table.items():
        for _, _, most in filter(lambda m: m[0] == file and m[1].search(names[kernel]), MOST):
            faults += [f"{names[kernel]}: more than {most} registers" for c in row.values() if c[0] > most]
    missing = [file for file in TUNED if file not in {file for file, _ in table}]
    faults += [f"the log has no kernel of cuda/{file}.cu" for file in missing]
    print(*faults, f"{len(table)} kernels, {len(faults)} faults", sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0))

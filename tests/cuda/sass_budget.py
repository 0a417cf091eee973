# SPDX-License-Identifier: Apache-2.0
"""Counts what the recurrence of the tuned scan costs on sm_90, from its machine code, against a budget.

    python tests/cuda/sass_budget.py OBJECT_OR_CUBIN... [--json FILE]
    python tests/cuda/sass_budget.py --nvcc PATH [--json FILE]      compiles cuda/scan/*_tuned.cu itself

The scan is bound by the exp unit and by instruction issue, and both can be read off without a GPU.
The recurrence of a kernel is its straight run of instructions with the most MUFU.EX2 and no other MUFU. Of
the forward scan for large grids everything is counted, too (sass_tile.py), in 16-bit types.
Of the backward scan everything is counted (sass_backward.py), with checkpoints every 64 tokens, as training
of the lean kind has them.
Counts are per token of a warp and per token of 32 channels. A quarter of a multiprocessor issues one
instruction per clock, and one MUFU per 8 clocks.
Exit status: 0 within the budget, 1 beyond it, 2 if it could not be counted. Needs cuobjdump: on the PATH
(CUDA toolkit), or in the triton wheel.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import sass_backward
import sass_tile

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = "sm_90"
SOURCES = ("forward_tuned", "backward_tuned")
KERNEL = re.compile(r"TunedShapeI(f|6__half|13__nv_bfloat16)Li(\d+)ELi(\d+)ELi(\d+)ELi(\d+)E")
BACKWARD = re.compile(r"scan_backward_tuned.*BackShapeI(f|6__half|13__nv_bfloat16)Li(\d+)ELb1E")
TYPES = {"f": "f32", "6__half": "f16", "13__nv_bfloat16": "bf16"}
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
BRANCH = re.compile(r"\b(?:BRA|CALL|RET|EXIT|BSYNC|BREAK|BRX|JMP)\b")
TARGET = re.compile(r"\b(?:BRA|BSSY|CALL)\b.*?0x([0-9a-f]+)")

# (states, channels, states per thread): most issue slots, MUFU.EX2, shared loads, shared stores and shuffles
# per token of 32 channels. EX2 is one per state; 80 slots are the arithmetic of 16 states: two products, EX2,
# two multiply-adds. Of one state per thread it is the part before the sums over states.
BUDGET: dict[tuple[int, int, int], dict[str, float]] = {
    (16, 2, 16): {"issue": 89, "ex2": 16, "lds": 4.5, "sts": 0.25, "shfl": 0},
    (16, 2, 8): {"issue": 96, "ex2": 16, "lds": 5, "sts": 0.25, "shfl": 1},
    (16, 1, 4): {"issue": 114, "ex2": 16, "lds": 10, "sts": 1, "shfl": 3},
    (16, 1, 1): {"issue": 104, "ex2": 16, "lds": 12, "sts": 16, "shfl": 0},
    (8, 1, 8): {"issue": 49, "ex2": 8, "lds": 4.5, "sts": 0.25, "shfl": 0},
    (32, 2, 8): {"issue": 196, "ex2": 32, "lds": 10, "sts": 0.5, "shfl": 3},
    (64, 2, 8): {"issue": 402, "ex2": 64, "lds": 20, "sts": 1, "shfl": 7},
}

# Everything that the forward scan with 16 states in a thread does for a token of 32 channels at a rank below
# 16, by type: issue slots, and the clocks of its MUFU at 8 each: 16 exponentials of states, one of softplus,
# and half of two for the gate, which both directions share.
WHOLE = (16, 2, 16)
WHOLE_BUDGET: dict[str, dict[str, float]] = {
    "bf16": {"whole issue": 128, "MUFU clocks": 144},
    "f16": {"whole issue": 131, "MUFU clocks": 144},
}

# states: the same for the backward scan with aligned tensors, everything included, of bfloat16; "exact" more
# slots for types whose sums over channels are exact. EX2 is 1.94 per state, one for delta, 3 for slope and
# gates; 272 slots are the arithmetic of 16 states: 13 each for the walk, 4 for the run.
BACKWARD_BUDGET: dict[int, dict[str, float]] = {
    8: {"issue": 372, "ex2": 20, "lds": 20, "sts": 10, "shfl": 1, "exact": 24},
    16: {"issue": 520, "ex2": 36, "lds": 22, "sts": 10, "shfl": 1, "exact": 34},
    32: {"issue": 1000, "ex2": 68, "lds": 50, "sts": 22, "shfl": 2, "exact": 120},
}


class Failure(Exception):
    """What keeps the counts from being made."""


@dataclass
class Count:
    kernel: str
    tokens: int  # of one run
    warp_token_issue: float
    issue: float  # from here on per token of 32 channels
    ex2: float
    lds: float
    sts: float
    shfl: float
    code: int  # instructions of the whole kernel
    beyond: list[str]
    whole: dict[str, float] = field(default_factory=dict)


def disassembler() -> str:
    found = shutil.which("cuobjdump")
    if found:
        return found
    spec = importlib.util.find_spec("triton")
    for place in spec.submodule_search_locations or [] if spec else []:
        tool = Path(place) / "backends" / "nvidia" / "bin" / "cuobjdump"
        if tool.exists():
            return str(tool)
    raise Failure("no cuobjdump: put that of a CUDA toolkit on the PATH, or pip install triton")


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failure(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def compile_scan(nvcc: str, folder: str, name: str) -> str:
    cubin = str(Path(folder) / f"{name}.cubin")
    include = [f"-I{ROOT / path}" for path in ("cpp/include", "cpp/src", "cuda")]
    source = str(ROOT / "cuda" / "scan" / f"{name}.cu")
    run([nvcc, "-cubin", f"-arch={ARCHITECTURE}", "-std=c++20", "-O3", *include, source, "-o", cubin])
    return cubin


def functions(listing: str) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Name and (address, instruction) of every function."""
    for part in re.split(r"Function : ", listing)[1:]:
        name, _, body = part.partition("\n")
        yield name.strip(), [(int(address, 16), text) for address, text in INSTRUCTION.findall(body)]


def straight_runs(code: list[tuple[int, str]]) -> Iterator[list[str]]:
    targets = {int(match.group(1), 16) for _, text in code if (match := TARGET.search(text))}
    current: list[str] = []
    for address, text in code:
        if address in targets and current:
            yield current
            current = []
        current.append(text)
        if BRANCH.search(text):
            yield current
            current = []
    if current:
        yield current


def operation(text: str) -> str:
    return re.sub(r"^@!?\S+\s+", "", text).split()[0]


def recurrences(code: list[tuple[int, str]]) -> list[list[str]]:
    """Operations of the straight runs with MUFU.EX2 and no other MUFU, those with the most of them first."""
    runs = [[operation(text) for text in run_] for run_ in straight_runs(code)]
    special = [[name for name in run_ if name.startswith("MUFU")] for run_ in runs]
    found = [run_ for run_, mufu in zip(runs, special) if mufu and all(name == "MUFU.EX2" for name in mufu)]
    found = [[name.split(".")[0] for name in run_] for run_ in found]
    return sorted(found, key=lambda run_: -run_.count("MUFU"))


def count(kernel: tuple[str, int, int, int], code: list[tuple[int, str]]) -> Count:
    dtype, states, channels, per_thread = kernel
    name = f"{dtype} N {states} C {channels} S {per_thread}"
    operations = next(iter(recurrences(code)), [])
    tokens, rest = divmod(operations.count("MUFU"), channels * per_thread)
    if tokens == 0 or rest:
        raise Failure(f"{name}: found no recurrence with a multiple of {channels * per_thread} MUFU.EX2")
    channels_of_warp = 32 * channels * per_thread // states
    factor = 32 / channels_of_warp / tokens
    result = Count(
        kernel=name,
        tokens=tokens,
        warp_token_issue=len(operations) / tokens,
        issue=len(operations) * factor,
        ex2=operations.count("MUFU") * factor,
        lds=operations.count("LDS") * factor,
        sts=operations.count("STS") * factor,
        shfl=operations.count("SHFL") * factor,
        code=len(code),
        beyond=[],
    )
    budget = BUDGET.get((states, channels, per_thread))
    if budget is None:
        raise Failure(f"{name}: has no budget")
    values = asdict(result)
    result.beyond = [
        f"{key} {values[key]:g} > {most:g}" for key, most in budget.items() if most < values[key]
    ]
    if (states, channels, per_thread) == WHOLE and dtype in WHOLE_BUDGET:
        add_whole(result, dtype, code)
    return result


def add_whole(result: Count, dtype: str, code: list[tuple[int, str]]) -> None:
    tokens, channels = 8, 64
    try:
        tile = sass_tile.tile(code, channels, WHOLE[0], tokens)
    except sass_tile.NoPath as failure:
        raise Failure(f"{result.kernel}: {failure}") from failure
    factor = 32 / channels / tokens
    result.whole = {"whole issue": tile.issue * factor, "MUFU clocks": 8 * tile.special * factor}
    result.beyond += [
        f"{key} {result.whole[key]:g} > {most:g}"
        for key, most in WHOLE_BUDGET[dtype].items()
        if most < result.whole[key]
    ]


def count_backward(dtype: str, states: int, code: list[tuple[int, str]]) -> Count:
    name = f"{dtype} N {states} back"
    tokens, channels_of_warp = 16, 16 if states == 32 else 32
    try:
        tile = sass_backward.tile(code)
    except sass_backward.NotFound as failure:
        raise Failure(f"{name}: {failure}") from failure
    factor = 32 / channels_of_warp / tokens
    names = {"ex2": "MUFU.EX2", "lds": "LDS", "sts": "STS", "shfl": "SHFL"}
    values = {"issue": sum(tile.values()) * factor} | {key: tile[n] * factor for key, n in names.items()}
    result = Count(
        kernel=name,
        tokens=tokens,
        warp_token_issue=values["issue"] * channels_of_warp / 32,
        **values,
        code=len(code),
        beyond=[],
    )
    budget = budget_of(name)
    result.beyond = [
        f"{key} {value:g} > {budget[key]:g}" for key, value in values.items() if value > budget[key]
    ]
    return result


def budget_of(kernel: str) -> dict[str, float]:
    if kernel.endswith("back"):
        budget = dict(BACKWARD_BUDGET[int(kernel.split()[2])])
        exact = budget.pop("exact")
        budget["issue"] += exact if not kernel.startswith("bf16") else 0
        return budget
    _, _, states, _, channels, _, per_thread = kernel.split()
    return BUDGET[int(states), int(channels), int(per_thread)]


def report(counts: list[Count]) -> None:
    keys = ("issue", "ex2", "lds", "sts", "shfl")
    print(f"{'':<18} {'warp-token':>10} | per token of 32 channels, with its budget")
    print(f"{'kernel':<18} {'issue':>10} |" + "".join(f"{key:>13}" for key in keys) + "  exp clocks  code")
    for c in counts:
        budget = budget_of(c.kernel)
        values = asdict(c)
        cells = "".join(f"{f'{values[key]:g} / {budget[key]:g}':>13}" for key in keys)
        print(f"{c.kernel:<18} {c.warp_token_issue:>10.2f} |{cells} {8 * c.ex2:>11g} {c.code:>5}")
        if c.whole:
            both = WHOLE_BUDGET[c.kernel.split()[0]]
            print("    " + ", ".join(f"{key} {value:g} / {both[key]:g}" for key, value in c.whole.items()))
        if c.beyond:
            print(f"    beyond the budget: {', '.join(c.beyond)}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Instruction counts of the tuned scan against their budget.")
    parser.add_argument("files", nargs="*", help="object files or cubins of cuda/scan/*_tuned.cu for sm_90")
    parser.add_argument("--nvcc", help="compile cuda/scan/*_tuned.cu with this compiler")
    parser.add_argument("--json", help="also write the counts here")
    args = parser.parse_args()
    if bool(args.files) == (args.nvcc is not None):
        parser.error("give either files or --nvcc")
    try:
        tool = disassembler()
        with tempfile.TemporaryDirectory() as folder:
            files = args.files or [compile_scan(args.nvcc, folder, name) for name in SOURCES]
            listing = "".join(run([tool, "-sass", "-arch", ARCHITECTURE, file]) for file in files)
        counts = []
        for name, code in functions(listing):
            if match := KERNEL.search(name):
                dtype, states, channels, per_thread = match.groups()[:4]
                counts.append(count((TYPES[dtype], int(states), int(channels), int(per_thread)), code))
            elif match := BACKWARD.search(name):
                counts.append(count_backward(TYPES[match[1]], int(match[2]), code))
        found = [budget_of(c.kernel) for c in counts]
        missing = [key for key, budget in BUDGET.items() if budget not in found]
        missing += [(key,) for key in BACKWARD_BUDGET if budget_of(f"bf16 N {key} back") not in found]
        if missing:
            raise Failure(
                f"no {ARCHITECTURE} code of the scan with (N, C, S), backward (N), = {sorted(missing)}"
            )
    except Failure as failure:
        print(f"sass_budget: {failure}", file=sys.stderr)
        return 2
    counts.sort(key=lambda c: c.kernel)
    report(counts)
    if args.json:
        Path(args.json).write_text(json.dumps([asdict(c) for c in counts], indent=1) + "\n")
    return 1 if any(c.beyond for c in counts) else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""Counts all that a warp of the tuned backward scan issues for a tile, from its machine code.

For sass_budget.py. Counted is the loop over tiles, with checkpoints every 64 tokens (four tiles: lean) and a
rank of at most 16: every fourth tile begins a chunk, whose four tiles are run through but for the last step;
the others load again what the run left; half of the tiles are gated here, the other half by the other
direction.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

JUMP = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
CHUNK, STEPS = 4, 4  # tiles of a chunk, steps of a tile
Code = list[tuple[int, str]]  # address, instruction


class NotFound(Exception):
    """The machine code is not as this file expects."""


@dataclass
class Region:
    begin: int
    end: int  # the address behind it

    def holds(self, address: int) -> bool:
        return self.begin <= address < self.end


def kind(text: str) -> str:
    name = re.sub(r"^@!?\S+\s+", "", text).split()[0]
    return ".".join(name.split(".")[:2]) if name.startswith("MUFU") else name.split(".")[0]


def tile(code: Code) -> Counter[str]:
    """Instructions of a warp for a tile, by kind; a mean over the tiles of a long sequence."""
    last = max(address for address, text in code if "EXIT" in text)
    code = [
        (address, text) for address, text in code if address <= last
    ]  # what is behind it returns to the middle
    jumps = [(a, int(m[1], 16), text) for a, text in code if (m := JUMP.search(text)) and "DIV" not in text]
    loops = [Region(target, a + 16) for a, target, _ in jumps if target < a]
    skips = [Region(a + 16, target) for a, target, text in jumps if target > a and text.startswith("@")]
    kinds = {address: kind(text) for address, text in code}

    def count(region: Region, name: str) -> int:
        return sum(found == name for address, found in kinds.items() if region.holds(address))

    def smallest(regions: list[Region], what: str) -> Region:
        if not regions:
            raise NotFound(f"no {what}")
        return min(regions, key=lambda r: r.end - r.begin)

    def around(inner: Region, what: str) -> Region:
        return smallest([r for r in loops if r.begin < inner.begin and r.end > inner.end], what)

    walk = smallest([r for r in loops if count(r, "HMMA") >= 32 and count(r, "MUFU.EX2") >= 32], "walk")
    main = around(walk, "loop over tiles")
    inside = [r for r in loops if r.begin > main.begin and r.end < walk.begin]
    states = [r for r in inside if count(r, "MUFU.EX2") >= 32 and not count(r, "HMMA")]
    run = smallest(states, "run")
    chunk = around(run, "loop over a chunk")
    core = smallest(
        [r for r in skips if run.begin < r.begin < run.end and count(r, "MUFU.EX2")], "step of a run"
    )
    again = smallest(
        [r for r in skips if chunk.end <= r.begin < walk.begin and count(r, "STS") >= 6], "reload"
    )
    gate = smallest([r for r in skips if r.begin >= walk.end and count(r, "MUFU.RCP") >= 8], "gate")
    prologue = Region(main.begin, chunk.begin)
    if any(count(recurrence, name) for recurrence in (walk, run) for name in ("LDL", "STL")):
        raise NotFound("no recurrence without spills")

    times: Counter[str] = Counter()
    for address, found in kinds.items():
        if not main.holds(address) or found == "NOP":
            continue
        weight = 1.0
        if prologue.holds(address):
            weight = 1 / CHUNK
        elif run.holds(address):
            weight = STEPS - 1 / CHUNK if core.holds(address) else STEPS
        elif again.holds(address):
            weight = 1 - 1 / CHUNK
        elif walk.holds(address):
            weight = STEPS
        elif gate.holds(address):
            weight = 0.5
        times[found] += weight
    return times

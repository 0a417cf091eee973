# SPDX-License-Identifier: Apache-2.0
"""Counts all that a warp of the forward scan issues for a tile, from its machine code, for sass_budget.py.

A path through the loop over tiles is the cheapest one that copies the next tile in, computes this one,
stores it, and converts the next one: in a direction that comes first to its tiles, and in one that comes
second, which also adds and gates. The mean of both is what a token costs. Inner loops but the recurrence are
skipped where they can be: they are for longer rows than those of 16 states and a rank below 16, or for the
one tile where the directions meet.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

JUMP = re.compile(r"\b(?:BRA|EXIT|RET|BRX|JMP|CALL)\b")
TARGET = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
Code = list[tuple[int, str]]  # address, instruction


@dataclass
class Block:
    start: int
    size: int = 0
    operations: Counter[str] = field(default_factory=Counter)
    next: list[int] = field(default_factory=list)


@dataclass
class Tile:
    """Of a warp, per tile; mean of both kinds of directions."""

    issue: float
    special: float  # MUFU


class NoPath(Exception):
    """The machine code is not as this file expects."""


def kind(text: str) -> str:
    name = re.sub(r"^@!?\S+\s+", "", text).split()[0]
    return ".".join(name.split(".")[:2]) if name.startswith("MUFU") else name.split(".")[0]


def blocks_of(code: Code) -> dict[int, Block]:
    starts = {code[0][0]}
    for (_, text), (after, _) in zip(code, [*code[1:], (-1, "")]):
        if match := TARGET.search(text):
            starts.add(int(match[1], 16))
        if JUMP.search(text):
            starts.add(after)
    blocks: dict[int, Block] = {}
    block = Block(code[0][0])
    for (address, text), (after, _) in zip(code, [*code[1:], (-1, "")]):
        block = blocks.setdefault(address, Block(address)) if address in starts else block
        block.size += 1
        block.operations[kind(text)] += 1
        if match := TARGET.search(text):
            block.next.append(int(match[1], 16))
        ends = JUMP.search(text) is not None and not text.startswith("@")
        if after in starts and not ends and after >= 0:
            block.next.append(after)
    return blocks


def loop_around(blocks: dict[int, Block], inside: int) -> tuple[int, int]:
    """First and last block of the smallest loop around the block at `inside`, which is a loop itself."""
    loops = [(target, b.start) for b in blocks.values() for target in b.next if target <= b.start]
    around = [(head, end) for head, end in loops if head < inside < end]
    if not around:
        raise NoPath("no loop around the recurrence")
    return min(around, key=lambda loop: loop[1] - loop[0])


def cheapest(
    blocks: dict[int, Block], loop: tuple[int, int], core: int, trips: int, needed: Counter[str]
) -> Block:
    """The cheapest path from the loop's head to its end with the needed operations, as one block."""
    head, end = loop
    names = sorted(needed)

    def gain(block: Block, so_far: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(min(have + block.operations[n], needed[n]) for n, have in zip(names, so_far))

    best: dict[int, dict[tuple[int, ...], Block]] = {head: {}}
    first = blocks[head]
    best[head][gain(first, (0,) * len(names))] = Block(head, first.size, first.operations.copy())
    for start in sorted(a for a in blocks if head <= a <= end):
        for state, path in best.get(start, {}).items():
            for after in blocks[start].next:
                if not start < after <= end:
                    continue
                block = blocks[after]
                times = trips if after == core else 1
                size = path.size + times * block.size
                found = best.setdefault(after, {})
                reached = gain(block, state)
                if reached not in found or size < found[reached].size:
                    more = Counter({name: times * n for name, n in block.operations.items()})
                    found[reached] = Block(after, size, path.operations + more)
    complete = tuple(needed[n] for n in names)
    if complete not in best.get(end, {}):
        raise NoPath(f"no path with {dict(needed)}")
    return best[end][complete]


def tile(code: Code, channels: int, states: int, tokens: int) -> Tile:
    """Of a warp with `channels` channels of so many states in registers of a thread, for `tokens` tokens."""
    blocks = blocks_of(code)
    core = max(blocks, key=lambda a: blocks[a].operations["MUFU.EX2"])
    trips, rest = divmod(tokens * channels * states, 32 * blocks[core].operations["MUFU.EX2"])
    if rest:
        raise NoPath("the recurrence does not divide a tile")
    loop = loop_around(blocks, core)
    inside = [b for a, b in blocks.items() if loop[0] <= a <= loop[1] and a not in b.next]
    outputs = channels * tokens // 32  # of a lane
    copies = sum(b.operations["LDGSTS"] for b in inside)
    common = Counter(
        {"MUFU.EX2": blocks[core].operations["MUFU.EX2"] + outputs, "LDGSTS": copies, "STG": outputs // 4}
    )
    # by the delta, the recurrence and the conversion
    common["STS"] = sum(b.operations["STS"] for b in inside) + blocks[core].operations["STS"]
    gated = common + Counter({"MUFU.EX2": outputs, "MUFU.RCP": outputs})
    paths = [cheapest(blocks, loop, core, trips, needed) for needed in (common, gated)]
    issue = sum(p.size for p in paths) / 2
    special = sum(n for p in paths for name, n in p.operations.items() if name.startswith("MUFU")) / 2
    return Tile(issue, special)

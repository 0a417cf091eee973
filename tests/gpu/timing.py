# SPDX-License-Identifier: Apache-2.0
"""Timing by CUDA events in interleaved rounds, CUDA graphs, and memory; wall-clock time on the CPU.

A side is a list of calls, one per set of buffers; a sample runs them all, so that no call finds its inputs in
the cache because the one before left them there. With a graph, a sample is one replay of all of them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch

Call = Callable[[], Any]


class Device:
    """Where the benchmark runs: "cuda", or "cpu" to try it out."""

    def __init__(self, name: str) -> None:
        self.torch = torch.device(name)
        self.cuda = self.torch.type == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Call) -> float:
        """Seconds of one call on the device."""
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        call()
        after.record()
        after.synchronize()
        return 1e-3 * float(before.elapsed_time(after))

    def repeats(self, call: Call) -> int:
        """How often to repeat a call in one sample: for 3 ms, so that the clock and the events are steady."""
        if not self.cuda:
            return 1
        self.seconds(call)
        return max(1, min(100, int(3e-3 / self.seconds(call))))

    def latency(self, call: Call) -> float:
        """Seconds from the start of one call to its end, host side included."""
        self.synchronize()
        begin = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - begin

    def cache_bytes(self) -> int:
        """Bytes that inputs must exceed to come from memory."""
        if not self.cuda:
            return 0
        return int(torch.cuda.get_device_properties(self.torch).L2_cache_size)

    def release(self) -> None:
        """Gives memory that nothing uses back to the device."""
        from vimcore import _core

        gc.collect()
        self.synchronize()
        _core.release_memory()
        if self.cuda:
            torch.cuda.empty_cache()

    def memory(self, call: Call) -> int | None:
        """Bytes of device memory taken for one call, by any allocator; weights and inputs are not counted.

        None where nothing was seen: without a device, or where the call lived on what was taken before it.
        """
        if not self.cuda:
            return None
        self.release()
        free = torch.cuda.mem_get_info()[0]
        result = call()
        self.synchronize()
        taken = free - torch.cuda.mem_get_info()[0]
        del result
        return int(taken) if taken > 0 else None


def sequence(calls: Sequence[Call]) -> Call:
    """All of them, one after the other."""

    def run() -> None:
        for call in calls:
            call()

    return run


def captured(calls: Sequence[Call], device: Device) -> Call:
    """A replay of the calls as one CUDA graph; on the CPU the calls themselves."""
    run = sequence(calls)
    if not device.cuda:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up where the capture will run
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    device.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def interleave(
    sides: Mapping[str, Call], measure: Callable[[Call], float], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Samples of every side in turn: at most `rounds` each, at least one, within `seconds` if it can be."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for call in sides.values():
        measure(call)
    begin = time.perf_counter()
    for _ in range(rounds):
        for name, call in sides.items():
            found[name].append(measure(call))
        if time.perf_counter() - begin > seconds:
            break
    return found


def summary(found: Mapping[str, list[float]]) -> dict[str, Any]:
    """Per side the median seconds and, against the first side, the median ratio of the rounds."""
    first = next(iter(found.values()))
    row: dict[str, Any] = {"rounds": len(first), "seconds": {}, "ratio": {}, "spread": {}}
    for name, samples in found.items():
        ordered = sorted(samples)
        low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
        row["seconds"][name] = median(samples)
        row["spread"][name] = (high - low) / median(samples)  # between the quartiles
        row["ratio"][name] = median(a / b for a, b in zip(samples, first, strict=True))
    return row

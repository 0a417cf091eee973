# SPDX-License-Identifier: Apache-2.0
"""The least time that a scan, a block or a model can take on a device, from rates that were measured on it.

    exp       of the scan: N of the decay, 2 of softplus and 1 (half of the gate's 2) for each token, channel
              and direction, against the rate of the exp unit; of its gradient 2 N, 2 of softplus, 2 of gates
    issue     instructions of the scan, each of a warp for 32 channels: the tuned kernel takes about 7 a state
              and 28 for the rest, its gradient 32 a state, the rest in it; against the rate of
              multiply-adds / 32
    memory    every input read once and every output written once, against the bandwidth of a copy
    matrix    multiply-adds of the projections against the rate of a large matrix product

Within a stage the largest of them counts; the stages of a block run after one another: norm, projections,
convolution, scan. Stem and head are left out of the model. Sizes: L tokens, D width, E inner width, N state,
R rank; s bytes of an activation, 4 of the residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ISSUE_PER_STATE, ISSUE_OTHER = 7.0, 28.0
ISSUE_PER_STATE_BACKWARD = 32.0


@dataclass
class Rates:
    """Per second: exponentials, warp instructions, bytes copied, flops of a matrix product in each type."""

    exp: float
    issue: float
    memory: float
    matrix: dict[str, float]

    @staticmethod
    def of(measured: dict[str, Any]) -> Rates:
        """From what `rates.cu` prints and the matrix products that the benchmark adds."""
        matrix = {k.removeprefix("matmul_"): float(v) for k, v in measured.items() if k.startswith("matmul_")}
        ffma, exp = float(measured["ffma_per_s"]), float(measured["ex2_per_s"])
        return Rates(exp, ffma / 32, float(measured["copy_bytes_per_s"]), matrix)


@dataclass
class Sizes:
    """Of one block."""

    batch: int
    tokens: int
    width: int
    state: int = 16

    @property
    def inner(self) -> int:
        return 2 * self.width

    @property
    def rank(self) -> int:
        return -(-self.width // 16)

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


def scan(rates: Rates, sizes: Sizes, item: int) -> dict[str, float]:
    """Seconds of both directions by unit; item: bytes of an activation."""
    elements = 2.0 * sizes.rows * sizes.inner
    moved = (
        sizes.rows * item * (4 * sizes.inner + 2 * (sizes.rank + 2 * sizes.state))
    )  # u twice, z, out, q twice
    return {
        "exp": elements * (sizes.state + 3) / rates.exp,
        "issue": elements / 32 * (ISSUE_PER_STATE * sizes.state + ISSUE_OTHER) / rates.issue,
        "memory": moved / rates.memory,
    }


def scan_backward(rates: Rates, sizes: Sizes, item: int, chunk: int = 64) -> dict[str, float]:
    """Seconds of the gradients of both directions by unit, states kept every `chunk` tokens."""
    elements = 2.0 * sizes.rows * sizes.inner
    activations = 8 * sizes.inner + 4 * (sizes.rank + 2 * sizes.state)  # u, du, q, dq twice, z, dz, out, dout
    states = 2 * sizes.inner * sizes.state * 4 / chunk
    return {
        "exp": elements * (2 * sizes.state + 4) / rates.exp,
        "issue": elements / 32 * ISSUE_PER_STATE_BACKWARD * sizes.state / rates.issue,
        "memory": sizes.rows * (item * activations + states) / rates.memory,
    }


def block(rates: Rates, sizes: Sizes, item: int, dtype: str) -> dict[str, float]:
    """Seconds of each stage, the largest of its units."""
    d, e, q = sizes.width, sizes.inner, sizes.rank + 2 * sizes.state
    flops = 2.0 * sizes.rows * (3 * d * e + 2 * e * (q + sizes.rank))
    moved = sizes.rows * item * (2 * d + 5 * e + 2 * q)  # in_proj D -> 2E, x_proj 2 (E -> q), out_proj E -> D
    return {
        "norm": sizes.rows * d * (8 + 2 * item) / rates.memory,
        "projections": max(flops / rates.matrix[dtype], moved / rates.memory),
        "convolution": sizes.rows * 3 * e * item / rates.memory,
        "scan": max(scan(rates, sizes, item).values()),
    }


def model(rates: Rates, sizes: Sizes, item: int, dtype: str, depth: int = 24) -> float:
    """Seconds of all blocks."""
    return depth * sum(block(rates, sizes, item, dtype).values())

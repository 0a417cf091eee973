# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of both devices share: options, report, and the call that is timed."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ...utils.machine import cpu_name, version_of

Call = Callable[[], Any]

PEERS = ("torch", "torch-materialised", "openvino", "onnxruntime", "vim-torch", "vimcore-float32")
USUAL_PEERS = ("torch", "openvino", "onnxruntime", "vim-torch")
NECKS = ("none", "simple")
_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "DNNL_", "ONEDNN_", "TORCH_", "ATEN_", "VIMCORE_")


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        model: a key of `config.WIDTHS`.
        sizes: image sides in pixels.
        batch: batch sizes.
        train: forward and backward with a cross-entropy loss, instead of the forward pass alone.
        device: "cpu", "cuda" or "cuda:N".
        dtype: of activations; of peers in torch also of the weights.
        memory: what backward keeps, as for `VisionMamba`.
        threads: on the CPU, for both sides.
        peers: some of PEERS; "torch-materialised" is the transformer with its attention matrices in memory,
            "vimcore-float32" our own network in float32 beside 16 bits on the CPU.
        neck: "simple": the last map and ViTDet's feature pyramid instead of a classifier's head, for both.
        peak_memory: also measure the peak memory of a call, in processes of their own.
        peers_dir: folder of their sources; None: tests/bench of a checkout.
        pairs: of samples (ours, peer) for each figure.
        seconds: no new pair of a figure after this long.
        sample: seconds of calls that make one sample.
        pause: seconds of rest before each sample.
        table: where the rows of the table are printed.
    """

    model: str = "vim_tiny"
    sizes: Sequence[int] = (224, 512, 1248)
    batch: Sequence[int] = (1, 8)
    train: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    memory: str = "lean"
    threads: int = 2
    peers: Sequence[str] = USUAL_PEERS
    neck: str = "none"
    peak_memory: bool = False
    peers_dir: Path | None = None
    pairs: int = 15
    seconds: float = 60.0
    sample: float = 0.1
    pause: float = 0.03
    table: TextIO = field(default_factory=lambda: sys.stdout)


def machine() -> dict[str, Any]:
    """Processor, number of cores, system, and the variables that were set for threads and kernels."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "environment": environment(),
    }


def environment() -> dict[str, str]:
    """What is set of the variables that change how peers or vimcore compute, as OMP_WAIT_POLICY."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}


def versions() -> dict[str, str]:
    """Of Python, of this library and of the peers that are installed."""
    import vimcore

    installed = {name: version_of(name) for name in ("torch", "openvino", "onnxruntime")}
    known = {name: version for name, version in installed.items() if version is not None}
    return {"python": platform.python_version(), "vimcore": vimcore.__version__, **known}


def table_line(cells: Sequence[str], header: Sequence[str]) -> str:
    """A row of the table, its cells below their titles."""
    return "  ".join(cell.rjust(len(title)) for cell, title in zip(cells, header, strict=True))


def training_call(model: Any, images: Any, targets: Any) -> Call:
    """Forward and backward of the cross-entropy with `targets` (B)."""
    from torch.nn.functional import cross_entropy

    model.train()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        cross_entropy(model(images), targets).backward()

    return step


def forward_call(model: Any, images: Any) -> Call:
    """Forward in eval mode, without gradients."""
    import torch

    model.eval()

    def forward() -> Any:
        with torch.no_grad():
            return model(images)

    return forward

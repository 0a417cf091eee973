# SPDX-License-Identifier: Apache-2.0
"""`doctor` and `bench` on CUDA without a GPU (shim.py)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shim
import torch
import vimcore
import vimcore.tools.selftest.gradients
from helpers import SMALL
from vimcore_shim.cli import bench
from vimcore_shim.tools.bench import Options
from vimcore_shim.tools.bench import cuda as bench_cuda
from vimcore_shim.tools.selftest import gradients, kernels

SLOW_PRODUCTS = """
import warnings
import shim
from helpers import SMALL, build, images_for, small
from shim import twin, vimcore_shim
import pytest, torch

with pytest.MonkeyPatch.context() as patch, torch.no_grad():
    shim.pretend(patch)
    model, images = twin(build(small(num_classes=13)).eval()), images_for(SMALL, 2, torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            model(images)
    print([str(w.message) for w in caught])
    print(vimcore_shim._core.cuda_products())
    print(vimcore_shim._core.cuda_description(0))
"""


@pytest.mark.slow
def test_a_product_without_an_algorithm_is_told() -> None:
    """The stand-in for cuBLASLt has none for 13 columns: one warning, and a count that `doctor` shows."""
    library = Path(shim.BUILD).parent / "tests/cuda/libfake_cublaslt.so"
    environment = {**os.environ, "VIMCORE_CUBLASLT": str(library)}
    done = subprocess.run(
        [sys.executable, "-c", SLOW_PRODUCTS],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    warned, counted, described = done.stdout.splitlines()
    assert warned.count("cuBLASLt has no algorithm for a product of matrices (m 2, n 13, k ") == 1
    assert "'built_in': 2" in counted
    assert "but 2 products by slow built-in kernels, the first m 2, n 13, k" in described


@pytest.mark.slow
def test_doctor_compares_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    deep = {**SMALL.arguments(), "depth": 12}
    monkeypatch.setattr(kernels, "GPU_TESTS", [kernels.SELF_TEST, deep])
    rows = kernels.check_cuda(np.random.default_rng(0))
    assert [(row["check"], row["status"]) for row in rows] == [
        ("cuda:0 float32", "ok"),
        ("cuda:0 bfloat16", "ok"),
        ("cuda:0 float16", "ok"),
    ]
    assert all("CPU shim" in row["detail"] for row in rows)
    monkeypatch.setattr(kernels, "GPU_TOLERANCE", {"bfloat16": 1e-5})
    assert [row["status"] for row in kernels.check_cuda(np.random.default_rng(0))] == ["failed"]


def test_doctor_compares_the_gradients(training: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> dict[str, dict[str, Any]]:
        rng = np.random.default_rng(0)
        found = gradients.check_cuda(
            [kernels.SELF_TEST, {**SMALL.arguments(), "depth": 3}],
            kernels.random_weights,
            rng,
            "cpu",  # where tensors pass for tensors on the device
            vimcore.tools.selftest.gradients.Loss,
        )
        return {row["check"]: row for row in found}

    found = rows()
    assert [(name, row["status"]) for name, row in found.items()] == [
        ("gradients cpu float32", "ok"),
        ("gradients cpu bfloat16", "ok"),
        ("gradients cpu float16", "ok"),
    ]
    assert found["gradients cpu float32"]["error"] > 1e-8
    assert found["gradients cpu bfloat16"]["error"] > 1e-4  # 16-bit kernels ran
    monkeypatch.setattr(gradients, "GPU_TOLERANCE", {"bfloat16": 1e-5})
    (row,) = rows().values()
    assert row["status"] == "failed"
    assert re.search(r"^\S+ of network [01]: error .* against the CPU is above", row["detail"])


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True])
def test_bench_rows(train: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The arithmetic of the report, with a clock that ticks 2 ms for ours and 8 ms for the peer."""
    ticks = iter([0.002, 0.008] * 100)
    monkeypatch.setattr(bench_cuda, "event_seconds", lambda call, count: next(ticks))
    monkeypatch.setattr(bench_cuda, "calls_for", lambda call, seconds: 1)
    monkeypatch.setattr(bench_cuda, "latency", lambda call: 0.003)
    monkeypatch.setattr(bench_cuda, "graphed", lambda call: call)
    options = Options(dtype="bfloat16", pairs=3, peers=["torch", "openvino"], train=train)
    skipped: dict[str, str] = {}
    peers = Path(__file__).resolve().parents[1] / "bench"
    rows = bench_cuda.measure(options, 32, 4, peers, skipped)
    assert skipped == {"openvino": "runs on the CPU"}
    assert [row["graph"] for row in rows] == [False, True]
    for row in rows:
        assert (row["peer"], row["pairs"], row["size"], row["batch"]) == ("torch", 3, 32, 4)
        assert row["mode"] == ("train" if train else "forward")
        assert row["images_per_s"] == pytest.approx(2000)
        assert row["peer_images_per_s"] == pytest.approx(500)
        assert row["ratio"] == pytest.approx(0.25)
        assert row["latency_ms"] == pytest.approx(3)
    assert capsys.readouterr().out.count("torch") == 2


def test_bench_without_a_gpu() -> None:
    parse = bench_arguments()
    with pytest.raises(ValueError, match="the CPU computes in float32"):
        bench.run(parse("--dtype", "bfloat16"))
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="sees no CUDA device"):
            bench.run(parse("--device", "cuda"))


def bench_arguments() -> Callable[..., Any]:
    import argparse

    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return lambda *options: parser.parse_args(options)

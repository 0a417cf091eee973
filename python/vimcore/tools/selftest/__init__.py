# SPDX-License-Identifier: Apache-2.0
"""`vimcore doctor`: facts about build and machine, and a self-test of kernels, gradients and PNG decoder."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import numpy as np

from ... import _core
from ...data.digits import encode_png
from ...utils.machine import cpu_name, version_of
from . import gradients, kernels

# Of the published width, state and step, but shallow: rounding of 16-bit types adds up in depth.
GPU_GRADIENT_TESTS: list[dict[str, Any]] = [
    kernels.SELF_TEST,
    {"img_size": 64, "embed_dim": 192, "depth": 4, "num_classes": 10},
]


def report() -> dict[str, Any]:
    """Build, machine and self-test in one dictionary; "ok": no check failed and at least one ran."""
    affinity = getattr(os, "sched_getaffinity", None)
    machine = {
        "cpu": cpu_name(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": version_of("torch") or "not installed",
    }
    checks = run_checks()
    found = {row["status"] for row in checks}
    return {
        "ok": "ok" in found and "failed" not in found,
        "build": dict(_core.build_info()),
        "machine": machine,
        "checks": checks,
    }


def run_checks() -> list[dict[str, Any]]:
    """Runs the self-test. Rows with check, status ("ok", "skipped" or "failed") and detail."""
    rng = np.random.default_rng(0)
    config_json = _core.config_normalize(json.dumps(kernels.SELF_TEST))
    config = json.loads(config_json)
    weights = kernels.random_weights(config_json, rng)
    images = rng.normal(size=(3, config["in_chans"], *config["img_size"])).astype(np.float32)
    rows = kernels.check_cpu(config, weights, images)
    rows += gradients.check_cpu(config_json, weights, images[:2], rng)
    gpu = kernels.check_cuda(rng)
    rows += gpu
    if any(row["status"] != "skipped" for row in gpu):
        rows += gradients.check_cuda(GPU_GRADIENT_TESTS, kernels.random_weights, rng)
    rows.append(_check_png())
    return rows


def _check_png() -> dict[str, Any]:
    row: dict[str, Any] = {"check": "png decoder"}
    if not _core.build_info()["png"]:
        return {**row, "status": "skipped", "detail": "built without libpng"}
    pixels = np.random.default_rng(1).integers(0, 256, (17, 31, 3)).astype(np.uint8)
    same = np.array_equal(_core.decode_image(encode_png(pixels), "self-test"), pixels)
    return {
        **row,
        "status": "ok" if same else "failed",
        "detail": "same pixels back" if same else "other pixels back",
    }

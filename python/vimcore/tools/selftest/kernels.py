# SPDX-License-Identifier: Apache-2.0
"""The forward pass in `vimcore doctor`: every set of CPU kernels, and a GPU.

A small network with random weights is computed by every set of CPU kernels, each in a process of its own, and
compared with the textbook forward below: NumPy, float64, one token after the other, no code shared with the
C++ core. A GPU is compared with the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import _core
from ..._core import Config
from ...utils.cublaslt import load_cublaslt
from ...weights.metadata import pack

Array = NDArray[np.float64]
Weights = dict[str, Array]

CPU_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}  # relative to the norm of the logits
SELF_TEST: dict[str, Any] = {
    "img_size": [24, 40],
    "patch_size": 8,
    "stride": 4,  # 5 x 9 patches: lengths that no block size of the kernels divides
    "num_classes": 7,
    "embed_dim": 40,
    "depth": 3,
}
GPU_TESTS: list[dict[str, Any]] = [SELF_TEST, {"num_classes": 1000}]  # and Vim-Ti
GPU_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 1e-2}


# ---- the reference -----------------------------------------------------------------------------------------


def _sigmoid(v: Array) -> Array:
    return 1 / (1 + np.exp(-v))


def _silu(v: Array) -> Array:
    return v * _sigmoid(v)


def _rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def _direction(x: Array, w: Weights, prefix: str, suffix: str) -> Array:
    """One direction of the mixer before the gate. x, result: (L, E), in the order of reading."""
    log = f"{prefix}A{suffix}_log"
    kernel = w[f"{prefix}conv1d{suffix}.weight"][:, 0]  # (E, K)
    width = kernel.shape[1]
    padded = np.concatenate([np.zeros((width - 1, x.shape[1])), x])
    taps = sum(kernel[:, k] * padded[k : k + len(x)] for k in range(width))
    u = _silu(taps + w[f"{prefix}conv1d{suffix}.bias"])
    q = u @ w[f"{prefix}x_proj{suffix}.weight"].T  # (L, R + 2N)
    state = w[log].shape[1]
    rank = q.shape[1] - 2 * state
    raw = q[:, :rank] @ w[f"{prefix}dt_proj{suffix}.weight"].T + w[f"{prefix}dt_proj{suffix}.bias"]
    delta = np.logaddexp(0, raw)
    a = -np.exp(w[log])
    h = np.zeros_like(a)  # (E, N)
    y = np.empty_like(u)
    for t in range(len(u)):
        b, c = q[t, rank : rank + state], q[t, rank + state :]
        h = np.exp(delta[t][:, None] * a) * h + (delta[t] * u[t])[:, None] * b
        y[t] = h @ c
    return y + w[f"{prefix}D{suffix}"] * u


def reference_forward(config: dict[str, Any], w: Weights, image: Array) -> Array:
    """Logits (classes) of one image (C, H, W): both directions averaged, middle class token, RMSNorm."""
    patch, stride, eps = config["patch_size"], config["stride"], config["norm_eps"]
    rows, columns = ((side - patch) // stride + 1 for side in image.shape[1:])
    windows = [
        image[:, r * stride : r * stride + patch, c * stride : c * stride + patch].ravel()
        for r in range(rows)
        for c in range(columns)
    ]
    embed = w["patch_embed.proj.weight"]
    tokens = np.stack(windows) @ embed.reshape(len(embed), -1).T + w["patch_embed.proj.bias"]
    middle = rows * columns // 2
    residual = np.insert(tokens, middle, w["cls_token"][0, 0], axis=0) + w["pos_embed"][0]
    for layer in range(config["depth"]):
        prefix = f"layers.{layer}.mixer."
        v = _rms_norm(residual, w[f"layers.{layer}.norm.weight"], eps)
        x, z = np.split(v @ w[prefix + "in_proj.weight"].T, 2, axis=1)
        both = _direction(x, w, prefix, "") + _direction(x[::-1], w, prefix, "_b")[::-1]
        residual = residual + (both / 2 * _silu(z)) @ w[prefix + "out_proj.weight"].T
    token = _rms_norm(residual, w["norm_f.weight"], eps)[middle]
    return w["head.weight"] @ token + w["head.bias"]


def random_weights(config: Config, rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Weights of ordinary size, large enough for every path to matter in the logits.

    As at the published start of a training, deep networks add up small steps: errors do not multiply.
    """
    weights = {}
    step = config.depth**-0.5
    for name, shape in config.param_shapes().items():
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        value = rng.normal(size=shape) * (1 / np.sqrt(fan_in) if len(shape) > 1 else 0.5)
        if name.endswith(("A_log", "A_b_log")):
            value = np.log(rng.uniform(0.5, 8, size=shape))
        elif name.endswith(("norm.weight", "norm_f.weight", ".D", ".D_b")):
            value = rng.uniform(0.5, 1.5, size=shape)
        elif name.endswith("out_proj.weight"):
            value *= step
        weights[name] = value.astype(np.float32)
    return weights


# ---- the checks --------------------------------------------------------------------------------------------


def _worker(folder: str) -> None:
    """Runs in a process of its own: the logits of the self-test with one thread and with all, by type."""
    from ...runtime import Runtime

    images = np.load(os.path.join(folder, "images.npy"))
    path = os.path.join(folder, "model.safetensors")
    found: dict[str, Any] = {}
    for dtype in CPU_TOLERANCE:
        found[f"one {dtype}"] = Runtime(path, threads=1, dtype=dtype)(images)
        found[f"many {dtype}"] = Runtime(path, dtype=dtype)(images)
    built = _core.build_info()
    np.savez(os.path.join(folder, "logits.npz"), isa=built["isa"], bf16=built["bf16"], **found)


def _check_isa(isa: str, folder: str, expected: Array) -> list[dict[str, Any]]:
    row: dict[str, Any] = {"check": f"kernels {isa}"}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; from {__name__} import _worker; _worker(sys.argv[1])",
            folder,
        ],
        env={**os.environ, "VIMCORE_ISA": isa, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        if f"{isa} is not available" in lines[-1]:
            return [{**row, "status": "skipped", "detail": "this machine cannot run them"}]
        return [{**row, "status": "failed", "detail": lines[-1]}]
    with np.load(os.path.join(folder, "logits.npz")) as found:
        if (used := str(found["isa"])) != isa:
            return [{**row, "status": "failed", "detail": f"{used} ran instead"}]
        unit = "emulated" if str(found["bf16"]) == "emulated" else "by the processor's unit"
        return [
            _judged(f"kernels {isa}", found, expected, "float32", ""),
            _judged(f"kernels {isa} bfloat16", found, expected, "bfloat16", f"{unit}, "),
        ]


def _judged(check: str, found: Mapping[str, Any], expected: Array, dtype: str, how: str) -> dict[str, Any]:
    """The row of a check of one type, of what `_worker` wrote."""
    one, many, tolerance = found[f"one {dtype}"], found[f"many {dtype}"], CPU_TOLERANCE[dtype]
    error = float(np.linalg.norm(one - expected) / np.linalg.norm(expected))
    row: dict[str, Any] = {"check": check, "error": error, "tolerance": tolerance}
    if not error <= tolerance:  # also when it is not a number
        return {**row, "status": "failed", "detail": f"error {error:.1e} is above {tolerance:.0e}"}
    if not np.array_equal(one, many):
        return {**row, "status": "failed", "detail": "the number of threads changes the result"}
    detail = f"{how}error {error:.1e} (at most {tolerance:.0e}), same bits with 1 and all threads"
    return {**row, "status": "ok", "detail": detail}


def check_cuda(rng: np.random.Generator) -> list[dict[str, Any]]:
    """The first GPU against the CPU, in every type."""
    from ...runtime import Runtime

    load_cublaslt()
    try:
        _core.cuda_description(0)
    except _core.Error as why:
        return [{"check": "cuda", "status": "skipped", "detail": f"no GPU: {why}"}]
    errors: dict[str, list[float]] = {dtype: [] for dtype in GPU_TOLERANCE}
    with tempfile.TemporaryDirectory(prefix="vimcore-doctor-") as folder:
        path = os.path.join(folder, "model.safetensors")
        for options in GPU_TESTS:
            config = Config(**options)
            _core.write_safetensors(path, random_weights(config, rng), pack(config, None, None))
            images = rng.normal(size=(2, config.in_chans, *config.img_size)).astype(np.float32)
            expected = Runtime(path)(images)
            for dtype, found in errors.items():
                logits = Runtime(path, "cuda", dtype=dtype)(images)
                found.append(float(np.linalg.norm(logits - expected) / np.linalg.norm(expected)))
    device = _core.cuda_description(0)  # by now it says whether slow kernels multiplied matrices
    rows = []
    for dtype, found in errors.items():
        error, tolerance = max(found, key=lambda e: (np.isnan(e), e)), GPU_TOLERANCE[dtype]
        row: dict[str, Any] = {"check": f"cuda:0 {dtype}", "error": error, "tolerance": tolerance}
        detail = f"{device}: error {error:.1e} against the CPU (at most {tolerance:.0e})"
        rows.append({**row, "status": "ok" if error <= tolerance else "failed", "detail": detail})
    return rows


def check_cpu(
    config: Config, weights: Mapping[str, NDArray[np.float32]], images: NDArray[np.float32]
) -> list[dict[str, Any]]:
    """Every set of kernels of this build, in every type, against the reference; images (B, C, H, W)."""
    wide = {name: value.astype(np.float64) for name, value in weights.items()}
    options = config.to_dict()
    expected = np.stack([reference_forward(options, wide, image) for image in images.astype(np.float64)])
    rows = []
    for isa in _core.build_info()["isas"]:
        with tempfile.TemporaryDirectory(prefix="vimcore-doctor-") as folder:
            np.save(os.path.join(folder, "images.npy"), images)
            path = os.path.join(folder, "model.safetensors")
            _core.write_safetensors(path, dict(weights), pack(config, None, None))
            rows += _check_isa(isa, folder, expected)
    return rows

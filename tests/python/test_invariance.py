# SPDX-License-Identifier: Apache-2.0
"""The same answer means the same bits: batch splits, threads, runs, chunk lengths, inference, training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import vimcore
from golden import load, relative
from helpers import assert_close, build, images_for, run

# Vim-Ti's width: the tuned kernels, several tiles and chunks.
WIDE = reference.Config(img_size=(80, 64), patch_size=4, num_classes=10, depth=2)
ODD = reference.Config(
    img_size=(18, 22), patch_size=2, num_classes=3, embed_dim=20, depth=2, d_state=5, d_conv=3
)
MEDIUM = reference.Config(img_size=(40, 28), patch_size=4, num_classes=10, embed_dim=64, depth=2)
CONFIGS = {"wide": WIDE, "odd": ODD}
CASES = [(WIDE, torch.float32), (ODD, torch.float32), (ODD, torch.float64), (MEDIUM, torch.float64)]
IDS = ["wide-float32", "odd-float32", "odd-float64", "medium-float64"]


@pytest.mark.parametrize(("config", "dtype"), CASES, ids=IDS)
def test_batch_splits(config: reference.Config, dtype: torch.dtype) -> None:
    model, images = build(config, dtype=dtype).eval(), images_for(config, 5, dtype)
    with torch.no_grad():
        whole = model(images)
        for size in (1, 2, 3, 4):
            parts = torch.cat([model(part) for part in images.split(size)])
            assert torch.equal(parts, whole), size


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_thread_counts(name: str) -> None:
    model, images = build(CONFIGS[name]), images_for(CONFIGS[name], 3, torch.float32)
    first = None
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        logits, grads = run(model, images)
        grads["logits"] = logits
        first = first or {k: v.clone() for k, v in grads.items()}
        assert not [k for k in first if not torch.equal(first[k], grads[k])], threads


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["least", "lean", "fast"])
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_two_runs(name: str, memory: str) -> None:
    torch.set_num_threads(2)
    model, images = build(CONFIGS[name], memory=memory), images_for(CONFIGS[name], 3, torch.float32)
    logits, grads = run(model, images)
    grads = {k: v.clone() for k, v in grads.items()}
    for _ in range(3):
        again, found = run(model, images)
        assert torch.equal(again, logits)
        assert not [k for k in grads if not torch.equal(found[k], grads[k])]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "dtype"), CASES, ids=IDS)
def test_inference_is_the_training_forward(config: reference.Config, dtype: torch.dtype) -> None:
    """Neither autograd, nor the memory mode and its chunks, nor the gradient of the input changes a bit."""
    images = images_for(config, 2, dtype)
    logits, tokens = [], []
    for memory in ("least", "lean", "fast"):
        model = build(config, dtype=dtype, memory=memory)
        logits += [model.train()(images), model(images.clone().requires_grad_()), model.eval()(images)]
        tokens.append(model.forward_features(images))
        with torch.no_grad():
            logits.append(model(images))
            tokens.append(model.forward_features(images))
        with torch.inference_mode():
            logits.append(model(images))
    assert all(torch.equal(x, logits[0]) for x in logits)
    assert all(torch.equal(x, tokens[0]) for x in tokens)


@pytest.mark.parametrize(("config", "dtype"), CASES, ids=IDS)
def test_lean_and_fast_gradients(config: reference.Config, dtype: torch.dtype) -> None:
    images = images_for(config, 2, dtype)
    lean = run(build(config, dtype=dtype, memory="lean"), images)[1]
    fast = run(build(config, dtype=dtype, memory="fast"), images)[1]
    assert_close(fast, lean, 1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("state", [3, 16])
@pytest.mark.parametrize("length", [1, 7, 64, 100, 513])
def test_reverse_scan_is_the_scan_of_the_reversed_sequence(
    length: int, state: int, dtype: torch.dtype
) -> None:
    u, delta, z = (torch.randn(2, length, 40, dtype=dtype) for _ in range(3))
    A, D, bias = (
        -torch.rand(40, state, dtype=dtype),
        torch.randn(40, dtype=dtype),
        torch.randn(40, dtype=dtype),
    )
    b, c = (torch.randn(2, length, state, dtype=dtype) for _ in range(2))
    backwards = vimcore.ops.selective_scan(u, delta, A, b, c, D, z, bias, delta_softplus=True, reverse=True)
    turned = (x.flip(1).contiguous() for x in (u, delta, b, c, z))
    u, delta, b, c, z = turned
    forwards = vimcore.ops.selective_scan(u, delta, A, b, c, D, z, bias, delta_softplus=True)
    assert torch.equal(backwards, forwards.flip(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 4, 5])
@pytest.mark.parametrize("length", [1, 3, 50])
def test_reverse_convolution(length: int, width: int, dtype: torch.dtype) -> None:
    x, w, b = (torch.randn(s, dtype=dtype) for s in ((2, length, 24), (24, width), (24,)))
    backwards = vimcore.ops.causal_conv1d(x, w, b, reverse=True)
    assert torch.equal(backwards, vimcore.ops.causal_conv1d(x.flip(1).contiguous(), w, b).flip(1))
    truth = torch.nn.functional.silu(reference.causal_conv(x.double(), w.double()[:, None], b.double()))
    assert relative(vimcore.ops.causal_conv1d(x, w, b), truth) < (1e-12 if dtype == torch.float64 else 1e-6)


# ---- instruction sets ----

SCRIPT = """
import sys
import vimcore
assert vimcore.build_info()["isa"] == sys.argv[2], vimcore.build_info()
import numpy as np
from test_invariance import outputs
np.savez(sys.argv[1], **outputs())
"""


def outputs() -> dict[str, np.ndarray]:
    """Logits and gradients of every configuration, and the logits of a golden file."""
    found = {}
    for name, config in CONFIGS.items():
        logits, grads = run(build(config), images_for(config, 2, torch.float32))
        found |= {f"{name}.{k}": v.numpy() for k, v in grads.items()} | {f"{name}.logits": logits.numpy()}
    g = load("v2_middle")
    found["golden"] = build(g.config, g.weights)(g.input).detach().numpy()
    return found


def in_isa(isa: str, *arguments: str, script: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    """Runs `script` in a fresh interpreter with that kernel set."""
    path = os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)])
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"VIMCORE_ISA": isa, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_instruction_sets_agree(tmp_path: Path) -> None:
    here = vimcore.build_info()["isa"]
    results: dict[str, dict[str, np.ndarray]] = {here: outputs()}
    for isa in set(vimcore.build_info()["isas"]) - {here}:
        done = in_isa(isa, str(tmp_path / f"{isa}.npz"), isa)
        if done.returncode and "not available" in done.stderr:
            continue  # built in, but this machine lacks it
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / f"{isa}.npz") as file:
            results[isa] = dict(file)
    if len(results) < 2:
        pytest.skip(f"only {list(results)} runs here")
    truth = results[here]
    for isa, found in results.items():
        for kind in ("logits", "golden"):
            for key in (k for k in truth if k.endswith(kind)):
                error = relative(torch.from_numpy(found[key]), torch.from_numpy(truth[key]))
                assert error < 1e-5, (isa, key, error)
        grads = {k: torch.from_numpy(v) for k, v in found.items() if "logits" not in k and k != "golden"}
        assert_close(grads, {k: torch.from_numpy(truth[k]) for k in grads}, 1e-4)


@pytest.mark.parametrize("isa", ["avx1024", "AVX2", "nonsense"])
def test_unknown_instruction_set_is_an_error(isa: str) -> None:
    script = "import vimcore; print(vimcore.build_info()['isa'])"
    done = in_isa(isa, script=script)
    assert done.returncode != 0
    assert isa in done.stderr, done.stderr
    assert "baseline" in done.stderr, done.stderr
    assert isa not in done.stdout

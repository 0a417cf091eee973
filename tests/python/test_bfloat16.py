# SPDX-License-Identifier: Apache-2.0
"""bfloat16 on the CPU: as exact as torch's linear maps in that type, the same from every side, repeatable.

Where the processor has no unit for it the kernels are emulated (conftest.py); these tests do not notice.
"""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import golden
import half_twin
import numpy as np
import pytest
import reference
import torch
import vimcore
from helpers import SMALL, build, images_for, run, small
from torch import Tensor, nn
from vimcore import _core, ops
from vimcore.nn.plain import Plain

BF16 = torch.bfloat16


# ---- exactness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden.NAMES)
def test_twice_the_error_of_torch_at_most(name: str) -> None:
    """Against the authors' numbers in float64: tokens, logits, all gradients together, the worst of them."""
    g = golden.load(name)
    model = build(g.config, g.weights)
    twin_logits, twin = half_twin.gradients(g.config, g.weights, g.input, g.probe)
    logits, grads = run(model, g.input.bfloat16(), g.probe)
    assert logits.dtype == BF16
    with torch.no_grad():
        exact = build(g.config, g.weights, torch.float64).eval().forward_features(g.input.double())
        tokens = model.eval().forward_features(g.input.bfloat16())
        rounded = Plain(model, lambda name, x: None, BF16).tokens(g.input)
        rounded_logits = model.forward_head(rounded)
    typical = golden.relative(rounded, exact)
    assert golden.relative(tokens, exact) <= 2 * typical
    # of a few logits, which may be right by chance
    allowed = max(typical, *(golden.relative(x, g.logits) for x in (twin_logits, rounded_logits)))
    assert golden.relative(logits, g.logits) <= 2 * allowed

    assert {k: v.dtype for k, v in grads.items() if v.dtype != torch.float32} == {"input": BF16}
    truth = {k: v for k, v in g.grads.items() if v.any()}
    assert not any(grads[k].any() for k in g.grads.keys() - truth.keys())
    assert half_twin.whole(grads, truth) <= 2 * half_twin.whole(twin, truth)
    worst = max(golden.relative(twin[k], v) for k, v in truth.items())
    errors = {k: golden.relative(grads[k], v) for k, v in truth.items()}
    assert not {k: e for k, e in errors.items() if e > 2 * worst}


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.NAMES)
def test_no_gradient_is_twice_as_wrong_as_torchs(name: str) -> None:
    """Every parameter against its own of the twin, in the mean square over networks that differ a little.

    Of a single network either error may be a third or thrice of what it usually is: both are sums of
    roundings, whose signs are chance. The truth is our own float64, which other tests hold to the authors'.
    """
    g = golden.load(name)
    draws = 8 if name == "v2_long" else 12  # the twin is slow
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    probe = g.probe.bfloat16().float()
    for draw in range(draws):
        weights, images = shaken(g, draw)
        _, truth = run(build(g.config, weights, torch.float64), images.double(), probe.double())
        _, grads = run(build(g.config, weights), images.bfloat16(), probe)
        _, twin = half_twin.gradients(g.config, weights, images, probe)
        for key, value in truth.items():
            if value.any():
                ours[key] = ours.get(key, 0.0) + golden.relative(grads[key], value) ** 2
                theirs[key] = theirs.get(key, 0.0) + golden.relative(twin[key], value) ** 2
    assert len(ours) > 10
    ratios = {key: math.sqrt(ours[key] / theirs[key]) for key in ours if key != "head.bias"}
    assert not {key: ratio for key, ratio in ratios.items() if not ratio <= 2}
    assert ours["head.bias"] < draws * 1e-10  # a sum of the incoming gradient, in float32


def shaken(g: golden.Golden, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Weights and images that differ from the golden ones by what rounding to bfloat16 changes."""
    generator = torch.Generator().manual_seed(seed)

    def shake(x: Tensor) -> Tensor:
        return x * (1 + 2**-8 * torch.randn(x.shape, generator=generator))

    return {key: shake(w) for key, w in g.weights.items()}, shake(g.input).bfloat16().float()


@pytest.mark.parametrize("name", golden.NAMES)
def test_the_yardstick_of_the_golden_files(name: str) -> None:
    """What the C++ test reads is what the twin computes; torch's choice of kernels changes it a little."""
    rows = {row["file"]: row for row in csv.DictReader(half_twin.TABLE.read_text().splitlines())}
    assert rows.keys() == set(golden.NAMES)
    stored = [float(rows[name][key]) for key in ("forward", "gradients", "worst gradient")]
    assert stored == pytest.approx(half_twin.errors(name), rel=0.25)


def deep(tokens: int) -> tuple[reference.Config, vimcore.VisionMamba]:
    """The published depth, of small width so that the twin is quick."""
    side = 4 * math.isqrt(tokens)
    config = small(img_size=side, patch_size=4, depth=24, embed_dim=32, d_state=16, num_classes=10)
    weights = reference.random_weights(config, dtype=torch.float32)
    for key, value in weights.items():
        if key.endswith("out_proj.weight"):
            value *= config.depth**-0.5  # as networks start: small steps of a deep residual stream
    return config, build(config, weights)


@pytest.mark.parametrize("tokens", [64, 1024, pytest.param(4096, marks=pytest.mark.slow)])
def test_depth_and_length(tokens: int) -> None:
    config, model = deep(tokens)
    images = images_for(config, 1, torch.float32)
    with torch.no_grad():
        exact = build(config, dict(model.named_parameters()), torch.float64)
        wanted = exact.forward_features(images.double())
        found = model.forward_features(images.bfloat16())
        rounded = Plain(model, lambda name, x: None, BF16).tokens(images)
    assert golden.relative(found, wanted) <= 2 * golden.relative(rounded, wanted)


# ---- one network, many ways to ask -------------------------------------------------------------------------


def test_autocast_is_what_images_of_that_type_are() -> None:
    model, images = build(SMALL), images_for(SMALL, 3, torch.float32)
    wanted, grads = run(model, images.bfloat16())
    with torch.autocast("cpu", BF16):
        logits, found = run(model, images)
        tokens = model.forward_features(images)
        maps = model.forward_intermediates(images)
    assert logits.dtype == tokens.dtype == maps[0].dtype == BF16
    assert torch.equal(logits, wanted)
    assert found["input"].dtype == torch.float32
    assert torch.equal(found.pop("input"), grads.pop("input").float())
    assert all(g.dtype == torch.float32 for g in grads.values())
    assert all(torch.equal(found[name], g) for name, g in grads.items())
    assert torch.equal(tokens, model.forward_features(images.bfloat16()))
    assert torch.equal(maps[0], model.forward_intermediates(images.bfloat16())[0])
    assert not torch.equal(logits.float(), model(images))  # another arithmetic than float32's
    with torch.autocast("cpu", BF16), torch.no_grad():
        assert torch.equal(model.eval()(images), wanted)


@pytest.mark.slow
def test_compiled_modules_follow_autocast() -> None:
    model, images = build(SMALL), images_for(SMALL, 2, torch.float32)
    compiled = torch.compile(model, backend="eager")
    with torch.autocast("cpu", BF16):
        logits = compiled(images)
    assert torch.equal(logits, model(images.bfloat16()))


def test_float64_stays_under_autocast() -> None:
    model, images = build(SMALL, dtype=torch.float64), images_for(SMALL, 2)
    wanted = model(images)
    with torch.autocast("cpu", BF16):
        found = model(images)
    assert found.dtype == torch.float64
    assert torch.equal(found, wanted)


def test_training_under_autocast_learns() -> None:
    """Forward, backward and update of a head and a network around it, as a user writes them."""
    torch.manual_seed(0)
    net = nn.Sequential(build(small(num_classes=8)), nn.GELU(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    images, labels = images_for(SMALL, 12, torch.float32), torch.arange(12) % 3
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cpu", BF16):
            loss = nn.functional.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in net.parameters() if p.grad is not None)
    assert losses[-1] < 0.2 * losses[0]


def test_runtime_is_the_module(tmp_path: Path) -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 11, torch.float32)
    model.save(tmp_path / "wide.safetensors")
    model.save(tmp_path / "narrow.safetensors", dtype="bfloat16")
    with torch.no_grad():
        wanted, tokens = model(images.bfloat16()), model.forward_features(images.bfloat16())
    for name in ("wide", "narrow"):  # what is rounded in the file is rounded in any case
        runtime = vimcore.Runtime(tmp_path / f"{name}.safetensors", dtype="bfloat16")
        assert np.array_equal(runtime(images.numpy()), wanted.float().numpy())
        assert np.array_equal(runtime.features(images.numpy()), tokens.float().numpy())


def test_other_sizes_draws_and_heads() -> None:
    """What else a network may be asked, in bfloat16 close to what it is in float32."""
    torch.manual_seed(0)
    model = build(small(drop_path_rate=0.5, drop_rate=0.2))
    model.dynamic_img_size = True
    images = torch.randn(4, 3, 20, 16)
    found = []
    for kind in (torch.float32, BF16):
        torch.manual_seed(1)
        found.append(run(model, images.to(kind)))
    (wanted, truth), (logits, grads) = found
    assert golden.relative(logits, wanted) < 0.05
    assert golden.relative(grads["pos_embed"], truth["pos_embed"]) < 0.05
    for options in ({"class_token": "double"}, {"class_token": "none", "pool": "max"}, {"num_classes": 0}):
        other = build(small(**options)).eval()
        pixels = images_for(SMALL, 2, torch.float32)
        assert golden.relative(other(pixels.bfloat16()), other(pixels)) < 0.05
    with torch.no_grad():
        assert model.eval()(torch.zeros(0, 3, 20, 16, dtype=BF16)).shape == (0, 3)


# ---- repeatable --------------------------------------------------------------------------------------------


def test_threads_batches_and_memory_change_nothing() -> None:
    config = small(img_size=(32, 36), depth=3)
    images = images_for(config, 5, torch.float32).bfloat16()
    model = build(config)
    logits, grads = run(model, images)
    again, found = run(model, images)
    assert torch.equal(again, logits)
    assert all(torch.equal(found[name], g) for name, g in grads.items())
    torch.set_num_threads(3)
    threaded, found = run(model, images)
    assert torch.equal(threaded, logits)
    assert all(torch.equal(found[name], g) for name, g in grads.items())
    with torch.no_grad():
        assert torch.equal(torch.cat([model(part) for part in images.split(2)]), logits)
    saved = {}
    for memory in ("least", "lean", "fast"):
        model.memory = memory
        kept, found = run(model, images)
        assert torch.equal(kept, logits)
        assert all(golden.relative(found[name], g) < 0.02 for name, g in grads.items())
        core, _ = model._weights()
        saved[memory] = core.network.saved(memory, _core.Place()).bytes
    assert saved["least"] <= saved["lean"]


def test_what_is_saved_is_smaller() -> None:
    """Activations in 2 bytes; the residual stream and scan states keep 4."""
    from vimcore.autograd.network import Request

    model = build(small(img_size=(32, 36)))
    core, params = model._weights()
    sizes = []
    for dtype in (torch.float32, BF16):
        saved = _core.Saved("lean")
        core.run(Request("logits"), images_for(small(img_size=(32, 36)), 4, dtype), params, saved)
        sizes.append(saved.bytes)
    assert sizes[1] < 0.8 * sizes[0]


EMULATED = """
import sys
import numpy as np
import vimcore
assert vimcore.build_info()["bf16"] in ("emulated", vimcore.build_info()["isa"]), vimcore.build_info()
images = np.load(sys.argv[2])
np.save(sys.argv[3], vimcore.Runtime(sys.argv[1], dtype="bfloat16", threads=1)(images))
"""


def test_every_set_of_kernels_computes_the_same(tmp_path: Path) -> None:
    """By a unit or emulated: the last bits may differ, which one activation in 256 sees, and no more."""
    model, images = build(SMALL).eval(), images_for(SMALL, 16, torch.float32)
    model.save(tmp_path / "model.safetensors")
    np.save(tmp_path / "images.npy", images.numpy())
    here = vimcore.Runtime(tmp_path / "model.safetensors", dtype="bfloat16")(images.numpy())
    compared = 0
    for isa in vimcore.build_info()["isas"]:
        arguments = [str(tmp_path / name) for name in ("model.safetensors", "images.npy", f"{isa}.npy")]
        environment = {**os.environ, "VIMCORE_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", EMULATED, *arguments], env=environment, capture_output=True, text=True
        )
        if f"{isa} is not available" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        found = np.load(arguments[2])
        assert np.linalg.norm(found - here) < 5e-3 * np.linalg.norm(here), isa
        compared += 1
    assert compared >= 2


# ---- operators ---------------------------------------------------------------------------------------------


def operands(kind: torch.dtype) -> dict[str, Any]:
    """Arguments of all operators in this type of activations; the others float32, or float64 beside it."""
    wide = torch.float64 if kind == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int, narrow: bool = False, scale: float = 1.0) -> Tensor:
        x = (
            (scale * torch.randn(shape, generator=generator)).bfloat16()
            if narrow
            else torch.randn(shape, generator=generator)
        )
        return x.to(kind if narrow else wide)

    B, L, E, N, R = 2, 21, 24, 5, 3
    return {
        "u": draw(B, L, E, narrow=True),
        "delta": draw(B, L, E, narrow=True, scale=0.5),
        "A": -draw(E, N).exp(),
        "B": draw(B, L, N, narrow=True),
        "C": draw(B, L, N, narrow=True),
        "D": draw(E),
        "z": draw(B, L, E, narrow=True),
        "bias": draw(E),
        "conv": draw(E, 4),
        "q": draw(B, L, R + 2 * N, narrow=True),
        "q_b": draw(B, L, R + 2 * N, narrow=True),
        "dt": draw(E, R),
        "residual": draw(B, L, E),
    }


CALLS = {
    "selective_scan": lambda o: ops.selective_scan(
        o["u"], o["delta"], o["A"], o["B"], o["C"], o["D"], o["z"], o["bias"], delta_softplus=True
    ),
    "causal_conv1d": lambda o: ops.causal_conv1d(o["u"], o["conv"], o["bias"]),
    "rms_norm": lambda o: ops.rms_norm(o["u"], o["bias"], o["residual"])[0],
    "layer_norm": lambda o: ops.layer_norm(o["u"], o["D"], o["bias"]),
    "bidirectional_scan": lambda o: ops.bidirectional_scan(
        o["z"],
        (o["u"], o["u"].flip(1)),
        (o["q"], o["q_b"]),
        (o["A"].neg().log(), o["A"].neg().log()),
        (o["D"], o["bias"]),
        (o["dt"], o["dt"]),
        (o["bias"], o["D"]),
    ),
}


@pytest.mark.parametrize("name", sorted(CALLS))
def test_operators(name: str) -> None:
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for kind in (torch.float64, BF16):
        given = {key: x.requires_grad_() for key, x in operands(kind).items()}
        out = CALLS[name](given)
        assert out.dtype == kind
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).bfloat16()
        used = {key: x for key, x in given.items() if x.is_leaf}
        grads = torch.autograd.grad((out * probe).sum(), list(used.values()), allow_unused=True)
        found.append((out, {k: g for k, g in zip(used, grads) if g is not None}))
    (wanted, truth), (out, grads) = found
    assert golden.relative(out, wanted) < 6e-3  # the result is rounded to 8 bits
    assert grads.keys() == truth.keys()
    assert not {k: e for k, g in grads.items() if not (e := golden.relative(g, truth[k])) < 3e-2}


def test_operators_under_autocast() -> None:
    given = operands(torch.float32)
    for name, call in CALLS.items():
        with torch.autocast("cpu", BF16):
            found = call(given)
        assert torch.equal(found, call(operands(BF16))), name

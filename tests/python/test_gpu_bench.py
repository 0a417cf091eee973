# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark in tests/gpu, tried out on the CPU: everything but what only a GPU can do."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import vimcore
from golden import relative

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parents[1]
RATES = {  # of a fictional device with round numbers
    "device": "none",
    "sms": 100,
    "sm_clock_per_s": 1e9,
    "ex2_per_s": 2e12,
    "ffma_per_s": 1.28e13,
    "copy_bytes_per_s": 1e12,
    "matmul_f32": 1e13,
}


NORM_IN_INTERPRETER = """
import torch
from official_kernels import EPS, AddNorm, triton_backward, triton_forward

for kind in (torch.float32, torch.bfloat16):
    for has in (False, True):
        for later in (False, True):
            h, weight = torch.randn(2, 7, 40).to(kind), torch.rand(40) + 0.5
            residual = torch.randn(2, 7, 40) if has else None
            dout, dtotal = torch.randn(2, 7, 40).to(kind), torch.randn(2, 7, 40) if later else None
            out, total, scales = triton_forward(h, residual, weight)
            found = triton_backward(total, weight, scales, dout, dtotal, has, 4)
            leaves = [t.double().requires_grad_() for t in (h, weight)]
            leaves += [residual.double().requires_grad_()] if has else []
            wanted = AddNorm.apply(leaves[0], leaves[2] if has else None, leaves[1])
            tolerance = 1e-5 if kind == torch.float32 else 1e-2

            def close(a, b):
                assert (a.double() - b).norm() < tolerance * b.norm()

            close(out, wanted[0])
            close(total, wanted[1])
            loss = (wanted[0] * dout.double()).sum()
            loss = loss + (wanted[1] * dtotal.double()).sum() if later else loss
            grads = torch.autograd.grad(loss, leaves)
            assert (out.dtype, found[0].dtype, found[2].dtype) == (kind, kind, torch.float32)
            close(found[0], grads[0])
            close(found[2], grads[1])
            assert (found[1] is None) == (not has)
            if has:
                assert found[1].dtype == torch.float32
                close(found[1], grads[2])
"""


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, TESTS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(TESTS / "gpu"))
    try:
        return load("gpu/bench.py")
    finally:
        sys.path.remove(str(TESTS / "gpu"))


def run(*options: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TESTS / "gpu/bench.py"), *options]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_published_steps_give_the_same_logits(dtype: torch.dtype, tolerance: float) -> None:
    official = load("bench/vim_official.py")
    model = vimcore.VisionMamba(img_size=48, embed_dim=32, depth=3, num_classes=7).to(dtype).eval()
    peer = official.VimOfficial(48, 16, width=32, depth=3, num_classes=7).to(dtype)
    peer.load_state_dict(model.state_dict())
    images = torch.randn(3, 3, 48, 48, dtype=dtype)
    with torch.no_grad():
        assert relative(peer(images), model(images)) < tolerance
        assert 1e-4 < relative(peer.cast(torch.bfloat16)(images.bfloat16()), model(images)) < 3e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_published_steps_give_the_same_gradients(dtype: torch.dtype, tolerance: float) -> None:
    official = load("bench/vim_official.py")
    model = vimcore.VisionMamba(img_size=48, embed_dim=32, depth=3, num_classes=7).double()
    peer = official.VimOfficial(48, 16, width=32, depth=3, num_classes=7)
    peer.load_state_dict(model.state_dict())
    peer.to(dtype)
    images, probe = torch.randn(3, 3, 48, 48), torch.randn(3, 7)
    inputs = [images.double().requires_grad_(), images.to(dtype).requires_grad_()]
    (model(inputs[0]) * probe).sum().backward()
    (peer(inputs[1]) * probe).sum().backward()
    assert relative(inputs[1].grad, inputs[0].grad) < tolerance
    truth = {name: p.grad for name, p in model.named_parameters()}
    for name, p in peer.named_parameters():
        assert p.grad.dtype == dtype
        assert relative(p.grad, truth[name]) < tolerance, name


def test_published_steps_train_under_autocast() -> None:
    """Weights and gradients stay float32, activations are 16-bit; backward keeps what the published keeps."""
    official = load("bench/vim_official.py")
    layer = official.Layer(32)
    batch, length, width, inner, state, q = 2, 40, 32, 64, 16, 34
    h, residual = torch.randn(2, batch, length, width).requires_grad_().unbind()
    kept: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        out, total = layer(h.bfloat16(), residual)
    assert (out.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    grads = torch.autograd.grad(out.float().sum() + total.sum(), list(layer.parameters()))
    assert all(g.dtype == torch.float32 for g in grads)
    exact = official.Layer(32)
    exact.load_state_dict(layer.state_dict())
    exact.double()
    out, total = exact(h.bfloat16().double(), residual.double())
    wanted = torch.autograd.grad(out.sum() + total.sum(), list(exact.parameters()))
    for (name, _), g, w in zip(layer.named_parameters(), grads, wanted, strict=True):
        assert 0 < relative(g, w) < 0.1, name
    found = [(tuple(t.shape), t.dtype) for t in kept]
    for shape, count in {
        (batch, 2 * inner, length): 2,  # xz and its flipped copy
        (batch, inner, length): 2,  # the scans' outputs before the gate; not the convolutions', not delta
        (batch * length, q): 2,
        (batch, 1, state, length): 4,  # B and C
    }.items():
        assert found.count((shape, torch.bfloat16)) == count, shape
    assert max(t.numel() for t in kept) == batch * length * 2 * inner  # nothing of (B, E, L, N)


def test_norm_kernels_of_the_published_steps() -> None:
    """The Triton kernels in Triton's interpreter, several rows a program, against plain torch."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", NORM_IN_INTERPRETER],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS / "bench")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_floors_by_hand() -> None:
    floors = load("gpu/floors.py")
    rates, sizes = floors.Rates.of(RATES), floors.Sizes(batch=128, tokens=197, width=192)
    tokens = 128 * 197
    assert floors.scan(rates, sizes, 2) == pytest.approx(
        {
            "exp": tokens * 384 * 2 * 19 / 2e12,
            "issue": tokens * 2 * 12 * (7 * 16 + 28) / 4e11,  # 12 warps of 32 channels
            "memory": tokens * 2 * (4 * 384 + 2 * 44) / 1e12,
        }
    )
    assert floors.scan_backward(rates, sizes, 2) == pytest.approx(
        {
            "exp": tokens * 384 * 2 * 36 / 2e12,
            "issue": tokens * 2 * 12 * 32 * 16 / 4e11,
            "memory": tokens * (2 * (8 * 384 + 4 * 44) + 2 * 384 * 16 * 4 / 64) / 1e12,
        }
    )
    block = floors.block(rates, sizes, 4, "f32")
    multiply_adds = 192 * 768 + 2 * 384 * 44 + 2 * 12 * 384 + 384 * 192
    assert block["projections"] == pytest.approx(2 * tokens * multiply_adds / 1e13)
    assert block["norm"] == pytest.approx(tokens * 192 * 16 / 1e12)
    assert block["convolution"] == pytest.approx(tokens * 384 * 3 * 4 / 1e12)
    assert floors.model(rates, sizes, 4, "f32") == pytest.approx(24 * sum(block.values()))


def test_every_case_runs(tmp_path: Path) -> None:
    (tmp_path / "rates.json").write_text(json.dumps(RATES))
    options = ("--device", "cpu", "--rates", "rates.json", "--rounds", "2", "--json", "report.json")
    done = run(*options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    assert (report["failed"], report["skipped"]) == ({}, [])
    assert report["versions"]["torch"] == torch.__version__
    assert report["peer_kernels"] == {"scan": "torch", "conv": "torch", "norm": "torch"}
    rows = {row["kind"]: row for row in report["rows"]}
    kinds = {"scan", "scan_backward", "block", "block_backward", "model", "train", "latency", "error", "long"}
    assert set(rows) == kinds
    for kind in ("scan", "scan_backward", "block", "block_backward", "train", "error"):
        assert len(rows[kind]["error"]) == (3 if kind == "train" else 2)
        assert all(0 < error < 1e-5 for error in rows[kind]["error"].values()), rows[kind]
    assert set(rows["model"]["seconds"]) == {"vimcore", "official", "deit"}
    assert "scaled_dot_product" in rows["model"]["attention"]
    for name, rate in rows["model"]["images_per_second"].items():
        assert rate == pytest.approx(2 / rows["model"]["seconds"][name])
    assert rows["model"]["ratio"]["vimcore"] == 1
    assert rows["model"]["share_of_floor"] == pytest.approx(
        rows["model"]["floor"] / rows["model"]["seconds"]["vimcore"]
    )
    assert set(rows["train"]["seconds"]) == {"vimcore", "vimcore fast", "official", "deit"}
    assert rows["train"]["failed"] == {}
    assert set(rows["block_backward"]["seconds"]) == {"vimcore", "vimcore fast", "official"}
    assert rows["train"]["repeats"]
    assert list(rows["long"]["seconds"]) == ["fast", "lean", "least"]
    assert (
        rows["long"]["planned"]["least"] < rows["long"]["planned"]["lean"] < rows["long"]["planned"]["fast"]
    )
    assert rows["long"]["skipped"] == {}
    assert set(rows["latency"]["eager"]) == {"vimcore", "official", "deit"}

    table = run("--table", "report.json", cwd=tmp_path)
    assert table.stdout == done.stdout
    for title in (
        "ex2",
        "Scan of both",
        "Gradient of the scan",
        "Forward and backward",
        "One block",
        "One block, forward and backward",
        "Images to logits",
        "One image",
        "One large image",
        "Logits against",
    ):
        assert title in table.stdout


def test_time_that_is_up(bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert bench.main(["--device", "cpu", "--seconds", "0", "--only", "scan,error", "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["rows"] == []
    assert report["skipped"] == ["scan 2 32 5 f32", "error toy 32 f32"]
    assert "Skipped for lack of time:\n- scan 2 32 5 f32" in capsys.readouterr().out


def test_what_is_missing_is_named(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = tmp_path / "rates"
    rates.write_text("#!/bin/sh\nexit 1\n")
    rates.chmod(0o755)
    options = ["--device", "cpu", "--rates", str(rates), "--only", "scan"]
    assert bench.main([*options, "--json", str(tmp_path / "report.json")]) == 1
    printed = capsys.readouterr().out
    assert f"Failed:\n- rates: RuntimeError: --rates {rates}: it failed" in printed
    assert "| (2, 32, 5) f32 |" in printed  # the cases go on, without floors
    if not torch.cuda.is_available():
        assert bench.main([]) == 1
        assert "no GPU that torch can use" in capsys.readouterr().err


def test_peers_that_were_not_brought_along(tmp_path: Path) -> None:
    peers = load("gpu/peers.py")
    line = peers.build("selective_scan_cuda", tmp_path, tmp_path / "build")
    assert "no mamba_ssm-*.tar.gz" in line
    before = list(sys.path)
    peers.add_to_path(tmp_path / "build")
    assert sys.path == before


def test_acceptance_script(tmp_path: Path) -> None:
    script = str(TESTS / "gpu/acceptance.sh")
    environment = {"PATH": "/usr/bin:/bin", "BUILD": str(tmp_path / "build")}

    def status(*parts: str) -> tuple[int, str]:
        done = subprocess.run(["bash", script, *parts], capture_output=True, text=True, env=environment)
        return done.returncode, done.stdout + done.stderr

    assert status("everything")[0] == 2
    code, output = status("test", "bench")
    assert code == 1
    assert output.count("nothing is built") == 2
    assert "FAILED: tests bench" in output


@pytest.mark.parametrize(("free", "seen"), [((900, 700), 200), ((900, 900), None), ((900, 950), None)])
def test_memory_that_nothing_saw_is_no_number(
    free: tuple[int, int], seen: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a call that takes nothing new from the device, the table says "-", not 0."""
    table, timing = load("gpu/table.py"), load("gpu/timing.py")
    left = list(free)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (left.pop(0), 1000))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    device = timing.Device("cpu")
    monkeypatch.setattr(device, "cuda", True)
    monkeypatch.setattr(device, "synchronize", lambda: None)
    found = device.memory(lambda: None)
    assert found == seen
    assert table._of({"vimcore": found}, "vimcore") == ("-" if seen is None else "200")
    assert table._share({"vimcore": found, "official": 400}, "vimcore", "official") == (
        "-" if seen is None else "0.50"
    )

# SPDX-License-Identifier: Apache-2.0
"""`vimcore bench` and its peers: what is timed is what it says, and the arithmetic of the report holds."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import golden
import pytest
import reference
import torch
import vimcore
from vimcore.cli import bench
from vimcore.tools.bench import cpu, peers

pytestmark = pytest.mark.slow

PEERS = Path(__file__).resolve().parents[1] / "bench"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, PEERS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(options)


def test_deit_is_deit() -> None:
    """The published parameter counts, and attention that does not depend on the order of the patches."""
    deit = load("deit")
    counts = {"tiny": 5_717_416, "small": 22_050_664}
    for size, count in counts.items():
        assert sum(p.numel() for p in deit.build(size, 224).parameters()) == count
    model = deit.DeiT(32, patch_size=8, width=24, heads=3, depth=2, num_classes=5).double()
    with torch.no_grad():
        model.pos_embed.zero_()
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        turned = images.unflatten(3, (4, 8)).flip(3).flatten(3)  # columns of patches, right to left
        assert golden.relative(model(turned), model(images)) < 1e-12
        model.pos_embed.normal_()
        assert golden.relative(model(turned), model(images)) > 1e-6


def test_vim_in_plain_torch_is_vim() -> None:
    model = load("vim_torch").VimTorch(img_size=32, patch_size=8, width=32, depth=2).double()
    config = reference.Config(img_size=32, patch_size=8, embed_dim=32, depth=2)
    weights: dict[str, Any] = {
        "cls_token": model.cls_token,
        "pos_embed": model.pos_embed,
        "patch_embed.proj.weight": model.patch_embed.weight,
        "patch_embed.proj.bias": model.patch_embed.bias,
        "head.weight": model.head.weight,
        "head.bias": model.head.bias,
        "norm_f.weight": model.norm,
    }
    for i, layer in enumerate(model.layers):
        mixer = f"layers.{i}.mixer."
        weights[f"layers.{i}.norm.weight"] = layer.norm
        weights[mixer + "in_proj.weight"] = layer.in_proj.weight
        weights[mixer + "out_proj.weight"] = layer.out_proj.weight
        for d, suffix in enumerate(("", "_b")):
            weights[mixer + f"conv1d{suffix}.weight"] = layer.conv_weight[d]
            weights[mixer + f"conv1d{suffix}.bias"] = layer.conv_bias[d]
            weights[mixer + f"x_proj{suffix}.weight"] = layer.x_proj[d].T
            weights[mixer + f"dt_proj{suffix}.weight"] = layer.dt_weight[d].T
            weights[mixer + f"dt_proj{suffix}.bias"] = layer.dt_bias[d]
            weights[mixer + ("A_b_log" if d else "A_log")] = layer.A_log[d]
            weights[mixer + "D" + suffix] = layer.D[d]
    assert set(weights) == set(reference.parameter_shapes(config))
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert golden.relative(model(images), reference.forward(config, weights, images).logits) < 1e-12


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
def test_exported_peers_compute_the_same(name: str) -> None:
    deit, images = load("deit"), torch.randn(2, 3, 32, 32)
    model = deit.DeiT(32, patch_size=8, width=24, heads=3, depth=2, num_classes=5).eval()
    with peers.quiet():
        call = getattr(deit, name)(model, images, 1)
    with torch.no_grad():
        assert golden.relative(torch.from_numpy(call().copy()), model(images)) < 1e-5


def test_openvino_in_bfloat16() -> None:
    deit, images = load("deit"), torch.randn(2, 3, 32, 32)
    model = deit.DeiT(32, patch_size=8, width=24, heads=3, depth=2, num_classes=5).eval()
    try:
        with peers.quiet():
            call = deit.openvino(model, images, 1, "bfloat16")
    except NotImplementedError as error:
        pytest.skip(str(error))
    with torch.no_grad():
        assert 1e-4 < golden.relative(torch.from_numpy(call().copy()), model(images)) < 3e-2


def test_floor_of_vim_tiny() -> None:
    """By hand from the sizes of the paper: 197 tokens, 384 channels, 16 states, 2 directions, 24 layers."""
    updates = 197 * 384 * 16 * 2 * 24
    per_token = 3 * 384 * 192 + 2 * (4 * 384 + 44 * 384 + 12 * 384)
    linear = 197 * 24 * per_token + 196 * 768 * 192 + 192 * 1000
    model = vimcore.create_model("vim_tiny_patch16_224")
    sizes = cpu.Sizes(224, 192, model.flops())
    assert cpu.floor_flops(sizes) == 2 * linear + 20 * updates
    narrow = per_token - 2 * 4 * 384  # in bfloat16: all but the taps
    assert cpu.linear_flops(sizes) == 2 * (197 * 24 * narrow + 196 * 768 * 192 + 192 * 1000)


@pytest.mark.parametrize("mode", [(), ("--train",)])
def test_report(
    mode: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    file = tmp_path / "report.json"
    options = ["--sizes", "32", "--batch", "1,2", "--pairs", "2", "--threads", "1", "--sample", "0.01"]
    options += ["--peers", "torch,openvino", "--peers-dir", str(PEERS), "--json", str(file)]
    before = torch.get_num_threads()
    assert bench.run(parsed(*options, *mode)) == 0
    assert torch.get_num_threads() == before
    report = json.loads(file.read_text())
    assert {"date", "machine", "versions", "build", "threads", "rows", "skipped"} <= set(report)
    assert report["machine"]["cpu"]
    assert report["machine"]["environment"]["OMP_WAIT_POLICY"] == "passive"
    assert "HOME" not in report["machine"]["environment"]
    rows = [row for row in report["rows"] if row["peer"] == "torch"]
    assert [(row["size"], row["batch"], row["pairs"]) for row in rows] == [(32, 1, 2), (32, 2, 2)]
    for row in rows:
        ours, peer = row["samples"]["ours"], row["samples"]["peer"]
        ratios = [a / b for a, b in zip(ours, peer, strict=True)]
        assert row["ratio"] == pytest.approx(sum(ratios) / 2)
        assert row["ms_per_image"] == pytest.approx(1000 * sum(ours) / 2 / row["batch"])
        assert ("share_of_floor" in row) == (not mode)
        assert mode or 0 < row["share_of_floor"] < 1
    if mode:
        assert report["skipped"]["openvino"] == "does not train"
    assert "torch" in capsys.readouterr().out


def test_without_peers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed package has no tests/bench: it measures itself and says why there is no ratio."""
    monkeypatch.setattr("vimcore.tools.bench.peers_folder", lambda given: None)
    options = ("--sizes", "32", "--batch", "1", "--pairs", "1", "--threads", "1", "--sample", "0.01")
    assert bench.run(parsed(*options, "--json", "-")) == 0
    out, err = capsys.readouterr()
    (row,) = json.loads(out)["rows"]
    assert row["peer"] is None
    assert "ratio" not in row
    assert "--peers-dir" in err


ENDLESS = [("--threads", "1025"), ("--sample", "nan"), ("--seconds", "inf"), ("--pause", "-1")]


def test_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (("--peers", "jax"), ("--sizes", "0"), ("--batch", "two"), ("--threads", "1,2"), *ENDLESS):
        with pytest.raises(SystemExit) as error:
            parsed(*options)
        assert error.value.code == 2
    for options, error, text in (
        (("--peers-dir", str(tmp_path)), FileNotFoundError, "no deit.py"),
        (("--sizes", "32,8"), ValueError, "8 pixels is smaller than a patch"),
        (("--json", str(tmp_path / "no" / "x.json")), ValueError, "no file can be written there"),
        (("--json", str(tmp_path)), ValueError, "no file can be written there"),
        (("--dtype", "float16"), ValueError, "expected 'float32' or 'bfloat16' on cpu, got 'float16'"),
        (("--device", "gpu"), ValueError, "expected 'cpu', 'cuda' or 'cuda:N', got 'gpu'"),
    ):
        with pytest.raises(error, match=text):
            bench.run(parsed(*options))
    assert capsys.readouterr().out == ""  # nothing was measured


def test_vim_infer_against_its_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A short run; what a busy machine cannot change is held to its target."""
    script = load("vim_infer")
    out = tmp_path / "report.json"
    binary = Path(sys.executable).parent / "vim-infer"
    options = ["--rounds", "2", "--seconds", "0", "--images", "3", "--json", str(out)]
    status = script.main(["--binary", str(binary), *options])
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(out.read_text())
    assert [line.split()[0] for line in lines] == ["start-up", "binary", "pictures"]
    assert status == int(any(line.endswith("MISSED") for line in lines))
    assert 0 < report["start"]["process_ms"] < report["start"]["start_ms"]
    assert len(report["start"]["samples"]["start_ms"]) == 2
    assert report["files"]["images"] == 3
    assert report["files"]["failed"] == 0
    assert 5_000 < report["files"]["bytes_per_picture"] < 50_000
    assert report["binary_bytes"] == binary.stat().st_size < 1e6 * script.TARGETS["binary_mb"]
    assert script.main(["--binary", str(tmp_path / "absent")]) == 1
    assert "absent" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""`vimcore plan`: sums, what fits, and agreement with what a network keeps.

Scratch memory is compared in tests/cpp/test_plan.cpp and tests/cuda/test_plan_cuda.cpp.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import SMALL, build, images_for, small
from vimcore import _core, cli
from vimcore.config import WIDTHS
from vimcore.tools import plan
from vimcore.utils import options

G = 1 << 30


def run(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert cli.main(["plan", "--json", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_device_mode_and_batch(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(
        capsys, "--model", "vim_tiny", "--size", "16384", "--device-memory", "80G", "--batch", "1", "2"
    )
    assert found["tokens"] == 1024 * 1024 + 1
    rows = {(r["device"], r["mode"], r["batch"]): r for r in found["rows"]}
    assert len(rows) == 2 * len(plan.MODES) * 2
    for (device, mode, batch), row in rows.items():
        assert row["bytes"] == sum(row["parts"].values())
        assert row["fits"] == (row["bytes"] <= 80 * G)
        assert row["dtype"] == ("float32" if device == "cpu" else "bfloat16")
        assert row["bytes"] > rows[device, mode, 1]["bytes"] or batch == 1
        assert ("saved" in row["parts"]) == ("optimizer" in row["parts"]) == (mode != "inference")
    for device in ("cpu", "cuda"):
        by_mode = [rows[device, mode, 1]["bytes"] for mode in plan.MODES]  # from little to much
        assert by_mode == sorted(set(by_mode))
    # 24 blocks of a million tokens: 3.2 KiB each on cuda, rows of q padded from 44 to 48, chunks of 64
    assert rows["cuda", "training, least", 1]["fits"]  # a million tokens on a GPU of 80 GiB
    saved = rows["cuda", "training, lean", 1]["parts"]["saved"]
    token = 4 * 192 + 2 * 768 + 2 * 2 * 48 + 2 * 16 * 384 * 4 / 64
    assert saved == pytest.approx(24 * token * found["tokens"] + 4 * 192 * found["tokens"], rel=1e-4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", list(plan.MODES))
def test_the_largest_batch_fits_and_one_more_does_not(mode: str, device: str) -> None:
    config = {"img_size": [224, 224], "embed_dim": 192}
    dtype = "float32" if device == "cpu" else "float16"

    def needed(batch: int) -> int:
        return sum(plan.needed(config, batch, mode, device, dtype, threads=3).values())

    largest = plan.largest_batch(8 * G, config, mode, device, dtype, threads=3)
    assert needed(largest) <= 8 * G < needed(largest + 1)
    assert plan.largest_batch(needed(1) - 1, config, mode, device, dtype, threads=3) == 0


def test_what_is_saved_is_what_a_network_keeps() -> None:
    for memory in ("least", "lean", "fast"):
        model = build(small(depth=3), memory=memory).train()
        images = images_for(SMALL, 5).float()
        core, params = model._weights()
        saved = core.network.saved(memory, _core.Place())
        from vimcore.autograd.network import Request

        core.run(Request("logits"), images, params, saved)
        parts = plan.needed(model.config, 5, f"training, {memory}")
        assert parts["saved"] == saved.bytes
        assert parts["weights"] == 4 * sum(p.numel() for p in model.parameters())
        assert parts["images"] == images.numel() * 4


def test_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["plan", "--size", "512x1024", "--device", "cuda", "--device-memory", "1G"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("512 x 1024 pixels, 2049 tokens")
    assert [line.split("  ")[0] for line in lines[2:]] == ["cuda"] * len(plan.MODES)
    assert "(no)" in lines[-1]
    assert "in 1.0 GiB" in lines[-1]
    assert (
        cli.main(["plan", "--device", "cuda", "--model", "vim_tiny_patch16_224"]) == 0
    )  # its memory is not known: nothing is said to fit
    assert "(no)" not in (out := capsys.readouterr().out)
    assert out.rstrip().endswith("-")
    build(SMALL).save(tmp_path / "small.safetensors")
    assert cli.main(["plan", "--weights", str(tmp_path / "small.safetensors"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("8 x 12 pixels, 7 tokens")
    assert plan.readable(_core.machine_bytes()) in out


def test_numbers() -> None:
    assert options.byte_count("80G") == 80 * G
    assert options.byte_count("1.5 MiB") == 3 << 19
    assert options.byte_count("4096") == 4096
    for text in ("", "G", "-1G", "80X", "0"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected bytes such as 80G"):
            options.byte_count(text)
    assert options.image_size("224") == (224, 224)
    assert options.image_size("512x1024") == (512, 1024)
    for text in ("0", "1x", "axb", "12x0"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected pixels"):
            options.image_size(text)
    assert plan.readable(1023) == "1023 B"
    assert plan.readable(5 << 40) == "5.0 TiB"


def test_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["plan", "--size", "8"]) == 1
    assert "img_size" in capsys.readouterr().err
    assert cli.main(["plan", "--weights", str(tmp_path / "none")]) == 1
    assert "none" in capsys.readouterr().err
    with pytest.raises(ValueError, match="dtype: expected 'float32' or 'bfloat16' on cpu, got 'float16'"):
        plan.needed({}, 1, "inference", "cpu", "float16")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["plan", "--batch", "0"])


def test_a_size_by_the_name_of_its_network() -> None:
    assert options.published_size("vim_base_patch16_224") == options.published_size("vim_base") == "vim_base"
    assert options.published_size("vim_tiny_patch16_stride8_224") not in WIDTHS  # has tokens of its own

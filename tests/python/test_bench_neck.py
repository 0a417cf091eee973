# SPDX-License-Identifier: Apache-2.0
"""`vimcore bench --neck simple`, peak memory, and the figure of their reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_bench import PEERS, load, parsed
from vimcore.cli import bench, main
from vimcore.tools.bench import Options, memory, networks

QUICK = ["--batch", "1", "--pairs", "1", "--threads", "1", "--sample", "0.01", "--peers-dir", str(PEERS)]


def test_materialised_attention_is_the_same_attention() -> None:
    deit = load("deit")
    one, other = (deit.DeiT(32, 8, 24, 3, 2, 5, materialised=way).double() for way in (False, True))
    other.load_state_dict(one.state_dict())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert torch.allclose(one(images), other(images), rtol=0, atol=1e-12)
    features = one.features(images)
    assert features.shape == (2, 24, 4, 4)
    tokens = one.blocks(one._tokens(images))
    assert torch.equal(features[:, :, 1, 2], tokens[:, 1 + 4 + 2])


def test_both_sides_have_the_same_neck() -> None:
    """The published pyramid, on the last map of either backbone, and its multiply-adds."""
    options = Options(neck="simple")
    for peer in (None, "torch", "torch-materialised"):
        model = networks.build(options, peer, 64, PEERS)
        assert isinstance(model, networks.WithNeck)
        assert sum(p.numel() for p in model.pyramid.parameters()) == 2_664_880
        assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    assert networks.neck_flops(options, 1024) == pytest.approx(53.7e9, rel=2e-3)
    assert networks.neck_flops(Options(), 1024) == 0


@pytest.mark.slow
def test_a_network_that_cannot_be_measured_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"memory of torch, 32 px: .*deit\.py"):
        memory.peak_bytes(Options(threads=1), "torch", 32, 1, tmp_path)


@pytest.mark.slow
def test_report_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Peak memory sees the attention matrices: at 512 px, three heads have 12.6 MB each time."""
    plain_file, necked_file = files = [str(tmp_path / name) for name in ("plain.json", "necked.json")]
    flags = ["--sizes", "512", "--peers", "torch,torch-materialised", "--peak-memory"]
    assert bench.run(parsed(*QUICK, *flags, "--json", plain_file)) == 0
    flags = ["--sizes", "32,64", "--peers", "torch,vim-torch", "--neck", "simple"]
    assert bench.run(parsed(*QUICK, *flags, "--json", necked_file)) == 0
    plain, necked = (json.loads(Path(file).read_text()) for file in files)
    usual, matrix = plain["rows"]
    assert usual["peak_bytes"] > 4 * 7.1e6  # the weights
    assert usual["peer_peak_bytes"] > 4 * 5.7e6
    assert matrix["peer_peak_bytes"] - usual["peer_peak_bytes"] > 3 * 3 * 1025**2 * 4 / 2
    assert [(row["size"], row["neck"], "peak_bytes" in row) for row in necked["rows"]] == [
        (32, "simple", False),
        (64, "simple", False),
    ]
    assert necked["skipped"] == {"vim-torch": "is measured as a classifier only"}
    capsys.readouterr()
    assert main(["plot", *files, "--out", str(tmp_path / "figures"), "--format", "svg"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "figures" / "efficiency.svg")
    drawn = (tmp_path / "figures" / "efficiency.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("with feature pyramid", "peak memory, GiB", "64"))


def _row(**changes: Any) -> dict[str, Any]:
    usual = {
        "model": "vim_tiny",
        "mode": "forward",
        "peer": None,
        "size": 32,
        "batch": 1,
        "ms_per_image": 2.0,
    }
    return {**usual, **changes}


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], "no rows"),
        ([{"size": 32}], "ms_per_image"),
        ([_row(peer="nobody")], "a row"),
        ([_row(size="wide")], "TypeError"),
        ([_row(), _row(batch=8)], "batch: expected one for a figure, got 1, 8"),
        ([_row(), _row(model="vim_small")], "model: expected one for a figure, got vim_small, vim_tiny"),
    ],
)
def test_what_is_no_report(
    rows: list[dict[str, Any]], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"device": "cpu", "dtype": "float32", "rows": rows}))
    assert main(["plot", str(file), "--out", str(tmp_path)]) == 1
    assert text in capsys.readouterr().err


def test_neck_is_not_trained() -> None:
    with pytest.raises(ValueError, match="--neck simple: is measured without --train"):
        bench.run(parsed("--neck", "simple", "--train"))

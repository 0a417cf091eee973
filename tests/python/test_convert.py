# SPDX-License-Identifier: Apache-2.0
"""The authors' weights to vimcore files: what is inferred, assumed and said, and what the result computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from golden import NAMES, load
from vimcore import _core
from vimcore.cli import main
from vimcore.positions import rope_tables
from vimcore.weights.convert import convert, infer_config, parse_setting, read_labels

PUBLISHED = {
    "vim_tiny_patch16_224": 7_148_008,
    "vim_small_patch16_224": 25_796_584,
    "vim_base_patch16_224": 97_598_440,
    "vim_tiny_patch16_stride8_224": 7_250_344,
}


def shapes_of(**options: Any) -> dict[str, tuple[int, ...]]:
    return _core.Config(**options).param_shapes()


def full(config: dict[str, Any]) -> dict[str, Any]:
    return _core.Config(**config).to_dict()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    width = {"tiny": 192, "small": 384, "base": 768}[name.split("_")[1]]
    options = {"embed_dim": width, "stride": 8 if "stride8" in name else 16}
    shapes = shapes_of(**options)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == PUBLISHED[name]
    config, assumptions = infer_config(shapes)
    assert full(config) == full(options)
    text = "\n".join(assumptions)
    for part in (
        "class_token='middle'",
        "average_directions=True",
        f"img_size=224 and stride={options['stride']}",
    ):
        assert part in text


@pytest.mark.parametrize("name", NAMES)
def test_golden_networks(name: str, tmp_path: Path) -> None:
    golden = load(name)
    truth = full({**golden.config.arguments(), "drop_path_rate": 0.0})
    weights = {key: value.numpy() for key, value in golden.weights.items()}
    if truth["rope"]:
        cos, sin = rope_tables(truth)
        weights.update({"rope.freqs_cos": cos.numpy(), "rope.freqs_sin": sin.numpy()})
    source, destination = tmp_path / "bare.safetensors", tmp_path / "ours.safetensors"
    _core.write_safetensors(str(source), weights, {})
    # What no tensor of such a small network tells.
    hidden = (
        "img_size",
        "stride",
        "class_token",
        "average_directions",
        "pool",
        "rope_residual",
        "directions",
    )
    settings = {key: truth[key] for key in (*hidden, "layer_scale")}
    config, _ = convert(str(source), str(destination), settings=settings)
    assert config == truth
    logits = vimcore.Runtime(destination)(golden.input.numpy())
    expected = golden.logits.numpy()
    assert np.linalg.norm(logits - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("options", "key", "value", "said"),
    [
        ({"class_token": "double"}, "class_token", "double", None),
        ({"class_token": "none"}, "class_token", "none", "pool='mean'"),
        ({"directions": "ssm"}, "directions", "ssm", None),
        ({"directions": "none"}, "directions", "none", "directions='none'"),
        ({"norm": "layer"}, "norm", "layer", None),
        ({"layer_scale": 0.5}, "layer_scale", 1e-5, "layer_scale"),
        ({"dt_rank": 5}, "dt_rank", 5, None),
        ({"d_state": 8}, "d_state", 8, None),
        ({"d_conv": 3}, "d_conv", 3, None),
        ({"expand": 3}, "expand", 3, None),
        ({"in_chans": 1}, "in_chans", 1, None),
        ({"num_classes": 0}, "num_classes", 0, None),
        ({"pos_embed": False}, "pos_embed", False, "img_size=224"),
        ({"img_size": 384}, "img_size", 384, "img_size=384 and stride=16"),
    ],
)
def test_each_option_that_tensors_tell(
    options: dict[str, Any], key: str, value: Any, said: str | None
) -> None:
    config, assumptions = infer_config(shapes_of(embed_dim=32, depth=2, **options))
    assert config[key] == value
    if said is None:
        assert not any(text.startswith(f"{key}=") for text in assumptions)
    else:
        assert any(said in text for text in assumptions)
    shapes = _core.Config(**config).param_shapes()
    assert shapes == shapes_of(embed_dim=32, depth=2, **options)


@pytest.mark.parametrize("grid", [3, 14, 20])
def test_rope_tells_its_grid(grid: int) -> None:
    options = {"embed_dim": 32, "depth": 1, "class_token": "head", "rope": True, "rope_grid": grid}
    cos, sin = rope_tables(full(options))
    shapes = {**shapes_of(**options), "rope.freqs_cos": tuple(cos.shape), "rope.freqs_sin": tuple(sin.shape)}
    config, assumptions = infer_config(shapes, "x", cos, sin)
    assert (config["rope"], config["rope_grid"], config["class_token"]) == (True, grid, "head")
    assert config["average_directions"] is False
    assert any("rope_residual=False" in text for text in assumptions)


def test_not_a_vision_mamba() -> None:
    with pytest.raises(ValueError, match=r"no tensor patch_embed.proj.weight"):
        infer_config({"conv1.weight": (64, 3, 7, 7)})
    shapes = shapes_of(embed_dim=32, depth=3)
    gap = {name: shape for name, shape in shapes.items() if not name.startswith("layers.1.")}
    with pytest.raises(ValueError, match=r"expected layers 0, 1, 2, ..., got \[0, 2\]"):
        infer_config(gap)


def test_settings() -> None:
    assert parse_setting("stride=8") == ("stride", 8)
    assert parse_setting("img_size=[224, 448]") == ("img_size", [224, 448])
    assert parse_setting("class_token=head") == ("class_token", "head")
    assert parse_setting("average_directions=False") == ("average_directions", False)
    assert parse_setting("layer_scale=null") == ("layer_scale", None)
    with pytest.raises(ValueError, match="expected key=value"):
        parse_setting("stride")


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A training checkpoint of a rectangular network, as a .pth file."""
    model = vimcore.VisionMamba(img_size=(32, 48), patch_size=16, embed_dim=32, depth=2, num_classes=3)
    torch.save({"model": model.state_dict(), "model_ema": model.state_dict(), "epoch": 1}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


def test_command(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "b.safetensors"
    labels = tmp_path / "labels.txt"
    labels.write_text("cat\ndog\nowl\n", encoding="utf-8")
    size = "img_size=[32, 48]"
    status = main(["convert", str(published), str(out), "--set", size, "--labels", str(labels)])
    printed = capsys.readouterr().out
    assert status == 0
    for part in (
        "class_token='middle'",
        "average_directions=True",
        "norm_eps=1e-5",
        "preprocess=",
        "stride=16",
    ):
        assert part in printed
    runtime = vimcore.Runtime(out)
    assert runtime.labels == ["cat", "dog", "owl"]
    assert runtime.config["img_size"] == [32, 48]
    expected = torch.load(published, weights_only=True)["model"]
    found, _ = _core.read_safetensors(str(out))
    assert {k: v.tolist() for k, v in found.items()} == {k: v.tolist() for k, v in expected.items()}

    assert (
        main(["convert", str(published), str(out), "--set", size, "--set", "class_token=head", "--json"]) == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts["config"]["class_token"] == "head"
    assert not any("class_token" in text for text in facts["assumptions"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the image size has to be named"),
        (["--set", "img_size=[48, 48]"], "misshapen: pos_embed: expected (1, 10, 32), got (1, 7, 32)"),
        (["--set", "img_size=[32, 48]", "--set", "depth=3"], "missing: layers.2.mixer.A_log"),
        (["--set", "img_size=[32, 48]", "--set", "dept=3"], "dept"),
        (["--set", "img_size"], "expected key=value"),
    ],
)
def test_command_errors(
    published: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "b.safetensors"
    assert main(["convert", str(published), str(out), *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("content", [b"cat\n\xff\n", b"[" * 100_000, b'["cat"'])
def test_labels_that_are_no_text_or_list(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: (expected labels in UTF-8|not a JSON list of labels): "):
        read_labels(str(path))


def test_labels_must_fit(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text('["cat", "dog"]', encoding="utf-8")
    arguments = [
        "convert",
        str(published),
        str(tmp_path / "b"),
        "--set",
        "img_size=[32,48]",
        "--labels",
        str(labels),
    ]
    assert main(arguments) == 1
    assert "labels: expected 3, one for each class, got 2" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""Weight files in 16 bits: what is rounded and how, who reads them, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import vimcore
from helpers import SMALL, build, images_for
from torch import Tensor, nn
from vimcore import _core
from vimcore.cli import main
from vimcore.io import save_model
from vimcore.segmentation import FCN
from vimcore.segmentation import load as load_segmentation

HALF = [torch.bfloat16, torch.float16]
KINDS = {torch.bfloat16: "bf16", torch.float16: "f16"}


def types_in(path: Path) -> dict[str, str]:
    return {name: dtype for name, dtype, _ in _core.safetensors_header(path)[0]}


def is_linear(name: str) -> bool:
    """The weights of linear maps and of patches, by the names of the state dict."""
    return name.split(".")[-2] in ("in_proj", "x_proj", "x_proj_b", "out_proj", "proj", "head") and (
        name.endswith(".weight")
    )


def rounded(weights: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {n: w.to(dtype).float() if "." in n and is_linear(n) else w.float() for n, w in weights.items()}


@pytest.mark.parametrize("dtype", HALF)
def test_weights_of_linear_maps_are_rounded_and_the_rest_is_not(tmp_path: Path, dtype: torch.dtype) -> None:
    model, path = build(SMALL).eval(), tmp_path / "model.safetensors"
    model.save(path, dtype=dtype)
    wanted = rounded(dict(model.named_parameters()), dtype)
    for name, kind in types_in(path).items():
        assert kind == (KINDS[dtype] if "." in name and is_linear(name) else "f32"), name
    again = vimcore.VisionMamba.load(path)
    for name, value in again.named_parameters():
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted[name]), name
    images = images_for(SMALL, 2, torch.float32)
    expected = build(SMALL, wanted).eval()(images)
    assert torch.equal(again(images), expected)
    assert torch.equal(torch.from_numpy(vimcore.Runtime(path)(images.numpy())), expected)
    model.save(path, dtype=str(dtype).removeprefix("torch."))
    assert torch.equal(vimcore.VisionMamba.load(path)(images), expected)


@pytest.mark.parametrize("dtype", HALF)
def test_numbers_are_rounded_as_torch_does(tmp_path: Path, dtype: torch.dtype) -> None:
    """All sizes: ties, subnormals, zeros of both signs, the largest; NaN and infinity stay what they are."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=generator).int()
    values = bits.view(torch.float32)
    ties = (torch.arange(1 << 16).int() << 16 | 0x8000).view(torch.float32)
    small = torch.randn(1 << 16, generator=generator) * 2.0 ** torch.randint(-27, 16, (1 << 16,))
    values = torch.cat([values, ties, small, torch.tensor([0.0, -0.0, 65519.996, 2.0**-24, 2.0**-25])])
    fits = ~(values.to(dtype).isinf() & values.isfinite())
    values = values[fits][:131072].view(2, -1)
    path = tmp_path / "a.safetensors"
    _core.write_safetensors(path, {"a.weight": values.numpy()}, {}, str(dtype).removeprefix("torch."))
    found = torch.from_numpy(_core.read_safetensors(path)[0]["a.weight"]).to(dtype)
    wanted = values.to(dtype)
    assert torch.equal(found.isnan(), wanted.isnan())
    number = ~wanted.isnan()
    assert torch.equal(found.view(torch.int16)[number], wanted.view(torch.int16)[number])
    assert int(number.sum()) > 100000


def test_float64_and_float32(tmp_path: Path) -> None:
    model, path = build(SMALL, dtype=torch.float64), tmp_path / "model.safetensors"
    model.save(path)
    assert set(types_in(path).values()) == {"f64"}
    save_model(model, path, dtype="float32")
    assert set(types_in(path).values()) == {"f32"}
    model.save(path, dtype="bfloat16")
    assert set(types_in(path).values()) == {"f32", "bf16"}
    halves = build(SMALL).to(torch.bfloat16)
    halves.save(path)  # as ever: widened, exactly
    assert set(types_in(path).values()) == {"f32"}


def test_what_float16_cannot_hold_and_unknown_types(tmp_path: Path) -> None:
    model, path = build(SMALL), tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match='dtype: expected "float32", "bfloat16" or "float16", got "int8"'):
        model.save(path, dtype="int8")
    nn.init.constant_(model.layers[1].mixer.in_proj.weight, 65520)
    with pytest.raises(vimcore.Error, match=r"layers\.1\.mixer\.in_proj\.weight.*too large for f16"):
        model.save(path, dtype="float16")
    assert not path.exists()
    model.save(path, dtype="bfloat16")


def test_networks_with_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = vimcore.VisionMamba(img_size=32, patch_size=8, embed_dim=16, depth=2, num_classes=0)
    net, path = FCN(backbone, 3).eval(), tmp_path / "net.safetensors"
    net.save(path, dtype="bfloat16")
    kinds = types_in(path)
    assert {kinds["backbone.patch_embed.proj.weight"], kinds["decode_head.conv_seg.weight"]} == {"bf16"}
    assert {kinds["backbone.layers.0.mixer.conv1d.weight"], kinds["decode_head.conv_seg.bias"]} == {"f32"}
    again = load_segmentation(path).state_dict()
    for name, value in net.state_dict().items():
        wanted = value.bfloat16().float() if kinds.get(name) == "bf16" else value
        assert torch.equal(again[name], wanted), name


def test_convert_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, wide, narrow = build(SMALL), tmp_path / "wide.safetensors", tmp_path / "narrow.safetensors"
    model.save(wide, labels=["a", "b", "c"])
    assert main(["convert", str(wide), str(narrow), "--dtype", "bfloat16"]) == 0
    assert set(types_in(narrow).values()) == {"bf16", "f32"}
    assert vimcore.Runtime(narrow).labels == ["a", "b", "c"]
    direct = tmp_path / "direct.safetensors"
    model.save(direct, labels=["a", "b", "c"], dtype="bfloat16")
    first: dict[str, Any]
    (first, _), (second, _) = _core.read_safetensors(narrow), _core.read_safetensors(direct)
    assert all((first[name] == second[name]).all() for name in second)
    backbone = vimcore.VisionMamba(img_size=32, patch_size=8, embed_dim=16, depth=2, num_classes=0)
    FCN(backbone, 3).save(wide)
    assert main(["convert", str(wide), str(narrow)]) == 1  # as before: there is nothing to convert
    assert main(["convert", str(wide), str(narrow), "--dtype", "float16"]) == 0
    assert set(types_in(narrow).values()) == {"f16", "f32", "i64"}  # batches that a norm saw
    assert load_segmentation(narrow).num_classes == 3
    capsys.readouterr()

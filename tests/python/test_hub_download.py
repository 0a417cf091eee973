# SPDX-License-Identifier: Apache-2.0
"""Weights by name, from a hub on loopback: lists, downloads, `pretrained=True`, and what is refused."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from hub_server import Hub
from vimcore.cli import main
from vimcore.hub.fetch import record_of
from vimcore.hub.pretrained import download, imagenet_names
from vimcore.hub.published import PUBLISHED, Published, published

NAME = "vim_tiny_patch16_224"
SMALL = {"depth": 2, "embed_dim": 16}  # in place of the published sizes, whose files are 100 MB and more


def checkpoint(name: str = NAME, seed: int = 0) -> bytes:
    """As the authors' training program saves it, of the small size."""
    torch.manual_seed(seed)
    model = vimcore.create_model(name)
    averaged = {key: value + 1 for key, value in model.state_dict().items()}
    content = {"model": model.state_dict(), "model_ema": averaged, "optimizer": {}, "epoch": 299}
    memory = io.BytesIO()
    torch.save({**content, "args": argparse.Namespace(model="vim"), "scaler": "none"}, memory)
    return memory.getvalue()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published networks, two layers deep and narrow."""
    for options in vimcore.config._MODELS.values():  # type: ignore[attr-defined]
        for key, value in SMALL.items():
            monkeypatch.setitem(options, key, value)


@pytest.fixture
def authors(hub: Hub, small: None) -> Hub:
    """The hub with the file that `NAME` is made of."""
    hub.files[PUBLISHED[NAME].repo, PUBLISHED[NAME].file] = checkpoint()
    return hub


# ---- what there is -----------------------------------------------------------------------------------------


def test_published_names() -> None:
    """Networks of ours; no hash that nobody computed; the base size has no file that is known."""
    assert set(PUBLISHED) <= set(vimcore.list_models())
    for name, weights in PUBLISHED.items():
        assert name == weights.name
        assert weights.sha256 is None
        assert weights.repo.startswith("hustvl/")
        assert weights.file.endswith(".pth")
    with pytest.raises(
        ValueError, match=r"vim_base_patch16_224: no published weights are known; .* vim_tiny_p"
    ):
        published("vim_base_patch16_224")
    with pytest.raises(ValueError, match="unknown 'vim_tiny'; close to it: vim_tiny_patch16_224"):
        published("vim_tiny")
    with pytest.raises(ValueError, match="unknown 'resnet50'; there are weights for vim_tiny_patch16_224, "):
        published("resnet50")


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download"]) == 0
    out = capsys.readouterr().out
    for weights in PUBLISHED.values():
        assert f"{weights.repo}/{weights.file}" in out
    assert "licence: the authors' model cards" in out
    assert main(["download", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [line["name"] for line in facts["weights"]] == list(PUBLISHED)


def test_imagenet_names() -> None:
    names = imagenet_names()
    assert names is not None
    assert (len(names), names[0], names[999].split(",")[0]) == (1000, "tench, Tinca tinca", "toilet tissue")


def test_convert_names_them(small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is asked to; else it says how."""
    (tmp_path / "a.pth").write_bytes(checkpoint())
    source, out = str(tmp_path / "a.pth"), str(tmp_path / "a.safetensors")
    assert main(["convert", source, out]) == 0
    assert (
        "labels none; if these are ImageNet's 1000 classes: --labels imagenet-1k\n" in capsys.readouterr().out
    )
    assert main(["convert", source, out, "--labels", "imagenet-1k"]) == 0
    assert "labels none" not in capsys.readouterr().out
    assert vimcore.Runtime(out).labels == imagenet_names()
    assert main(["convert", out, str(tmp_path / "b.safetensors")]) == 0
    assert "labels none" not in capsys.readouterr().out
    ten = vimcore.create_model(NAME, num_classes=10)
    ten.save(tmp_path / "ten.safetensors")
    assert main(["convert", str(tmp_path / "ten.safetensors"), out, "--labels", "imagenet-1k"]) == 1
    assert "labels: expected 10, one for each class, got 1000" in capsys.readouterr().err


# ---- the whole way -----------------------------------------------------------------------------------------


def test_download_and_predict(authors: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tiny.safetensors"
    assert main(["download", NAME, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(
        f"vimcore: weights of {NAME}, 115 MB from https://huggingface.co/hustvl/Vim-tiny-midclstok: "
    )
    assert "non-commercial" in said.err
    digest = hashlib.sha256(checkpoint()).hexdigest()
    assert f"sha256: {digest}\n" in said.out
    assert (
        record_of(PUBLISHED[NAME].repo, PUBLISHED[NAME].file).read_text()
        == f"{digest}  {PUBLISHED[NAME].file}\n"
    )
    torch.manual_seed(0)
    made, loaded = vimcore.create_model(NAME), vimcore.VisionMamba.load(out)
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(made.eval()(images), loaded(images))
    assert vimcore.Runtime(out).labels == imagenet_names()
    assert vimcore.Runtime(out).predict(np.zeros((50, 60, 3), np.uint8)).label in (imagenet_names() or [])
    assert len(authors.downloads()) == 1
    # again: from the cache, without a note; not over a file that is there
    assert main(["download", NAME, "--out", str(out)]) == 1
    assert (
        "tiny.safetensors: is there; name another --out, or replace it by --force" in capsys.readouterr().err
    )
    assert main(["download", NAME, "--out", str(tmp_path / "b.safetensors"), "--json"]) == 0
    again = capsys.readouterr()
    assert again.err == ""
    assert json.loads(again.out)["sha256"] == digest
    assert len(authors.downloads()) == 1
    assert (tmp_path / "b.safetensors").read_bytes() == out.read_bytes()
    assert (
        main(["download", NAME, "--out", str(out), "--force", "--weights", "ema", "--dtype", "bfloat16"]) == 0
    )
    assert len(authors.downloads()) == 2
    averaged = vimcore.VisionMamba.load(out)
    assert torch.allclose(averaged.norm_f.weight, made.norm_f.weight + 1)


def test_create_model(authors: Hub) -> None:
    model = vimcore.create_model(NAME, pretrained=True)
    assert model.training
    torch.manual_seed(0)
    made = vimcore.create_model(NAME)
    for key, value in made.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    ten = vimcore.create_model(NAME, pretrained=True, num_classes=10, drop_path_rate=0.1, memory="fast")
    assert ten.head.weight.shape == (10, 16)
    assert torch.equal(ten.norm_f.weight, made.norm_f.weight)
    wide = vimcore.create_model(NAME, pretrained=True, img_size=(224, 256), stride=16)
    assert wide.pos_embed.shape == (1, 14 * 16 + 1, 16)
    assert len(authors.downloads()) == 1


def test_timm(authors: Hub, tmp_path: Path) -> None:
    """The authors' files are in timm's registry; classes, channels and sizes are adapted by timm."""
    import timm
    import vimcore.timm

    name, weights = f"vimcore_{NAME}", PUBLISHED[NAME]
    assert {f"vimcore_{n}" for n in PUBLISHED} == set(timm.list_pretrained("vimcore_*"))
    facts = timm.models.get_pretrained_cfg(name)
    assert (facts.hf_hub_id, facts.hf_hub_filename) == (weights.repo, weights.file)
    plain = vimcore.create_model(NAME, pretrained=True).eval()
    images = torch.randn(2, 3, 224, 224)
    whole = timm.create_model(name, pretrained=True).eval()
    assert torch.equal(whole(images), plain(images))
    assert "state_dict" not in whole.pretrained_cfg
    other = timm.create_model(name, pretrained=True, num_classes=7, in_chans=1, img_size=192).eval()
    assert other(images[:, :1, :192, :192]).shape == (2, 7)
    summed = plain.patch_embed.proj.weight.sum(1, keepdim=True)
    assert torch.allclose(other.patch_embed.proj.weight, summed, atol=1e-6)
    maps = timm.create_model(name, pretrained=True, features_only=True, out_indices=(0, 1)).eval()
    assert torch.equal(maps(images)[1], plain.forward_intermediates(images, [1])[0])
    assert len(authors.downloads()) == 1
    with pytest.raises(ValueError, match="class_token='head': the published weights are for 'middle'"):
        timm.create_model(name, pretrained=True, class_token="head")
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("vimcore_vim_base_patch16_224", pretrained=True)
    plain.save(tmp_path / "own.safetensors")
    overlay = {"file": str(tmp_path / "own.safetensors")}
    own = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(own(images), plain(images))
    kept = timm.create_model(name, pretrained=True, cache_dir=str(tmp_path / "other"))
    assert torch.equal(kept.head.weight, plain.head.weight)
    assert (tmp_path / "other").is_dir()


@pytest.mark.slow
def test_fine_tuning_by_name(authors: Hub, tmp_path: Path) -> None:
    """`vimcore train --init NAME`: the published weights, a head for the classes at hand."""
    run, size = tmp_path / "run", ["--img-size", "32", "--batch-size", "500"]
    train = ["train", "--data", "digits", "--init", NAME, "--epochs", "1", "--lr", "1e-9", "--workers", "0"]
    assert main([*train, *size, "--out", str(run)]) == 0
    tuned = vimcore.VisionMamba.load(run / "last.safetensors")
    made = vimcore.create_model(NAME, pretrained=True)
    assert (tuned.config["img_size"], tuned.num_classes) == ([32, 32], 10)
    assert torch.allclose(
        tuned.layers[1].mixer.in_proj.weight, made.layers[1].mixer.in_proj.weight, atol=1e-7
    )
    assert len(authors.downloads()) == 1


def test_options_that_change_the_meaning(hub: Hub, small: None) -> None:
    for options, text in (
        ({"class_token": "head"}, "class_token='head': the published weights are for 'middle'"),
        ({"average_directions": False}, "average_directions=False: the published weights are for True"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-06: "),
        ({"depth": 3}, "depth=3: "),
        ({"in_chans": 1}, r"in_chans: .* 3 channels; timm.create_model\('vimcore_vim_tiny_patch16_224', pre"),
    ):
        with pytest.raises(ValueError, match=r"\[create_model\] " + text):
            vimcore.create_model(NAME, pretrained=True, **options)
    with pytest.raises(ValueError, match="no published weights"):
        vimcore.create_model("vim_base_patch16_224", pretrained=True)
    assert hub.requests == []


def test_weights_of_another_network(hub: Hub, small: None, tmp_path: Path) -> None:
    """A file whose tensors do not fit writes nothing."""
    hub.files[PUBLISHED[NAME].repo, PUBLISHED[NAME].file] = checkpoint("vim_tiny_patch16_stride8_224")
    with pytest.raises(ValueError, match="does not fit"):
        download(NAME, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_hostile_file(hub: Hub, small: None, tmp_path: Path) -> None:
    """A pickle that would run a command, a page of the web, nothing: errors, and nothing runs."""

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    memory = io.BytesIO()
    torch.save({"model": Evil()}, memory)
    for data, text in (
        (memory.getvalue(), "unsupported object, .*system"),
        (b"<!doctype html><title>Sign in</title>", "a page of the web"),
        (b"", "an empty file"),
        (memory.getvalue()[:-300], "damaged, or not a file of torch.save"),
    ):
        hub.files[PUBLISHED[NAME].repo, PUBLISHED[NAME].file] = data
        record_of(PUBLISHED[NAME].repo, PUBLISHED[NAME].file).unlink(missing_ok=True)
        with pytest.raises(ValueError, match=text):
            vimcore.create_model(NAME, pretrained=True)
    assert not (tmp_path / "ran").exists()


# ---- hashes of the list, missing packages -----------------------------------------------------------------


def test_hash_of_the_list(hub: Hub, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once somebody has computed it."""
    hub.files["hustvl/x", "w.pth"] = checkpoint()
    for digest in (hashlib.sha256(checkpoint()).hexdigest(), "0" * 64):
        weights = Published(NAME, "hustvl/x", "w.pth", 76.1, 115, digest)
        monkeypatch.setitem(PUBLISHED, NAME, weights)
        if digest == "0" * 64:
            with pytest.raises(RuntimeError, match=f"expected {digest}"):
                vimcore.create_model(NAME, pretrained=True)
        else:
            vimcore.create_model(NAME, pretrained=True)


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch, small: None) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RuntimeError, match=r"needs huggingface_hub; install it with: pip install '.\[hub\]'"):
        vimcore.create_model(NAME, pretrained=True)


def test_without_timm(authors: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No names, and that is said."""
    monkeypatch.setitem(sys.modules, "timm.data", None)
    found = download(NAME, tmp_path / "a.safetensors")
    assert "labels none: timm, which has ImageNet's names, is not installed" in found.assumptions
    assert vimcore.Runtime(tmp_path / "a.safetensors").labels is None

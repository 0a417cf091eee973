# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as other programs write them, and backbones that start from files of any task."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import vimcore
from torch import Tensor
from vimcore.cli import main
from vimcore.positions import resize_pos_embed
from vimcore.segmentation import FCN, Segmentation, Segmenter, UperNet, load, load_checkpoint
from vimcore.tasks import backbone as starting
from vimcore.tasks.classification.settings import ClassificationSettings

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 4, "class_token": "none"}
NAMES = ("wall", "building", "sky")
COLOURS = [[120, 120, 120], [180, 120, 120], [6, 230, 230]]


def backbone(**options: Any) -> vimcore.VisionMamba:
    return vimcore.VisionMamba(**{**SMALL, "num_classes": 0, **options})


def images(size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


def trained(make: Callable[..., Segmentation] = UperNet, **options: Any) -> Segmentation:
    """A network whose statistics and offsets are not those of the start."""
    torch.manual_seed(1)
    model = make(backbone(**options), 3).train()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2) if p.ndim == 1 else None
    model(images(model.backbone._config.img_size))
    return model.eval()


def mmsegmentation(path: Path, model: Segmentation, prefix: str = "", **meta: Any) -> Path:
    """As mmcv's runner saves a model."""
    meta = meta or {"CLASSES": NAMES, "PALETTE": COLOURS}
    state = {prefix + name: value for name, value in model.state_dict().items()}
    about = {"mmseg_version": "0.29.1", "iter": 60000, "config": "model = dict()", **meta}
    torch.save({"meta": about, "state_dict": state, "optimizer": {"state": {}}}, path)
    return path


# ---- mmsegmentation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rope": True, "rope_residual": True, "img_size": (32, 64)}])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_of_mmsegmentation(options: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    wanted = trained(**options)
    path = mmsegmentation(tmp_path / "iter_60000.pth", wanted, prefix)
    model = UperNet(backbone(**options), 3).eval()
    grid = wanted.backbone._config.grid
    notes = load_checkpoint(model, path, pos_grid=grid)
    x = images(wanted.backbone._config.img_size)
    assert torch.equal(model(x), wanted(x))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), wanted.state_dict().values()))
    assert "weights taken from the key 'state_dict'" in notes
    assert "classes and colours from the file's meta" in notes
    assert model.task is not None
    assert model.task.classes == NAMES
    model.save(tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors").task.palette == tuple(map(tuple, COLOURS))


def test_what_else_the_meta_says(tmp_path: Path) -> None:
    wanted, path = trained(), tmp_path / "a.pth"
    model = UperNet(backbone(), 3)
    mmsegmentation(path, wanted, dataset_meta={"classes": list(NAMES), "palette": None})  # of mmengine
    load_checkpoint(model, path)
    assert model.task.classes == NAMES
    assert model.task.palette == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    for odd in (NAMES[:2], [1, 2, 3], "abc", {"a": 1}):
        model.task = None
        mmsegmentation(path, wanted, CLASSES=odd, PALETTE=COLOURS)
        notes = load_checkpoint(model, path)
        assert model.task is None
        assert "the file's meta has no 3 names of classes, so none were taken" in notes


def test_without_the_auxiliary_head_or_the_norm(tmp_path: Path) -> None:
    wanted = trained()
    path = mmsegmentation(tmp_path / "a.pth", wanted)
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["backbone.norm_f.weight"]  # which an UperNet does not use
    torch.save(content, path)
    model = UperNet(backbone(), 3, aux=False).eval()
    assert "auxiliary_head left aside" in load_checkpoint(model, path)
    assert torch.equal(model(images()), wanted(images()))
    wanted = trained(Segmenter)
    state = {k: v for k, v in wanted.state_dict().items() if not k.startswith("backbone.norm_f.")}
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"missing: backbone\.norm_f\.weight \(16,\)"):
        load_checkpoint(Segmenter(backbone(), 3), path)


def test_a_checkpoint_for_other_images(tmp_path: Path) -> None:
    wanted = trained(FCN)
    path = mmsegmentation(tmp_path / "a.pth", wanted)
    model = FCN(backbone(img_size=(48, 64)), 3).eval()
    load_checkpoint(model, path)
    wanted.backbone.set_input_size((48, 64))
    assert torch.equal(model(images((48, 64))), wanted(images((48, 64))))


def test_vimcore_s_own_files(tmp_path: Path) -> None:
    wanted, path = trained(Segmenter, img_size=(32, 64)), tmp_path / "a.safetensors"
    wanted.save(path, classes=NAMES, window=64)
    model = Segmenter(backbone(img_size=(48, 48)), 3)
    load_checkpoint(model, path)
    assert model.task.classes == NAMES
    wanted.backbone.set_input_size(48)
    assert torch.equal(model.backbone.pos_embed, wanted.backbone.pos_embed)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("backbone.layers.1.mixer.D", None, r"missing: backbone\.layers\.1\.mixer\.D \(32,\)"),
        ("backbone.fpn1.0.weight", None, r"missing: backbone\.fpn1\.0\.weight"),
        ("decode_head.conv_seg.bias", torch.zeros(4), r"misshapen: decode_head\.conv_seg\.bias"),
        ("backbone.cls_token", torch.zeros(1, 1, 16), r"unexpected: backbone\.cls_token"),
        ("decode_head.more", torch.zeros(1), r"unexpected: decode_head\.more"),
        ("backbone.rope.freqs_cos", torch.zeros(4, 16), r"unexpected: backbone\.rope\.freqs_cos"),
        (
            "backbone.pos_embed",
            torch.zeros(1, 6, 16),
            r"misshapen: backbone\.pos_embed: 6 patches are no square grid",
        ),
        (
            "decode_head.conv_seg.bias",
            torch.zeros(3, dtype=torch.int64),
            r"decode_head\.conv_seg\.bias: expected torch\.float32, got torch\.int64",
        ),
        (
            "backbone.layers.0.mixer.D",
            torch.zeros(32, dtype=torch.int64),
            r"not floating point: backbone\.layers\.0\.mixer\.D",
        ),
    ],
)
def test_all_or_nothing(name: str, value: Tensor | None, said: str, tmp_path: Path) -> None:
    path = mmsegmentation(tmp_path / "a.pth", trained())
    content = torch.load(path, weights_only=True)
    content["state_dict"].pop(name, None)
    if value is not None:
        content["state_dict"][name] = value
    torch.save(content, path)
    model = UperNet(backbone(), 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        load_checkpoint(model, path)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.task is None


# ---- a backbone to start from ------------------------------------------------------------------------------


def start(model: vimcore.VisionMamba, path: Path, **settings: Any) -> list[str]:
    return starting.start_without_head(
        model, ClassificationSettings().merged({"init": str(path), **settings})
    )


@pytest.mark.parametrize("kind", ["vimcore", "authors"])
@pytest.mark.parametrize("token", ["middle", "double", "head"])
def test_the_rows_of_class_tokens_are_taken_out(kind: str, token: str, tmp_path: Path) -> None:
    """Before the table is resized; the authors' files do not say where the token stands."""
    rope = kind == "authors" and token == "head"
    classifier = backbone(class_token=token, num_classes=7, img_size=48, rope=rope)
    path = tmp_path / "classifier"
    if kind == "vimcore":
        classifier.save(path)
    else:
        torch.save({"model": classifier.state_dict()}, path)
    model = backbone(img_size=64, rope=rope)
    notes = start(model, path)
    rows = {"middle": [4], "double": [0, 10], "head": [0]}[token]
    kept = [row for row in range(9 + len(rows)) if row not in rows]
    wanted = resize_pos_embed(classifier.pos_embed.detach()[:, kept], (3, 3), (4, 4), "none")
    assert torch.equal(model.pos_embed, wanted)
    assert torch.equal(model.layers[3].mixer.D, classifier.layers[3].mixer.D)
    assert f"class token left out, with its row of the position table ({token})" in notes
    assert "position table resized to 4 x 4 patches (correct)" in notes
    assert "left aside: head" in notes


def test_the_class_token_stays_where_the_network_has_one(tmp_path: Path) -> None:
    classifier = backbone(class_token="middle", num_classes=7)
    classifier.save(tmp_path / "a")
    model = backbone(class_token="middle")
    start(model, tmp_path / "a")
    assert torch.equal(model.pos_embed, classifier.pos_embed)
    assert torch.equal(model.cls_token, classifier.cls_token)
    backbone().save(tmp_path / "a")
    with pytest.raises(ValueError, match="missing: cls_token"):
        start(model, tmp_path / "a")


@pytest.mark.parametrize("kind", ["vimcore", "mmsegmentation", "detectron2"])
def test_from_networks_with_heads(kind: str, tmp_path: Path) -> None:
    source, path = trained(), tmp_path / "a"
    if kind == "vimcore":
        source.save(path)
    elif kind == "mmsegmentation":
        mmsegmentation(path, source)
    else:
        state = {f"backbone.net.{k}": v for k, v in source.backbone.state_dict().items() if k[:4] != "norm"}
        further = ("backbone.simfp_2.0.weight", "proposal_generator.rpn_head.x", "roi_heads.mask_head.y")
        state.update({name: torch.zeros(1) for name in further})
        torch.save({"model": state, "iteration": 9}, path)
    model = backbone()
    notes = start(model, path)
    for name, value in source.backbone.state_dict().items():
        if kind != "detectron2" or name != "norm_f.weight":
            assert torch.equal(model.state_dict()[name], value)
    aside = {
        "mmsegmentation": "left aside: auxiliary_head, decode_head, fpn1, fpn2",
        "detectron2": "left aside: backbone, proposal_generator, roi_heads",
    }
    if kind in aside:
        assert aside[kind] in notes
    assert ("norm_f.weight is not in the file and stays as it is" in notes) == (kind == "detectron2")


def test_from_images_of_other_channels(tmp_path: Path) -> None:
    backbone(num_classes=3).save(tmp_path / "a")
    model = backbone(in_chans=4)
    assert "patch embedding adapted from 3 to 4 channels" in start(model, tmp_path / "a")
    torch.save({**backbone().state_dict(), "other": torch.zeros(1)}, tmp_path / "b")
    with pytest.raises(ValueError, match="unexpected: other"):
        start(backbone(), tmp_path / "b")


# ---- vimcore convert ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["uper", "rotated", "fcn", "linear", "segmenter"])
def test_convert(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"pool": "mean"}
    make: Callable[..., Segmentation] = FCN
    if head == "uper":  # what the authors' configurations have, as tensors do not tell
        make = partial(UperNet, taps="mixer", indices=[1, 1, 2, 3], aux=False, dropout=0.1)
    elif head == "rotated":
        make = UperNet
        options.update(rope=True, rope_residual=True, average_directions=False, rope_grid=4)
    elif head == "segmenter":
        make = Segmenter
    elif head == "linear":
        make = partial(FCN, convs=0)
    wanted = trained(make, img_size=64, **options)
    source, out = mmsegmentation(tmp_path / "a.pth", wanted, "module."), tmp_path / "b.safetensors"
    more = ["--set", "indices=[1, 1, 2, 3]"] if head == "uper" else []
    assert main(["convert", str(source), str(out), *more]) == 0
    printed = capsys.readouterr().out
    for said in ("average_directions=", "resize=[64, 256]", "windows of 64 x 64", "preprocess="):
        assert said in printed
    assert ("taps=" in printed) == (head in ("uper", "rotated"))
    assert ("indices=" in printed) == (head == "rotated")
    model = load(out)
    assert (model.head, model.options) == (wanted.head, wanted.options)
    assert torch.equal(model(images((64, 64))), wanted(images((64, 64))))
    assert model.task is not None
    assert model.task.classes == NAMES
    assert model.task.resize == (64, 256)


def test_convert_says_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = mmsegmentation(tmp_path / "a.pth", trained(FCN), CLASSES=NAMES[:2]), tmp_path / "b"
    labels = tmp_path / "labels.txt"
    for more, said in (
        (["--set", "embed_dim=32"], "misshapen: backbone.patch_embed.proj.weight"),
        (["--set", "taps=stream"], "[FCN] 'taps': no option of this head"),
        (["--set", "convs=3"], "missing: decode_head.convs.2.conv.weight"),
        (["--labels", str(labels)], "labels: expected 3"),
    ):
        labels.write_text("a\nb\n")
        assert main(["convert", str(source), str(out), *more]) == 1
        assert said in capsys.readouterr().err
        assert not out.exists()
    labels.write_text("a\nb\nc\n")
    assert main(["convert", str(source), str(out), "--labels", str(labels), "--set", "resize=null"]) == 0
    assert load(out).task.classes == ("a", "b", "c")
    assert load(out).task.resize is None
    assert main(["convert", str(out), str(tmp_path / "c")]) == 1
    assert "needs no conversion" in capsys.readouterr().err

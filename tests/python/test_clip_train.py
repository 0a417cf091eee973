# SPDX-License-Identifier: Apache-2.0
"""`vimcore train --task clip`: data with captions, recalls, runs, and words that were learnt."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from report_checks import read_report
from torch.utils.data import Dataset
from train_helpers import folder
from vimcore import clip, tasks
from vimcore.cli import main
from vimcore.clip.losses import Pairs
from vimcore.clip.towers import constrain
from vimcore.data.captions import CaptionedTraining, collate, open_captioned, training_and_validation
from vimcore.data.classes import Sample
from vimcore.data.coloured_digits import NAMES, TEMPLATES, coloured_digits, is_held_out
from vimcore.tasks.clip.evaluation import Embedded, recalls
from vimcore.tasks.clip.found import read_found
from vimcore.tasks.clip.settings import ClipSettings
from vimcore.train.optimizer import create_optimizer
from vimcore.train.presets import PRESETS, recipe
from vimcore.train.run import Run

SMALL = ["--embed-dim", "16", "--depth", "2", "--batch-size", "8", "--val-fraction", "0.25", "--epochs", "2"]
SMALL += [
    "--space-dim",
    "8",
    "--text-width",
    "8",
    "--text-heads",
    "2",
    "--text-layers",
    "1",
    "--text-context",
    "8",
]


def captioned(path: Path) -> Path:
    """A folder of 36 pictures of digits, most with a text of one or two captions."""
    folder(path)
    for picture in path.rglob("*.png"):
        digit = picture.parent.name
        number = int(picture.stem)
        if number != 3:
            more = f"\na drawing of {digit}\n\n" if number % 2 else "\n"
            picture.with_suffix(".txt").write_text(
                f"\ufeffa {digit}, number {number}{more}", encoding="utf-8"
            )
    (path / "digit 0" / "alone.txt").write_text("nothing")
    return path


# ---- data --------------------------------------------------------------------------------------------------


def test_folders_with_texts(tmp_path: Path) -> None:
    found = open_captioned(str(captioned(tmp_path / "photos")))
    assert len(found) == 33
    place = found.images.files.index(str(tmp_path / "photos" / "digit 1" / "005.png"))
    assert found.captions[place] == ("a digit 1, number 5", "a drawing of digit 1")
    assert found.images.passed_over == {"images without a caption": 3, "texts without an image": 1}
    train, valid, about = training_and_validation(str(tmp_path / "photos"), None, 0.25)
    assert (len(train), len(valid)) == (25, 8)
    assert "every 4th image" in about
    assert not {*train.images.files} & {*valid.images.files}
    assert train.fingerprint() != valid.fingerprint()
    (tmp_path / "photos" / "digit 1" / "005.txt").write_text("other")
    assert open_captioned(str(tmp_path / "photos")).fingerprint() != found.fingerprint()


def test_lists(tmp_path: Path) -> None:
    path = tmp_path / "list.csv"
    path.write_text('path,caption\na.png,one\nsub/b.png,"two, or three"\na.png,another one\na.png,one\n')
    found = open_captioned(str(path))
    assert found.images.files == [str(tmp_path / "a.png"), str(tmp_path / "sub/b.png")]
    assert found.captions == [("one", "another one"), ("two, or three",)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "path,label\na.png,b\n", "expected the columns path and caption"),
        ("a.csv", "path,caption\n", "no rows below"),
        ("a.tsv", "path\tcaption\na.png\tb\nb.npy\tc\n", "expected pictures or .npy files, found both"),
        ("a/b.txt", "x", "no images with captions.*texts without an image"),
        ("a/b.png", "x", "no images with captions.*1 images without a caption"),
    ],
)
def test_data_that_does_not_fit(name: str, content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        open_captioned(str(path if "/" not in name else path.parent))


def test_texts_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt: expected UTF-8, got byte 0xe9"):
        open_captioned(str(tmp_path))


class _Images(Dataset[Sample]):
    def __getitem__(self, key: Any) -> Sample:
        index = torch.tensor(key[0])
        return Sample(torch.zeros(1), index, index)


def test_batches_know_which_captions_fit() -> None:
    captions = [("a", "b"), ("b",), ("c", "d", "e"), ("f",)]
    data = CaptionedTraining(_Images(), captions, lambda text: torch.tensor([ord(text)]))
    drawn = {chr(int(data[(2, seed)].tokens)) for seed in range(30)}
    assert drawn == {"c", "d", "e"}
    batch = collate([data[(index, 1)] for index in range(4)])
    texts = [chr(int(tokens)) for tokens in batch.tokens]
    fits = [[text in own for text in texts] for own in captions]
    pairs = Pairs.known(batch.texts, batch.captions)
    assert pairs.of_images.tolist() == fits
    assert pairs.of_texts.tolist() == np.transpose(fits).tolist()


def test_coloured_digits() -> None:
    """Pairs that are held out are balanced, are in no training caption, and are all in validation."""
    held = [(d, c) for d in range(10) for c in range(6) if is_held_out(d, c)]
    assert len(held) == 20
    assert {sum(d == digit for d, _ in held) for digit in range(10)} == {2}
    train, valid = coloured_digits(False), coloured_digits(True)
    assert not {6 * d + c for d, c in held} & set(train.images.labels)
    assert set(valid.images.labels) == set(range(60))
    assert train.captions[0] == tuple(t.format(NAMES[train.images.labels[0]]) for t in TEMPLATES)
    assert (len(train.images), len(valid.images)) == (5752, 6 * 359)


# ---- recalls -----------------------------------------------------------------------------------------------


def test_recalls_by_hand() -> None:
    rng = np.random.default_rng(0)
    images, texts = (rng.standard_normal((n, 4)).astype(np.float32) for n in (30, 40))
    own = [np.array([i, 30 + i % 10]) for i in range(30)]
    values = recalls(Embedded(images, np.arange(30), texts, [""] * 40, own, {}))
    near = images @ texts.T
    for k in (1, 5, 10):
        first = np.argsort(-near, 1)[:, :k]
        image = np.mean([bool({*row} & {*mine}) for row, mine in zip(first, own)])
        first = np.argsort(-near, 0)[:k].T
        text = np.mean([any(j in own[i] for i in row) for j, row in enumerate(first)])
        assert (values[f"image_r{k}"], values[f"text_r{k}"]) == pytest.approx((image, text))
        assert values[f"r{k}"] == pytest.approx((image + text) / 2)
    same = np.ones((4, 2), np.float32)
    blind = Embedded(same, np.arange(4), same, [""] * 4, [np.array([i]) for i in range(4)], {})
    assert recalls(blind)["r1"] == 0  # equal similarities are no hits


# ---- runs --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gone on with bit for bit; evaluated, plotted, shown; its image tower starts a classifier."""
    photos = captioned(tmp_path / "photos")
    flags = ["train", "--preset", "digits-clip", "--data", str(photos), "--augment", "crop", *SMALL]
    flags += ["--eval-every", "1", "--loss", "siglip", "--ema", "0.9"]
    assert main([*flags, "--out", str(tmp_path / "whole"), "--json"]) == 0
    out, err = capsys.readouterr()
    best = json.loads(out)["best"]
    assert re.search(r"of the first \d+ captions \d+ have more than 8 tokens and lose their end", err)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_stop_signal", lambda run: 15 if run.loop.step == 2 else 0)
        assert main([*flags, "--out", str(tmp_path / "parts")]) == 128 + 15
    assert main(["train", "--resume", str(tmp_path / "parts")]) == 0
    for name in ("last.safetensors", "last.image.safetensors", "last_ema.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    capsys.readouterr()

    assert main(["eval", str(tmp_path / "whole" / "best.safetensors"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 8
    assert found["r1"] == pytest.approx(best["r1"])
    assert main(["plot", str(tmp_path / "whole"), "--format", "html", "--mistakes", "3"]) == 0
    report = read_report(tmp_path / "whole" / "report.html")
    assert report.headings[:2] == ["Training", "What captions find"]
    assert len(report.pictures) == 4 + 3 * read_found(tmp_path / "whole" / "eval.npz").panels.shape[1]
    capsys.readouterr()
    assert main(["plot", str(tmp_path / "whole")]) == 0
    written = capsys.readouterr().out.split()
    assert [Path(name).name for name in written] == ["curves.png", "found.png"]
    shown = read_found(tmp_path / "whole" / "eval.npz")
    assert shown.panels.shape == (len(shown.captions), 6, 96, 96, 3)
    assert found["captions"] == len(shown.captions)
    model = clip.load(tmp_path / "whole" / "best.safetensors")
    picture = shown.files[0, 0]
    image = vimcore.Runtime(tmp_path / "whole" / "best.image.safetensors").embed(picture)
    text = model.encode_text(clip.Tokenizer(8)(shown.captions[0]), normalize=True)[0]
    cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(image), text, 0)
    assert cosine.item() == pytest.approx(float(shown.cosines[0, 0]), abs=1e-4)
    assert main(["info", str(tmp_path / "whole" / "best.safetensors")]) == 0
    assert "task        clip, head siglip" in capsys.readouterr().out
    assert main(["predict", "--weights", str(tmp_path / "whole" / "best.safetensors"), picture]) == 1
    assert "`vimcore search` finds pictures by a sentence" in capsys.readouterr().err
    assert main(["predict", "--weights", str(tmp_path / "whole" / "best.image.safetensors"), picture]) == 1
    assert "an image tower, whose outputs are no classes" in capsys.readouterr().err

    start = ["train", "--preset", "digits", "--data", str(photos), "--epochs", "1", "--in-chans", "3"]
    start += ["--mean", *["0.3"] * 3, "--std", *["0.38"] * 3, *SMALL[:6], "--out", str(tmp_path / "tuned")]
    assert main([*start, "--init", str(tmp_path / "whole" / "best.image.safetensors")]) == 0
    assert "new head for 3 classes" in capsys.readouterr().err


def test_settings_that_do_not_fit() -> None:
    settings, _ = recipe(ClipSettings, "clip-tiny", {})
    for changes, said in (
        ({"accumulate": 2}, "accumulate: expected 1, pairs of one forward pass"),
        ({"batch_size": 1}, "batch_size: pairs are told from each other"),
        ({"loss": "ce"}, "loss: expected one of clip, siglip"),
        ({"hflip": 2.0}, "hflip: expected a probability"),
    ):
        with pytest.raises(ValueError, match=said):
            settings.merged(changes)


def test_optimizer_groups() -> None:
    """Temperature, tokens and position tables do not decay; blocks of the image tower learn by layer."""
    values = {**PRESETS["digits-clip"], "class_token": "middle", "layer_decay": 0.5, "batch_size": 8}
    task = tasks.create(ClipSettings().merged(values))
    task.data()
    model, _ = task.build()
    optimizer = create_optimizer(model, task.settings, 1e-3, task.layers(), task.layer_decay())
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)]: g["weight_decay"] > 0 for g in optimizer.param_groups for p in g["params"]}
    scale = {names[id(p)]: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    for name in ("logit_scale", "positional_embedding", "visual.trunk.cls_token", "visual.trunk.pos_embed"):
        assert not decayed[name]
    assert decayed["token_embedding.weight"]
    rates = [scale[f"visual.trunk.layers.{i}.mixer.in_proj.weight"] for i in range(4)]
    assert all(b == pytest.approx(2 * a) for a, b in itertools.pairwise(rates))
    assert scale["visual.head.proj.weight"] == scale["text_projection"] == 1


@pytest.mark.slow
def test_words_that_were_learnt_apart_are_understood_together() -> None:
    """A loop by hand: digits in colours by name, 95 % of pairs that were shown, 75 % of those that were not.

    tests/bench/clip_proof.py is the same by `vimcore train`, longer.
    """
    torch.manual_seed(0)
    rng, updates, peak = np.random.default_rng(0), 240, 3e-3
    train, valid = coloured_digits(False), coloured_digits(True)

    def normalised(pixels: Any) -> torch.Tensor:
        return ((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.3) / 0.38).contiguous()

    pixels, labels = normalised(train.images.pixels), train.images.labels
    backbone = vimcore.VisionMamba(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_classes=0, memory="fast"
    )
    model = clip.create(backbone, 64, width=64, layers=2, heads=4, context=10)
    tokenizer, loss = clip.Tokenizer(10), clip.Contrastive()
    shown = np.unique(labels)
    texts = torch.stack([tokenizer([t.format(NAMES[pair]) for t in TEMPLATES]) for pair in shown])
    places = [np.flatnonzero(labels == pair) for pair in shown]
    optimizer = torch.optim.AdamW(model.parameters(), peak, (0.9, 0.98), weight_decay=0.1, fused=True)
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (update + 1) / 20) * (1 + np.cos(np.pi * update / updates)) / 2
        images = pixels[[rng.choice(place) for place in places]]
        tokens = texts[torch.arange(len(shown)), rng.integers(len(TEMPLATES), size=len(shown))]
        optimizer.zero_grad()
        loss(*model(images, tokens)).backward()
        optimizer.step()
        constrain(model)
    model.eval()
    with torch.no_grad():
        found = clip.zero_shot(model, NAMES, TEMPLATES)(normalised(valid.images.pixels)).argmax(1).numpy()
    right = found == valid.images.labels
    seen = np.isin(valid.images.labels, shown)
    assert right[seen].mean() >= 0.95
    assert right[~seen].mean() >= 0.75

# SPDX-License-Identifier: Apache-2.0
"""`vimcore search`: by a sentence and by a picture, its index, what cannot be read, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vimcore
from train_helpers import folder
from vimcore import _core, clip
from vimcore.cli import main
from vimcore.segmentation import FCN
from vimcore.tools import search
from vimcore.tools.embedders import open_embedder, unit
from vimcore.tools.search_index import Index, cache_folder, checksum

SIZES: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """36 readable pictures, one that is not, a text."""
    found = folder(tmp_path / "photos")
    (found / "digit 0" / "broken.png").write_bytes(b"\x89PNG")
    (found / "notes.txt").write_text("x")
    return found


@pytest.fixture
def plain(tmp_path: Path) -> str:
    path = tmp_path / "plain.safetensors"
    torch.manual_seed(1)
    vimcore.VisionMamba(**SIZES, num_classes=3).save(path)
    return str(path)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_by_a_picture(plain: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same as by hand from the tokens; the query is not among the results; the bad picture is named."""
    query = str(photos / "digit 7" / "003.png")
    status = main(["search", "--weights", plain, query, str(photos), "-k", "40", "--batch", "5", "--json"])
    found = lines(capsys)
    assert status == 1
    assert found[0] == {"image": str(photos / "digit 0" / "broken.png"), "error": found[0]["error"]}
    assert [line["rank"] for line in found[1:]] == list(range(1, 36))
    assert query not in [line["image"] for line in found]
    model, steps = vimcore.VisionMamba.load(plain), open_embedder(plain).steps
    at = model._config.class_position

    def vector(name: str) -> torch.Tensor:
        image = _core.preprocess_image(Path(name).read_bytes(), "", steps)
        return torch.nn.functional.normalize(
            model.forward_features(torch.from_numpy(image)[None])[0, at], dim=0
        )

    own = vector(query)
    scores = [line["score"] for line in found[1:]]
    assert scores == sorted(scores, reverse=True)
    for line in found[1:]:
        assert line["score"] == pytest.approx((own @ vector(line["image"])).item(), abs=2e-6)


def test_by_a_sentence(tmp_path: Path, photos: Path, plain: str, capsys: pytest.CaptureFixture[str]) -> None:
    both = tmp_path / "both.safetensors"
    backbone = vimcore.VisionMamba(**SIZES, num_classes=0)
    made = clip.create(backbone, 12, width=8, layers=1, heads=2, context=6).eval()
    clip.save(made, both)
    sheet = tmp_path / "sheet.png"
    arguments = ["search", "--weights", str(both), "a red seven", str(photos), "-k", "3"]
    assert main([*arguments, "--out", str(sheet)]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(sheet)
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert "broken.png: " in err
    assert "passed over: 1 .txt" in err
    assert "1 of 37 images failed" in err
    assert main([*arguments, "--json"]) == 1
    best = lines(capsys)[1]
    assert out.split()[1:3] == [f"{best['score']:.4f}", *best["image"].split()[:1]]
    text = made.encode_text(clip.Tokenizer(6)("a red seven"), normalize=True)[0]
    image = _core.preprocess_image(Path(best["image"]).read_bytes(), "", open_embedder(str(both)).steps)
    cosine = made.encode_image(torch.from_numpy(image)[None], normalize=True)[0] @ text
    assert best["score"] == pytest.approx(cosine.item(), abs=2e-6)
    assert main(["search", "--weights", str(both), "one two three four five six", str(photos)]) == 1
    assert "the sentence has more than 6 tokens" in capsys.readouterr().err
    alone = tmp_path / "alone.safetensors"
    clip.export_image_tower(made, alone)
    for weights in (plain, str(alone)):
        assert main(["search", "--weights", weights, "a red seven", str(photos)]) == 1
        assert "'a red seven' is no file, and these weights know no sentences" in capsys.readouterr().err


def test_files_of_other_tasks(tmp_path: Path, photos: Path) -> None:
    path = tmp_path / "dense.safetensors"
    options: dict[str, Any] = {**SIZES, "num_classes": 0, "class_token": "none"}
    network = FCN(vimcore.VisionMamba(**options), 3).eval()
    network.save(path)
    embedder = open_embedder(str(path))
    image = _core.preprocess_image((photos / "digit 1" / "001.png").read_bytes(), "", embedder.steps)[None]
    with torch.no_grad():
        wanted = network.backbone.forward_features(torch.from_numpy(image)).mean(1).numpy()
    assert np.allclose(unit(embedder.vectors(image)), wanted / np.linalg.norm(wanted), atol=1e-6)


def collected(weights: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[search.Library, int]:
    """What a search knows, and how many pictures it had to read."""
    read: list[bytes] = []
    with monkeypatch.context() as patch:
        inner = search.network_input
        patch.setattr(search, "network_input", lambda d, n, s: read.append(d) or inner(d, n, s))
        found = search.collect(open_embedder(weights), weights, [str(photos)], 16)
    return found, len(read)


def test_index(plain: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors are computed again only for what changed; the same to the bit; a damaged index is made anew."""
    first, read = collected(plain, photos, monkeypatch)
    assert (read, first.reused, len(first.images)) == (37, 0, 36)
    again, read = collected(plain, photos, monkeypatch)
    assert (read, again.reused) == (1, 36)
    assert again.images == first.images
    assert np.array_equal(again.vectors, first.vectors)
    changed = photos / "digit 0" / "000.png"
    changed.write_bytes((photos / "digit 7" / "005.png").read_bytes())
    os.utime(changed, ns=(1, 1))
    (photos / "digit 0" / "001.png").unlink()
    found, read = collected(plain, photos, monkeypatch)
    assert (read, found.reused, len(found.images)) == (2, 34, 35)
    place = found.images.index(str(changed))
    assert np.allclose(
        found.vectors[place], found.vectors[found.images.index(str(photos / "digit 7/005.png"))]
    )
    assert len(Index(checksum(plain), str(photos), 16).kept) == 35
    other = tmp_path / "other.safetensors"
    vimcore.VisionMamba(**SIZES, num_classes=3).save(other)
    assert collected(str(other), photos, monkeypatch)[1] == 36  # an index is of one file of weights
    index = Index(checksum(plain), str(photos), 16).path
    arrays, metadata = _core.read_safetensors(index)
    faults: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({**arrays, "vectors": arrays["vectors"][:, :8].copy()}, metadata),
        ({**arrays, "vectors": arrays["vectors"] * np.nan}, metadata),
        ({**arrays, "vectors": arrays["vectors"][1:]}, metadata),
        ({**arrays, "stamps": arrays["stamps"].astype(np.float32)}, metadata),
        ({**arrays, "names": arrays["names"][5:]}, {}),
        ({"names": arrays["names"]}, metadata),
    ]
    for tensors, about in faults:
        _core.write_safetensors(index, tensors, about)
        found, read = collected(plain, photos, monkeypatch)
        assert read == 36
        assert "made again" in found.notes[0]
    index.write_bytes(b"\xff" * 99)
    assert collected(plain, photos, monkeypatch)[1] == 36
    assert collected(plain, photos, monkeypatch)[1] == 1


def test_without_an_index(
    plain: str, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    query = str(photos / "digit 7" / "003.png")
    assert main(["search", "--weights", plain, query, str(photos), "--no-cache"]) == 1
    assert not cache_folder().exists()
    cache_folder().parent.mkdir(parents=True)
    cache_folder().write_text("a file where the folder should be")
    capsys.readouterr()
    assert main(["search", "--weights", plain, query, str(photos)]) == 1
    out, err = capsys.readouterr()
    assert "the index cannot be kept" in err
    assert len(out.splitlines()) == 20


def test_an_interrupted_search_keeps_what_it_has(
    plain: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search.collect(open_embedder(plain), plain, [str(photos)], 16, watch=interrupt)
    assert collected(plain, photos, monkeypatch)[0].reused == 16


def test_refuses(plain: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    query = str(photos / "digit 7" / "003.png")
    for arguments, said in (
        ([query, str(photos), "--out", "a.jpg"], "expected a name that ends in .png or .svg, got a.jpg"),
        ([str(photos / "digit 0" / "broken.png"), str(photos)], "query: "),
        ([str(photos / "nothing.png"), str(photos)], "No such file"),
        ([query, str(tmp_path / "empty")], "no pictures found"),
    ):
        assert main(["search", "--weights", plain, *arguments]) == 1
        assert said in capsys.readouterr().err


def test_in_bfloat16(plain: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of every task; vectors near those in float32, kept in an index of their own."""
    both, dense = tmp_path / "both.safetensors", tmp_path / "dense.safetensors"
    made = clip.create(vimcore.VisionMamba(**SIZES, num_classes=0), 12, width=8, layers=1, heads=2, context=6)
    clip.save(made.eval(), both)
    options: dict[str, Any] = {**SIZES, "num_classes": 0, "class_token": "none"}
    FCN(vimcore.VisionMamba(**options), 3).eval().save(dense)
    images = np.random.default_rng(0).standard_normal((3, 3, 16, 16), dtype=np.float32)
    for path in (plain, str(both), str(dense)):
        wide, narrow = open_embedder(path), open_embedder(path, dtype="bfloat16")
        assert (wide.dtype, narrow.dtype) == ("float32", "bfloat16")
        found = [
            unit(narrow.vectors(images)),
            *([narrow.text("a red")[0][None]] if narrow.reads_text else []),
        ]
        wanted = [unit(wide.vectors(images)), *([wide.text("a red")[0][None]] if wide.reads_text else [])]
        for a, b in zip(found, wanted, strict=True):
            assert a.dtype == np.float32
            assert (a * b).sum(1).min() > 0.999
            assert not np.array_equal(a, b)
    query = str(photos / "digit 7" / "003.png")
    scores: dict[str, list[Any]] = {}
    for dtype in ("float32", "bfloat16", "float32"):
        command = ["search", "--weights", plain, query, str(photos), "--json", "--dtype", dtype]
        assert main(command) == 1
        scores.setdefault(dtype, []).append([line.get("score") for line in lines(capsys)])
    assert scores["float32"][0] == scores["float32"][1] != scores["bfloat16"][0]
    assert len(list(cache_folder().iterdir())) == 2
    assert main(["search", "--weights", plain, query, str(photos), "--dtype", "float16"]) == 1
    assert "--dtype: expected 'float32' or 'bfloat16' on cpu, got 'float16'" in capsys.readouterr().err

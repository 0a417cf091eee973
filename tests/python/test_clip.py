# SPDX-License-Identifier: Apache-2.0
"""`vimcore.clip`: towers, files, losses over processes, zero-shot; everything against open_clip's own."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import vimcore
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional as F
from vimcore import _core, clip
from vimcore.clip.losses import Pairs
from vimcore.clip.towers import constrain
from vimcore.timm import TimmVisionMamba
from vimcore.weights.info import describe_file
from vimcore.weights.metadata import TASK_KEY

SIZES: dict[str, Any] = {
    "img_size": (16, 24),
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 2,
    "num_classes": 0,
}
TEXT: dict[str, Any] = {"width": 8, "layers": 2, "heads": 2, "context": 9}


def model(loss: str = "clip", **changes: Any) -> Any:
    torch.manual_seed(3)
    found = clip.create(vimcore.VisionMamba(**{**SIZES, **changes}), 12, loss=loss, **TEXT)
    with torch.no_grad():
        for parameter in found.visual.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return found.eval()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, *SIZES["img_size"], generator=torch.Generator().manual_seed(1))


def test_tokens_are_open_clips() -> None:
    texts = ["A red  three", "café &amp; <b>bread</b>", "", "one two three four five six seven eight nine"]
    tokenizer = clip.Tokenizer(9)
    assert torch.equal(tokenizer(texts), open_clip.SimpleTokenizer(context_length=9)(texts))
    assert tokenizer.cut == 2


@pytest.mark.parametrize("token", ["none", "head", "double", "middle"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_files_hold_both_towers(token: str, loss: str, tmp_path: Path) -> None:
    """Outputs to the bit; the image tower alone gives `Runtime` the same coordinates."""
    both, alone = tmp_path / "both.safetensors", tmp_path / "alone.safetensors"
    made, x = model(loss, class_token=token), images()
    steps = {
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "resize": 25,
        "crop": [16, 24],
        "interpolation": "bicubic",
    }
    clip.save(made, both, preprocess=steps)
    found = clip.load(both)
    tokens = clip.Tokenizer(9)(["a", "b", "c"])
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(made(x, tokens), found(x, tokens)))
        assert len(found(x, tokens)) == (3 if loss == "clip" else 4)
        wanted = made.encode_image(x)
    assert not found.training
    assert dict(found.visual.preprocess) == steps
    clip.export_image_tower(found, alone)
    runtime = vimcore.Runtime(alone)
    assert runtime.is_embedding
    assert runtime.preprocess == steps
    assert np.allclose(runtime(x.numpy()), wanted, atol=1e-6)
    assert np.array_equal(runtime.embeddings(x.numpy()), runtime(x.numpy()))
    assert torch.allclose(vimcore.VisionMamba.load(alone)(x), wanted, atol=1e-6)
    facts = describe_file(str(both))
    count = sum(p.numel() for p in made.parameters())
    assert (facts["task"], facts["head"], facts["parameters"], facts["embed_dim"]) == (
        "clip",
        loss,
        count,
        12,
    )


def test_files_in_bfloat16(tmp_path: Path) -> None:
    """What computing in bfloat16 rounds is rounded in the file: both files then give the same, to the bit."""
    made, x, tokens = model(), images(), clip.Tokenizer(9)(["a", "b", "c"])
    found = []
    for name, dtype in (("wide", None), ("narrow", "bfloat16")):
        both, alone = tmp_path / f"{name}.safetensors", tmp_path / f"{name} alone.safetensors"
        clip.save(made, both, dtype=dtype)
        clip.export_image_tower(made, alone, dtype=torch.bfloat16 if dtype else None)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs = clip.load(both)(x, tokens)
        found.append([*outputs, torch.from_numpy(vimcore.Runtime(alone, dtype="bfloat16")(x.numpy()))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    kinds = {name: kind for name, kind, _ in _core.safetensors_header(tmp_path / "narrow.safetensors")[0]}
    narrow = {name for name, kind in kinds.items() if kind == "bf16"}
    block = "transformer.resblocks.0."
    assert {f"{block}attn.in_proj_weight", f"{block}mlp.c_fc.weight", "text_projection"} <= narrow
    assert "visual.trunk.layers.0.mixer.in_proj.weight" in narrow
    assert not {"token_embedding.weight", "positional_embedding", f"{block}ln_1.weight"} & narrow
    assert {kinds[name] for name in kinds.keys() - narrow} == {"f32"}


def test_open_clip_makes_and_reads_our_towers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By name, with its transforms; its image tower is exported, its weights are our file's."""
    name = "vimcore_vim_tiny_patch16_224"
    made, _, transform = open_clip.create_model_and_transforms(name, force_context_length=9)
    made.eval()
    clip.save(made, tmp_path / "both.safetensors")
    again = open_clip.create_model(
        name, pretrained=str(tmp_path / "both.safetensors"), force_context_length=9
    ).eval()
    ours = clip.load(tmp_path / "both.safetensors")
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (250, 300, 3), np.uint8))
    x = transform(picture)[None]
    with torch.no_grad():
        wanted = made.encode_image(x)
        assert torch.equal(again.encode_image(x), wanted)
        assert torch.equal(ours.encode_image(x), wanted)
    clip.export_image_tower(made, tmp_path / "alone.safetensors")
    runtime = vimcore.Runtime(tmp_path / "alone.safetensors")
    assert np.allclose(runtime(x.numpy()), wanted, atol=1e-5)
    cosine = F.cosine_similarity(torch.from_numpy(runtime.embed(picture)), wanted[0], 0)
    assert cosine > 0.999  # the same resize and crop, but for rounding


@torch.no_grad()
def test_projections_with_a_bias() -> None:
    """A layer behind the network, and the network's own head, as timm_proj 'linear' and '' may have it."""
    behind, own = model(), model()
    behind.visual.head.proj = torch.nn.Linear(16, 12)
    own.visual.trunk.reset_classifier(12)
    own.visual.head = torch.nn.Sequential()
    torch.nn.init.normal_(own.visual.trunk.head.bias)
    for network in (behind, own):
        wanted = network.encode_image(images())
        torch.testing.assert_close(clip.image_tower(network)(images()), wanted)


def test_without_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("vimcore.clip")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"vimcore\.clip needs open_clip; install it with: .*\[clip\]"):
        importlib.import_module("vimcore.clip")


def test_what_no_file_describes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(TypeError, match="expected a VisionMamba, got Linear"):
        clip.create(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has a head for 5 classes"):
        model(num_classes=5)
    with pytest.raises(ValueError, match="gives the projection every token"):
        model(class_token="none", pool="max")
    with pytest.raises(ValueError, match=r"heads: 3 do not divide the width 8"):
        clip.create(vimcore.VisionMamba(**SIZES), 4, width=8, layers=1, heads=3)
    with pytest.raises(ValueError, match="loss: expected one of clip, siglip, got 'ce'"):
        model("ce")
    with pytest.raises(TypeError, match="with an image tower of vimcore, got a Linear"):
        clip.export_image_tower(torch.nn.Linear(2, 2), path)
    other = model()
    other.visual.head = torch.nn.Sequential(torch.nn.Linear(16, 12), torch.nn.GELU())
    with pytest.raises(ValueError, match=r"projection: expected one linear layer .* got Linear and GELU"):
        clip.export_image_tower(other, path)
    other = model()
    other.text_pool_type = "last"
    with pytest.raises(ValueError, match="how the text tower is read: expected argmax, got last"):
        clip.save(other, path)
    other = model()
    other.ln_final = torch.nn.LayerNorm(8, elementwise_affine=False)
    with pytest.raises(ValueError, match=r"missing: ln_final\.weight"):
        clip.save(other, path)
    trunk = TimmVisionMamba(**SIZES)
    other = clip.create(trunk, 12, **TEXT)
    trunk.reset_classifier(0, "avg")
    with pytest.raises(ValueError, match="mean of the patches"):
        clip.export_image_tower(other, path)
    assert not path.exists()


# ---- files that were tampered with -------------------------------------------------------------------------


def rewritten(path: Path, tensors: dict[str, Any] | None = None, **changes: Any) -> Path:
    """The file with some tensors changed (None: gone) and some values of its task (...: gone)."""
    arrays, metadata = _core.read_safetensors(path)
    arrays.update(tensors or {})
    task = {**json.loads(metadata[TASK_KEY]), **changes}
    metadata[TASK_KEY] = json.dumps({key: value for key, value in task.items() if value is not ...})
    _core.write_safetensors(path, {k: v for k, v in arrays.items() if v is not None}, metadata)
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": "segmenter"}, "head: expected one of clip, siglip, got 'segmenter'"),
        ({"head": "siglip"}, "missing: logit_bias"),
        ({"options": ...}, "options: missing"),
        ({"classes": ["a"]}, "'classes': unknown"),
        ({"embed_dim": 0}, "embed_dim: expected a whole number from 1"),
        ({"embed_dim": 10**9}, "embed_dim: expected a whole number from 1 to 65536"),
        ({"embed_dim": 13}, "misshapen: .*visual.head.proj.weight|misshapen: text_projection"),
        ({"options": {**TEXT, "width": 10**12}}, "width: expected at most 65536"),
        ({"options": {**TEXT, "width": 65536, "layers": 256}}, "misshapen: "),
        ({"options": {**TEXT, "layers": 3}}, r"missing: transformer.resblocks.2"),
        ({"options": {**TEXT, "heads": 3}}, "heads: 3 do not divide"),
        ({"options": {**TEXT, "heads": True}}, "heads: expected an integer, got True"),
        ({"options": {**TEXT, "context": 2}}, "context: expected 3 or more"),
        ({"options": {**TEXT, "depth": 2}}, "'depth': no size of the text tower"),
        ({"options": {"width": 8}}, "layers: missing"),
        ({"tensors": {"ln_final.bias": None}}, r"missing: ln_final\.bias"),
        ({"tensors": {"extra": np.zeros(2, np.float32)}}, "unexpected: extra"),
        ({"tensors": {"logit_scale": np.zeros(1, np.float32)}}, "misshapen: logit_scale"),
        (
            {"tensors": {"ln_final.bias": np.zeros(8, np.int32)}},
            "ln_final.bias: expected a float type, got i32",
        ),
    ],
)
def test_damaged_files(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    clip.save(model(), path)
    assert clip.load(rewritten(path))
    rewritten(path, **changes)
    for reader in (clip.load, lambda p: describe_file(str(p))):
        with pytest.raises(ValueError, match=said) as caught:
            reader(path)
        assert str(path) in str(caught.value)


def test_readers_name_each_other(tmp_path: Path) -> None:
    both, plain = tmp_path / "both.safetensors", tmp_path / "plain.safetensors"
    clip.save(model(), both)
    vimcore.VisionMamba(**SIZES).save(plain)
    with pytest.raises(
        ValueError, match=r"holds a classifier or backbone; vimcore.VisionMamba.load reads it"
    ):
        clip.load(plain)
    for load in (vimcore.VisionMamba.load, vimcore.segmentation.load, vimcore.detection.load):
        with pytest.raises(ValueError, match=r"a text tower; vimcore.clip.load reads it"):
            load(both)
    with pytest.raises(_core.Error, match="`vimcore search` runs them"):
        vimcore.Runtime(both)


# ---- losses ------------------------------------------------------------------------------------------------


def features(count: int) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(5)
    return tuple(  # type: ignore[return-value]
        F.normalize(torch.randn(count, 6, generator=made, dtype=torch.float64), dim=1) for _ in range(2)
    )


def test_losses_are_open_clips_where_captions_differ() -> None:
    u, v = features(8)
    scale, bias = torch.tensor(9.0), torch.tensor(-4.0)
    numbers = torch.arange(8)
    for pairs in (None, Pairs.known(numbers, numbers[:, None])):
        ours = clip.Contrastive()(u, v, scale, None, pairs)
        assert torch.allclose(ours, ClipLoss()(u, v, scale), atol=1e-12)
        ours = clip.Sigmoid()(u, v, scale, bias, pairs)
        assert torch.allclose(ours, SigLipLoss()(u, v, scale, bias), atol=1e-12)


TEXTS = torch.tensor([10, 11, 12, 13, 14, 12, 11, 17])  # 12 twice; 11 of different halves
CAPTIONS = torch.stack([TEXTS, torch.tensor([10, 11, 12, 17, 14, 12, 11, 17])], 1)  # 17 fits 3, too


def test_captions_that_fit_are_no_counterexamples() -> None:
    u, v = features(8)
    scale, bias = torch.tensor(9.0, dtype=torch.float64), torch.tensor(-4.0)
    logits = (scale * u @ v.T).numpy()
    fits = np.array([[TEXTS[j] in CAPTIONS[i] for j in range(8)] for i in range(8)])
    assert fits.sum() == 8 + 2 + 2 + 1
    total = pairs = 0.0
    for i in range(8):
        for line, own in ((logits[i], fits[i]), (logits[:, i], fits[:, i])):
            total += np.log(np.exp(line).sum()) - line[own].mean()
        pairs += np.log1p(np.exp(-np.where(fits[i], 1, -1) * (logits[i] - 4))).sum()
    found = Pairs.known(TEXTS, CAPTIONS)
    assert np.array_equal(found.of_images, fits)
    assert np.array_equal(found.of_texts, fits.T)
    assert float(clip.Contrastive()(u, v, scale, None, found)) == pytest.approx(total / 16)
    assert float(clip.Sigmoid()(u, v, scale, bias, found)) == pytest.approx(pairs / 8)


def gradients(loss: Any, u: Tensor, v: Tensor, pairs: Pairs | None) -> tuple[float, list[Tensor]]:
    numbers = (torch.tensor(value, dtype=torch.float64) for value in (9, -4))
    leaves = [x.clone().requires_grad_() for x in (u, v, *numbers)]
    value = loss(*leaves[:3], leaves[3] if isinstance(loss, SigLipLoss) else None, pairs)
    value.backward()
    return value.item(), [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def process(rank: int, folder: str) -> None:
    """One of two, with its half of a batch."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    try:
        u, v, texts, captions = (x.chunk(2)[rank] for x in (*features(8), TEXTS, CAPTIONS))
        both = (Pairs.known(texts, captions), None)
        kinds = (clip.Contrastive, clip.Sigmoid)
        found = [[gradients(kind(), u, v, pairs) for kind in kinds] for pairs in both]
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Means over processes, as DistributedDataParallel takes them, are those of the whole batch."""
    torch.multiprocessing.start_processes(process, (str(tmp_path),), nprocs=2, start_method="fork")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for i, pairs in enumerate((Pairs.known(TEXTS, CAPTIONS), None)):
        for k, kind in enumerate((clip.Contrastive, clip.Sigmoid)):
            value, whole = gradients(kind(), *features(8), pairs)
            values, grads = zip(*(part[i][k] for part in parts))
            assert np.mean(values) == pytest.approx(value)
            for leaf, wanted in enumerate(whole):
                mine = [grad[leaf] for grad in grads]
                found = torch.cat(mine) / 2 if wanted.ndim else torch.stack(mine).mean()
                assert torch.allclose(found, wanted, atol=1e-12), (kind, leaf)


def test_temperature_and_bias_at_the_start() -> None:
    clip_, siglip = model(), model("siglip")
    assert (clip_.logit_scale.exp().item(), clip_.logit_bias) == (pytest.approx(1 / 0.07), None)
    assert siglip.logit_scale.exp().item() == pytest.approx(10)
    assert siglip.logit_bias.item() == -10


def test_temperature_stays_in_range() -> None:
    made = model()
    for value, wanted in ((9.0, np.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        made.logit_scale.data.fill_(value)
        constrain(made)
        assert made.logit_scale.item() == pytest.approx(wanted)


# ---- classes by name ---------------------------------------------------------------------------------------


def test_zero_shot_by_hand() -> None:
    made, x = model(), images()
    names, templates = ["cat", "{dog}"], ["a {}", "{} {x}"]
    classify = clip.zero_shot(made, names, templates)
    tokenizer = clip.Tokenizer(9)
    columns = []
    for name in names:
        texts = [template.replace("{}", name) for template in templates]
        mean = F.normalize(made.encode_text(tokenizer(texts)), dim=1).mean(0)
        columns.append(mean / mean.norm())
    logits = F.normalize(made.encode_image(x), dim=1) @ torch.stack(columns, 1) / 0.07
    assert classify.names == names
    assert torch.allclose(classify(x), logits, atol=1e-5)


def test_zero_shot_refuses() -> None:
    made = model()
    for names in ([], "cat", [""], [1]):
        with pytest.raises(ValueError, match="names: expected a list of texts"):
            clip.zero_shot(made, names)  # type: ignore[arg-type]
    for templates in ([], "a {}", ["a photo"]):
        with pytest.raises(ValueError, match="templates: expected"):
            clip.zero_shot(made, ["cat"], templates)
    with pytest.warns(UserWarning, match="1 sentences lose their end: more than 9 tokens"):
        clip.zero_shot(made, ["one two three four five six seven eight nine"], ["{}"])
    made.vocab_size = 32000
    with pytest.raises(ValueError, match="a vocabulary of 32000, CLIP's has 49408"):
        clip.zero_shot(made, ["cat"])

# SPDX-License-Identifier: Apache-2.0
"""`save_pretrained`, `from_pretrained`, `push_to_hub`: folders, a hub on loopback, timm, the hub's mixin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import vimcore
import vimcore.timm
from hub_server import Hub
from huggingface_hub import ModelCard, PyTorchModelHubMixin, constants
from safetensors.torch import save_file

SIZES: dict[str, Any] = {"img_size": (16, 24), "patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 3}
LABELS = ["a <b>", "c|at", "dög"]


@pytest.fixture
def model() -> vimcore.VisionMamba:
    torch.manual_seed(3)
    return vimcore.VisionMamba(**SIZES, drop_rate=0.1).eval()


@pytest.fixture
def hub(hub: Hub) -> Hub:
    """With a repository of somebody else."""
    hub.files["somebody/else", "x"] = b""
    return hub


def same(a: torch.nn.Module, b: torch.nn.Module) -> None:
    images = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    assert torch.equal(a.eval()(images), b.eval()(images))


# ---- folders -----------------------------------------------------------------------------------------------


def test_folder(model: vimcore.VisionMamba, tmp_path: Path) -> None:
    assert model.save_pretrained(tmp_path / "net", labels=LABELS, config={"mine": 7}) is None
    assert sorted(path.name for path in (tmp_path / "net").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    again = vimcore.VisionMamba.from_pretrained(tmp_path / "net")
    assert not again.training
    assert again.config == model.config
    same(again, model)
    same(vimcore.VisionMamba.from_pretrained(tmp_path / "net" / "model.safetensors"), model)
    assert vimcore.Runtime(tmp_path / "net" / "model.safetensors").labels == LABELS
    facts = json.loads((tmp_path / "net" / "config.json").read_text())
    assert (facts["config"], facts["label_names"], facts["mine"]) == (model.config, LABELS, 7)
    larger = vimcore.VisionMamba.from_pretrained(
        str(tmp_path / "net"), img_size=(32, 32), dynamic_img_size=True
    )
    assert larger(torch.zeros(1, 3, 40, 16)).shape == (1, 3)
    assert larger.config["img_size"] == [32, 32]
    half = tmp_path / "half"
    model.save_pretrained(half, dtype="bfloat16")
    assert (half / "model.safetensors").stat().st_size < (
        tmp_path / "net" / "model.safetensors"
    ).stat().st_size


def test_card(model: vimcore.VisionMamba, tmp_path: Path) -> None:
    """The hub's own parser reads it; architecture, figures and classes stand in it."""
    given = {
        "license": "cc-by-4.0",
        "datasets": ["imagenet-1k"],
        "metrics": {"top-1 accuracy, %": 71.25},
        "tags": ["mine"],
        "description": "Learnt on: photos\nof cats.",
    }
    model.save_pretrained(tmp_path, repo_id="me/cats", labels=LABELS, model_card_kwargs=given)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert (card.data.library_name, card.data.pipeline_tag) == ("vimcore", "image-classification")
    assert card.data.tags == ["vision-mamba", "vim", "mamba", "vimcore", "mine"]
    learnt = sum(p.numel() for p in model.parameters())
    for text in (
        "# cats\n",
        "Learnt on: photos of cats.",
        "from_pretrained('me/cats')",
        f"| parameters | {learnt:,} |",
        f"| multiply-adds of an image, scans included | {model.flops():,} |",
        "| image | 16 x 24 pixels, 3 channels, 7 tokens |",
        "| top-1 accuracy, % | 71.25 |",
        "| `embed_dim` | `16` |",
        "a <b>, c|at, dög",
    ):
        assert text in card.content, text
    (tmp_path / "README.md").write_text("by hand")
    model.save_pretrained(tmp_path, model_card_kwargs={"license": "mit"})
    assert (tmp_path / "README.md").read_text() == "by hand"
    for wrong, text in (({"licence": "x"}, "got licence"), ({"metrics": {"a": "b"}}, "names with numbers")):
        with pytest.raises(ValueError, match=text):
            model.save_pretrained(tmp_path / "x", model_card_kwargs=wrong)
    with pytest.raises(ValueError, match="config: pretrained_cfg: follows"):
        model.save_pretrained(tmp_path / "y", config={"pretrained_cfg": 1})
    with pytest.raises(TypeError, match="private: only with push_to_hub=True"):
        model.save_pretrained(tmp_path / "z", private=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_classes": 0},
        {"class_token": "none", "pool": "all"},
        {"class_token": "registers", "registers": 3},
        {"directions": "block", "rope": True, "class_token": "head", "layer_scale": 0.1},
        {"in_chans": 5},
        {"frames": 4},
    ],
)
def test_any_network(changes: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(1)
    made = vimcore.VisionMamba(**{**SIZES, **changes}).eval()
    made.save_pretrained(tmp_path)
    again = vimcore.VisionMamba.from_pretrained(tmp_path)
    assert again.config == made.config
    shape = (1, again.config["in_chans"], *((4,) if again.config["frames"] else ()), 16, 24)
    images = torch.randn(shape)
    assert torch.equal(again(images), made(images))
    facts = json.loads((tmp_path / "config.json").read_text())
    assert ("architecture" in facts) == ("frames" not in changes and "in_chans" not in changes)
    assert "multiply-adds" in (tmp_path / "README.md").read_text()


def test_timm_reads_the_folder(model: vimcore.VisionMamba, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, labels=LABELS)
    found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    same(found, model)
    assert found.pretrained_cfg["label_names"] == LABELS
    assert found.pretrained_cfg["input_size"] == (3, 16, 24)
    assert found.config["drop_rate"] == 0.1
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=9)
    assert torch.equal(other.norm_f.weight, model.norm_f.weight)
    found.save_pretrained(tmp_path / "again")
    pooled = timm.create_model(f"local-dir:{tmp_path}")
    pooled.reset_classifier(3, global_pool="avg")
    with pytest.raises(ValueError, match="no class token network reads with global_pool='avg'"):
        pooled.save_pretrained(tmp_path / "pooled")
    assert not (tmp_path / "pooled" / "config.json").exists()
    same(vimcore.VisionMamba.from_pretrained(tmp_path / "again"), model)
    same(vimcore.timm.TimmVisionMamba.from_pretrained(tmp_path / "again"), model)


def test_folders_of_the_mixin(model: vimcore.VisionMamba, tmp_path: Path) -> None:
    """What people have who put huggingface_hub's mixin over a network of ours."""

    class Mixed(PyTorchModelHubMixin, vimcore.VisionMamba):  # type: ignore[misc,name-defined]
        pass

    torch.manual_seed(3)
    mixed = Mixed(**SIZES, memory="fast")
    mixed.save_pretrained(tmp_path)
    assert "config" not in json.loads((tmp_path / "config.json").read_text())
    same(vimcore.VisionMamba.from_pretrained(tmp_path), mixed)
    same(Mixed.from_pretrained(tmp_path), mixed)
    with pytest.raises(ValueError, match=r"holds tensors alone; VisionMamba\.from_pretrained reads them"):
        vimcore.Runtime.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="img_size: tensors without vimcore's metadata"):
        vimcore.VisionMamba.from_pretrained(tmp_path, img_size=32)
    for text, said in (
        ('{"embed_dim": 16, "heads": 3}', "heads"),
        ('{"embed_dim": "wide"}', "embed_dim"),
        ('{"config": 3}', "expected options of VisionMamba"),
        ("[1]", "expected an object of JSON, got list"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json: .*{said}"):
            vimcore.VisionMamba.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"tensors without an architecture, and no config\.json beside them"):
        vimcore.VisionMamba.from_pretrained(tmp_path)


def test_folders_that_are_no_networks(model: vimcore.VisionMamba, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"expected model\.safetensors in the folder, which holds nothing"
    ):
        vimcore.VisionMamba.from_pretrained(tmp_path / "empty")
    model.save_pretrained(tmp_path / "a")
    facts = json.loads((tmp_path / "a" / "config.json").read_text())
    facts["config"]["class_token"] = "head"
    (tmp_path / "a" / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"class_token: 'head', but 'middle' in model\.safetensors"):
        vimcore.VisionMamba.from_pretrained(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(vimcore.Error, match=r"model\.safetensors"):
        vimcore.VisionMamba.from_pretrained(tmp_path / "a")
    with pytest.raises(vimcore.Error, match=r"none\.safetensors"):
        vimcore.VisionMamba.from_pretrained("none.safetensors")


# ---- a hub -------------------------------------------------------------------------------------------------


def test_push_and_pull(model: vimcore.VisionMamba, hub: Hub, tmp_path: Path) -> None:
    address = model.push_to_hub(
        "me/net", labels=LABELS, token="hf_secret", private=True, commit_message="First"
    )
    assert address.startswith(f"{hub.url}/me/net/commit/")
    assert hub.created[0]["name"] == "net"
    assert hub.created[0]["organization"] == "me"
    assert hub.messages == ["First"]
    assert sorted(name for repo, name in hub.files if repo == "me/net") == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    assert set(hub.tokens) - {None} == {"Bearer hf_secret"}
    model.save(tmp_path / "local.safetensors", labels=LABELS)
    assert hub.files["me/net", "model.safetensors"] == (tmp_path / "local.safetensors").read_bytes()
    again = vimcore.VisionMamba.from_pretrained("me/net")
    same(again, model)
    runtime = vimcore.Runtime.from_pretrained("me/net", img_size=(16, 32))
    assert (runtime.labels, runtime.config["img_size"]) == (LABELS, [16, 32])
    assert b"from_pretrained('me/net')" in hub.files["me/net", "README.md"]

    same(timm.create_model("hf-hub:me/net", pretrained=True), model)
    # a new version, and a card that somebody has edited
    hub.files["me/net", "README.md"] = b"by hand"
    with torch.no_grad():
        model.head.bias.add_(1)  # type: ignore[operator]
    assert model.save_pretrained(tmp_path / "f", repo_id="me/net", push_to_hub=True, token="t") is not None
    assert hub.files["me/net", "README.md"] == b"by hand"
    same(vimcore.VisionMamba.from_pretrained("me/net"), model)
    model.push_to_hub("me/net", token="t", model_card_kwargs={"license": "mit"})
    assert b'license: "mit"' in hub.files["me/net", "README.md"]


def test_offline_pull(model: vimcore.VisionMamba, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model.push_to_hub("me/net", token="t")
    vimcore.VisionMamba.from_pretrained("me/net")
    same(vimcore.VisionMamba.from_pretrained("me/net", local_files_only=True), model)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same(vimcore.VisionMamba.from_pretrained("me/net"), model)
    with pytest.raises(RuntimeError, match="HF_HUB_OFFLINE"):
        vimcore.VisionMamba.from_pretrained("me/other")


def test_without_config_json(model: vimcore.VisionMamba, hub: Hub, tmp_path: Path) -> None:
    """A vimcore file says all itself; bare tensors do not."""
    model.save(tmp_path / "a.safetensors")
    hub.files["me/net", "model.safetensors"] = (tmp_path / "a.safetensors").read_bytes()
    same(vimcore.VisionMamba.from_pretrained("me/net"), model)
    save_file(dict(model.state_dict()), tmp_path / "bare.safetensors")
    hub.files["me/bare", "model.safetensors"] = (tmp_path / "bare.safetensors").read_bytes()
    with pytest.raises(RuntimeError, match=r"me/bare/config\.json: the repository holds no such file"):
        vimcore.VisionMamba.from_pretrained("me/bare")


def test_refusals(model: vimcore.VisionMamba, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"vimcore\.create_model\('vim_tiny_patch16_224', pretrained=True\) reads"
    ):
        vimcore.VisionMamba.from_pretrained("hustvl/Vim-tiny-midclstok")
    with pytest.raises(
        RuntimeError, match=r"me/none/model\.safetensors: .* no such repository, or it is private"
    ):
        vimcore.VisionMamba.from_pretrained("me/none")
    with pytest.raises(
        RuntimeError, match=r"somebody/else/model\.safetensors: the repository holds no such file"
    ):
        vimcore.VisionMamba.from_pretrained("somebody/else")
    for status, text in (((401, ""), "refused: .*; log in by"), ((403, ""), "refused: .*; log in by")):
        hub.status = status
        with pytest.raises(RuntimeError, match=r"\[push_to_hub\] me/net: " + ".*" + text):
            model.push_to_hub("me/net", token="t")
    hub.status = None
    with pytest.raises(RuntimeError, match=r"\[push_to_hub\] a/b/c: no name of a repository"):
        model.push_to_hub("a/b/c", token="t")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RuntimeError, match=r"\[push_to_hub\] me/net: "):
        model.push_to_hub("me/net", token="t")


def test_pushes_nothing_that_cannot_be_saved(hub: Hub) -> None:
    model = vimcore.VisionMamba(**SIZES)
    model.head = torch.nn.Sequential(torch.nn.Linear(16, 3))
    with pytest.raises(ValueError, match="head"):
        model.push_to_hub("me/net", token="t")
    assert hub.created == []

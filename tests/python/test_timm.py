# SPDX-License-Identifier: Apache-2.0
"""timm's own factories, loops and wrappers on our models, against the models themselves."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import torch
import vimcore
import vimcore.timm
from timm_helpers import NAME, SMALL, images, small
from vimcore.hub.published import PUBLISHED

# ---- registry ----------------------------------------------------------------------------------------------


def test_registered_models() -> None:
    names = timm.list_models("vimcore_*")
    of_images = [name for name in vimcore.list_models() if not name.startswith("videomamba")]
    assert sorted(names) == sorted(f"vimcore_{name}" for name in of_images)
    assert timm.list_models(module="timm", filter="vimcore_*") == names
    assert sorted(timm.list_models("vimcore_*", pretrained=True)) == sorted(
        f"vimcore_{name}" for name in PUBLISHED
    )
    assert timm.is_model(NAME)
    cfg = timm.get_pretrained_cfg(NAME)
    assert (cfg.input_size, cfg.classifier, cfg.first_conv) == ((3, 224, 224), "head", "patch_embed.proj")


@pytest.mark.slow
def test_published_size() -> None:
    model = timm.create_model(NAME)
    assert sum(p.numel() for p in model.parameters()) == 7_148_008
    assert (model.num_classes, model.num_features, model.in_chans) == (1000, 192, 3)
    assert timm.data.resolve_input_data_config(small(), {})["input_size"] == (3, 32, 32)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 224, 224)
    assert (data["crop_pct"], data["interpolation"]) == (0.875, "bicubic")
    assert data["mean"] == pytest.approx((0.485, 0.456, 0.406))
    wide = timm.create_model(NAME, features_only=True)
    assert wide.feature_info.module_name() == [f"layers.{i}" for i in (5, 11, 17, 23)]
    assert wide.feature_info.reduction() == [16] * 4


def test_same_numbers_as_ours() -> None:
    torch.manual_seed(1)
    ours = vimcore.create_model("vim_tiny_patch16_224", **SMALL, num_classes=5).eval()
    theirs = small().eval()
    theirs.load_state_dict(ours.state_dict())
    x = images()
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.forward_features(x), theirs.forward_features(x))
    assert ours.no_weight_decay() == theirs.no_weight_decay()


def test_it_does_not_hide_the_real_timm() -> None:
    assert Path(timm.__file__).parent.name == "timm"
    assert Path(vimcore.timm.__file__).parents[1].name == "vimcore"
    assert sys.modules["timm"] is timm is not vimcore.timm


@pytest.mark.slow
def test_without_timm_the_error_says_what_to_install() -> None:
    program = "import sys; sys.modules['timm'] = None\nimport vimcore.timm"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: vimcore.timm needs timm" in done.stderr


# ---- options -----------------------------------------------------------------------------------------------


def test_options_of_timm() -> None:
    model = small(in_chans=4, drop_path_rate=0.1, pos_drop_rate=0.2)
    assert model.config["in_chans"] == 4
    assert (model.config["drop_path_rate"], model.config["drop_rate"]) == (0.1, 0.2)
    assert model(images(channels=4)).shape == (2, 5)
    assert small(dtype=torch.float64).head.weight.dtype == torch.float64
    assert timm.create_model(NAME, **{**SMALL, "img_size": (24, 40)})(torch.zeros(1, 3, 24, 40)).shape == (
        1,
        1000,
    )
    stride = timm.create_model(
        "vimcore_vim_tiny_patch16_stride8_224", embed_dim=16, depth=4, features_only=True
    )
    assert stride.feature_info.reduction() == [8] * 4
    assert [tuple(y.shape[2:]) for y in stride(torch.zeros(1, 3, 224, 224))] == [(27, 27)] * 4


@pytest.mark.parametrize(
    ("pool", "options"),
    [
        ("token", {"class_token": "middle"}),
        ("avg", {"class_token": "none", "pool": "mean"}),
        ("max", {"class_token": "none", "pool": "max"}),
        ("", {"class_token": "none", "pool": "all"}),
    ],
)
def test_global_pool(pool: str, options: dict[str, str]) -> None:
    model = small(global_pool=pool).eval()
    assert model.global_pool == pool
    assert {key: model.config[key] for key in options} == options
    x = images()
    logits = model(x)
    assert logits.shape == ((2, 16, 5) if pool == "" else (2, 5))
    tokens = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(tokens), logits)
    before = model.forward_head(tokens, pre_logits=True)
    head = model.get_classifier()
    torch.testing.assert_close(head(before).amax(1) if pool == "max" else head(before), logits)


def test_dropout_before_the_head() -> None:
    x = images(8)
    model = small(drop_rate=0.5)
    torch.manual_seed(0)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)
    tokens = model.forward_features(x)
    dropped = model.forward_head(tokens, pre_logits=True)
    kept = dropped != 0
    assert 0.3 < kept.float().mean() < 0.7
    whole = model.eval().forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(dropped[kept], 2 * whole[kept])
    assert torch.equal(model(x), model(x))


def test_the_dropout_may_be_another_module() -> None:
    """Hooked, replaced, or in training mode on its own for Monte Carlo dropout."""
    model = small(drop_rate=0.5).eval()
    wanted = model(images())
    model.head_drop.train()
    assert not torch.equal(model(images()), wanted)
    model.head_drop = torch.nn.BatchNorm1d(16)
    model(images()).sum().backward()
    assert model.head_drop.weight.grad is not None
    model.head_drop, ran = torch.nn.Dropout(0.0), []
    model.head_drop.register_forward_hook(lambda *_: ran.append(None))
    torch.testing.assert_close(model(images()), wanted)
    assert ran
    model = small(class_token="random")
    model.head_drop.p = 0.5
    with pytest.raises(RuntimeError, match="head_drop: is not called"):
        model(images())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "map"}, "global_pool"),
        ({"drop_rate": 1.0}, "drop_rate"),
        ({"drop_rate": 0.1, "global_pool": "max"}, "drop_rate"),
        ({"drop_rate": 0.1, "class_token": "random"}, "drop_rate"),
        ({"embed_dim": 0}, "embed_dim"),
    ],
)
def test_options_that_do_not_go(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_classifier() -> None:
    model = small().eval()
    assert model.get_classifier() is model.head
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7)
    model.reset_classifier(0, "token")
    assert model(images()).shape == (2, 16)
    assert model.num_classes == 0


def test_another_pool(tmp_path: Path) -> None:
    model, x = small().eval(), images()
    tokens = model.forward_features(x)
    patches = torch.cat([tokens[:, :8], tokens[:, 9:]], 1)
    for pool, wanted in (("avg", patches.mean(1)), ("max", patches.amax(1)), ("", tokens)):
        model.reset_classifier(0, pool)
        assert model.global_pool == pool
        torch.testing.assert_close(model(x), wanted)
        model.reset_classifier(3)
        torch.testing.assert_close(model(x), model.head(wanted))
        model(x).sum().backward()
        with pytest.raises(ValueError, match="save: no class token network"):
            model.save(tmp_path / "vim.safetensors")
    model.reset_classifier(3, "token")
    torch.testing.assert_close(model(x), model.head(tokens[:, 8]))
    model.save(tmp_path / "vim.safetensors")

    model = small(global_pool="avg").eval()
    model.reset_classifier(3, "max")
    assert model.config["pool"] == "max"
    torch.testing.assert_close(model(x), model.head(model.forward_features(x)).amax(1))
    for changed, pool in ((model, "token"), (small(), "map")):
        with pytest.raises(ValueError, match=f"global_pool: expected one of .*, got '{pool}'"):
            changed.reset_classifier(3, pool)


def test_checkpointing_maps_to_the_memory_mode() -> None:
    model = small()
    found = []
    for enable in (True, False):
        model.set_grad_checkpointing(enable)
        assert (model.memory, model.grad_checkpointing) == ("lean" if enable else "fast", enable)
        model.zero_grad()
        model(images()).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for lean, fast in zip(*found):
        torch.testing.assert_close(lean, fast)
    model.memory = "least"
    model.set_grad_checkpointing()
    assert (model.memory, model.grad_checkpointing) == ("least", True)


# ---- scripts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "status"), [([], 2), (["--help"], 0)])
def test_usage(
    arguments: list[str],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["timm", *arguments])
    monkeypatch.delitem(sys.modules, "vimcore.timm")  # as in a new interpreter; put back afterwards
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("vimcore.timm", run_name="__main__")
    assert caught.value.code == status
    assert "usage: python -m vimcore.timm SCRIPT" in capsys.readouterr().out

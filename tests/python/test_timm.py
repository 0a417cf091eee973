# SPDX-License-Identifier: Apache-2.0
"""timm's own factories, loops and wrappers on our models, against the models themselves."""

from __future__ import annotations

import copy
import functools
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import timm.data
import timm.loss
import timm.models
import timm.optim
import timm.scheduler
import timm.utils
import torch
import vimcore
import vimcore.timm
from PIL import Image
from timm.models._features import FeatureGetterNet
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from vimcore.hub.published import PUBLISHED
from vimcore.timm import TimmVisionMamba

NAME = "vimcore_vim_tiny_patch16_224"
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 8}


NormedFeatures = functools.partial(FeatureGetterNet, norm=True)


def small(**options: Any) -> TimmVisionMamba:
    return timm.create_model(NAME, **{**SMALL, "num_classes": 5, **options})


def images(batch: int = 2, channels: int = 3, side: int = 32) -> torch.Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(5))


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


# ---- features ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["none", "head", "middle", "double"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_forward_intermediates(token: str, norm: str) -> None:
    model = small(class_token=token, norm=norm).eval()
    ours = vimcore.VisionMamba(**model.config).eval()
    ours.load_state_dict(model.state_dict())
    x = images()
    wanted = ours.forward_intermediates(x, [1, 6])
    final, maps = model.forward_intermediates(x, indices=[1, -2])
    torch.testing.assert_close(final, ours.forward_features(x))
    assert all(torch.equal(a, b) for a, b in zip(maps, wanted))
    only = model.forward_intermediates(x, indices=[1, 6], intermediates_only=True, output_fmt="NLC")
    assert all(torch.equal(a, b.flatten(2).transpose(1, 2)) for a, b in zip(only, wanted))
    assert len(model.forward_intermediates(x, intermediates_only=True)) == 8
    assert torch.equal(model.forward_intermediates(x, 2, intermediates_only=True)[0], wanted[1])

    normed = model.forward_intermediates(x, 1, norm=True, output_fmt="NLC", return_prefix_tokens=True)[1][0]
    tokens = ours.forward_features(x)
    count = {"none": 0, "double": 2}.get(token, 1)
    if count:
        patches, prefix = normed
        at = {"head": [0], "middle": [8], "double": [0, 17]}[token]
        torch.testing.assert_close(prefix, tokens[:, at])
        torch.testing.assert_close(patches, tokens[:, [i for i in range(16 + count) if i not in at]])
    else:
        torch.testing.assert_close(normed, tokens)

    found = model.forward_intermediates(x, [3], output_dict=True, return_prefix_tokens=True, stop_early=True)
    assert ("image_intermediates_prefix" in found) == bool(count)
    stopped = vimcore.VisionMamba(**{**model.config, "depth": 4}).eval()
    stopped.load_state_dict({k: v for k, v in model.state_dict().items() if k in stopped.state_dict()})
    torch.testing.assert_close(found["image_features"], stopped.forward_features(x))


def test_intermediates_of_pairs_of_layers() -> None:
    model = small(directions="block").eval()
    assert [info["module"] for info in model.feature_info] == [f"layers.{i}" for i in (1, 3, 5, 7)]
    wide = timm.create_model(NAME, **SMALL, directions="block", features_only=True, out_indices=(0, 2))
    assert [tuple(y.shape) for y in wide(images())] == [(2, 16, 4, 4)] * 2
    assert len(wide.model.layers) == 6


@pytest.mark.parametrize("token", ["middle", "double", "none"])
def test_other_sizes(token: str) -> None:
    """dynamic_img_size and set_input_size, as timm's own transformers have them."""
    options = {**SMALL, "class_token": token}
    model = timm.create_model(NAME, **options, dynamic_img_size=True).eval()
    images = torch.randn(2, 3, 48, 80)
    final, maps = model.forward_intermediates(images, norm=True)
    assert {tuple(m.shape[2:]) for m in maps} == {(48 // 8, 80 // 8)}
    logits = model(images)
    assert torch.equal(model.forward_head(final), model.forward_head(model.forward_features(images)))
    assert (model.forward_head(final) - logits).abs().max() < 1e-5
    fixed = timm.create_model(NAME, **options).eval()
    fixed.load_state_dict(model.state_dict())
    fixed.set_input_size(img_size=(48, 80), patch_size=8)
    assert fixed.config["img_size"] == [48, 80]
    assert torch.equal(fixed(images), logits)
    fixed.set_input_size()
    assert torch.equal(fixed(images), logits)
    with pytest.raises(ValueError, match=r"set_input_size: patch_size stays 8, got 16"):
        fixed.set_input_size(patch_size=16)
    with pytest.raises(ValueError, match=r"set_input_size\(\(32, 32\)\)"):
        fixed(torch.zeros(1, 3, 32, 32))
    with pytest.raises(TypeError, match="dynamic_img_pad"):
        timm.create_model(NAME, **options, dynamic_img_pad=True)


def test_features_of_any_size() -> None:
    wide = timm.create_model(NAME, **SMALL, features_only=True, dynamic_img_size=True)
    for size in (32, 64):
        assert {tuple(m.shape[2:]) for m in wide(torch.zeros(1, 3, size, 40))} == {(size // 8, 5)}


@pytest.mark.parametrize("indices", [[8], [-9], 0, 9, []])
def test_indices_out_of_range(indices: Any) -> None:
    with pytest.raises(ValueError, match=r"\[VisionMamba\] indices"):
        small().forward_intermediates(images(), indices)


def test_features_only_trains_every_parameter_that_is_left() -> None:
    torch.manual_seed(2)
    whole = small(drop_path_rate=0.7).eval()
    wide = timm.create_model(NAME, **SMALL, drop_path_rate=0.7, features_only=True, out_indices=(1, 4))
    wide.model.load_state_dict(
        {k: v for k, v in whole.state_dict().items() if k in wide.model.state_dict()}, strict=True
    )
    assert (len(wide.model.layers), wide.model.num_classes) == (5, 0)
    assert wide.feature_info.channels() == [16, 16]
    assert wide.model.config["drop_path_rate"] == pytest.approx(0.4)  # what the fifth of eight layers had
    wide.eval()
    x = images()
    maps = wide(x)
    wanted = whole.forward_intermediates(x, [1, 4], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, wanted))
    sum(y.square().sum() for y in wide(x)).backward()
    assert all(p.grad is not None for p in wide.parameters())
    assert "model.norm_f.weight" in wide.state_dict()  # so that files still fit
    with pytest.raises(ValueError, match="normalisation was pruned"):
        wide.model.save("never.safetensors")
    torch.testing.assert_close(
        wide.model(x),
        wide.model.forward_intermediates(x, 1, return_prefix_tokens=True, norm=True, intermediates_only=True)[
            0
        ][1][:, 0],
    )
    normed = timm.create_model(
        NAME, **SMALL, features_only=True, out_indices=(1, 4), feature_cls=NormedFeatures
    ).eval()
    normed.model.load_state_dict(wide.model.state_dict())
    final = normed.model.forward_intermediates(x, 1, norm=True, intermediates_only=True)[0]
    assert torch.equal(normed(x)[1], final)
    sum(y.square().sum() for y in normed(x)).backward()
    assert all(p.grad is not None for p in normed.parameters())


# ---- weights -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_weights_from_files(tmp_path: Path) -> None:
    torch.manual_seed(3)
    first = small().eval()
    first.save(tmp_path / "vim.safetensors")
    torch.save({"state_dict": first.state_dict()}, tmp_path / "vim.pth")
    x = images()
    for name in ("vim.safetensors", "vim.pth"):
        again = small(checkpoint_path=str(tmp_path / name)).eval()
        assert torch.equal(again(x), first(x))

    overlay = {"file": str(tmp_path / "vim.pth"), "num_classes": 5}
    larger = small(pretrained=True, pretrained_cfg_overlay=overlay, img_size=48, num_classes=3, in_chans=1)
    assert larger(torch.zeros(1, 1, 48, 48)).shape == (1, 3)
    table = vimcore.io.resize_pos_embed(first.pos_embed.detach(), (4, 4), (6, 6), "middle")
    torch.testing.assert_close(larger.pos_embed, table)
    torch.testing.assert_close(larger.layers[3].mixer.A_log, first.layers[3].mixer.A_log)
    torch.testing.assert_close(
        larger.patch_embed.proj.weight, first.patch_embed.proj.weight.sum(1, keepdim=True)
    )
    custom = {"file": str(tmp_path / "vim.safetensors"), "custom_load": True}
    assert torch.equal(small(pretrained=True, pretrained_cfg_overlay=custom).eval()(x), first(x))
    with pytest.raises(ValueError, match="the published weights are for"):
        small(pretrained=True)
    with pytest.raises(RuntimeError, match=r"pos_embed"):
        small(checkpoint_path=str(tmp_path / "vim.pth"), img_size=48)


def test_rope_tables_are_optional_and_checked(tmp_path: Path) -> None:
    model = small(rope=True, class_token="head")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("rope.")}
    torch.save(state, tmp_path / "vim.pth")
    overlay = {"file": str(tmp_path / "vim.pth"), "num_classes": 5}
    again = small(pretrained=True, pretrained_cfg_overlay=overlay, rope=True, class_token="head").eval()
    assert torch.equal(again(images()), model.eval()(images()))
    torch.save(model.state_dict(), tmp_path / "vim.pth")
    with pytest.raises(ValueError, match="rope"):
        small(pretrained=True, pretrained_cfg_overlay=overlay, rope=True, class_token="head", rope_grid=7)


# ---- training and validation -------------------------------------------------------------------------------


def test_parameter_groups_of_timm() -> None:
    model = small()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    free, decayed = ({names[id(p)] for p in group["params"]} for group in groups)
    assert {"pos_embed", "cls_token", "norm_f.weight", "layers.0.mixer.D", "head.bias"} <= free
    assert "layers.0.mixer.A_log" in decayed
    assert all(dict(model.named_parameters())[name].ndim > 1 for name in decayed)
    layered = param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5
    )
    scale = {names[id(p)]: group["lr_scale"] for group in layered for p in group["params"]}
    assert scale["pos_embed"] == scale["patch_embed.proj.weight"] < scale["layers.0.mixer.A_log"]
    assert scale["layers.6.mixer.D"] == pytest.approx(0.5 * scale["layers.7.mixer.D"])
    assert scale["head.weight"] == 1
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert sorted(name for group in groups.values() for name in group) == sorted(names.values())


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_two_steps_with_timm(channels_last: bool) -> None:
    torch.manual_seed(4)
    model = small(drop_path_rate=0.1)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = timm.optim.create_optimizer_v2(
        model, opt="adamw", lr=1e-2, weight_decay=0.05, layer_decay=0.9
    )
    scheduler, epochs = timm.scheduler.create_scheduler_v2(optimizer, "cosine", num_epochs=4, warmup_epochs=1)
    assert epochs >= 4
    mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=5)
    loss_of, ema = timm.loss.SoftTargetCrossEntropy(), timm.utils.ModelEmaV3(model, decay=0.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    np.random.seed(0)  # noqa: NPY002  timm's mixup draws from it
    for epoch in range(2):
        scheduler.step(epoch + 1)
        x, target = mixup(images(4), torch.tensor([0, 1, 2, 3]))
        loss = loss_of(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        timm.utils.dispatch_clip_grad(model.parameters(), 1.0)
        optimizer.step()
        ema.update(model)
        assert torch.isfinite(loss)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(before)
    assert not torch.equal(ema.module.pos_embed, model.pos_embed)
    twin = copy.deepcopy(model).eval()
    assert torch.equal(twin(images()), model.eval()(images()))


def _folder(root: Path) -> Path:
    """A tree of pictures, red ones and blue ones."""
    rng = np.random.default_rng(0)
    for kind, channel in (("blue", 2), ("red", 0)):
        (root / kind).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 60, (40, 48, 3)).astype(np.uint8)
            pixels[..., channel] += 180
            Image.fromarray(pixels).save(root / kind / f"{i}.png")
    return root


VALIDATE = """
import sys
import torch, timm
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy
name, root, checkpoint = sys.argv[1:]
assert __name__ == "__main__" and sys.argv[0].endswith("validate.py")
options = dict(img_size=32, patch_size=8, stride=8, embed_dim=16, depth=8, num_classes=2)
model = timm.create_model(name, checkpoint_path=checkpoint, **options).eval()
config = resolve_data_config({"input_size": (3, 32, 32)}, model=model)
loader = create_loader(
    create_dataset("", root=root), config["input_size"], batch_size=4, use_prefetcher=False, num_workers=0,
    interpolation=config["interpolation"], mean=config["mean"], std=config["std"],
    crop_pct=config["crop_pct"], device=torch.device("cpu"),
)
top1 = AverageMeter()
with torch.inference_mode():
    for images, target in loader:
        (right,) = accuracy(model(images), target, topk=(1,))
        top1.update(right.item(), len(images))
print(f"top1 {top1.avg:.1f} of {top1.count}")
"""


@pytest.mark.slow
def test_timms_loop_learns_and_its_script_validates(tmp_path: Path) -> None:
    root = _folder(tmp_path / "pictures")
    torch.manual_seed(5)
    model = small(num_classes=2)
    config = timm.data.resolve_data_config({"input_size": (3, 32, 32)}, model=model)
    assert config["input_size"] == (3, 32, 32)
    loader = timm.data.create_loader(
        timm.data.create_dataset("", root=str(root)),
        config["input_size"],
        batch_size=6,
        is_training=True,
        use_prefetcher=False,
        num_workers=0,
        color_jitter=0.3,  # not RandAugment: that of timm 1.0.31 asks a recent Pillow for 0 bits at times
        mean=config["mean"],
        std=config["std"],
        device=torch.device("cpu"),
    )
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=2e-3)
    for _ in range(12):
        for x, target in loader:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    saver = timm.utils.CheckpointSaver(
        model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(0)
    script = tmp_path / "validate.py"
    script.write_text(VALIDATE)
    command = [
        sys.executable,
        "-m",
        "vimcore.timm",
        str(script),
        NAME,
        str(root),
        str(tmp_path / "last.pth.tar"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:] == ["100.0", "of", "12"], done.stdout
    assert "Overwriting" not in done.stderr


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

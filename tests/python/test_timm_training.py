# SPDX-License-Identifier: Apache-2.0
"""timm's checkpoints, optimizers, loops and scripts on our models."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

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
from PIL import Image
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm_helpers import NAME, images, small

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

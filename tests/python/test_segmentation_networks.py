# SPDX-License-Identifier: Apache-2.0
"""Networks for segmentation: sizes, other implementations in float64, gradients, odd sizes, errors."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import upernet_oracle
import vimcore
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from vimcore.nn.heads.layers import synchronized
from vimcore.nn.heads.upernet import UPerHead
from vimcore.segmentation import FCN, Segmentation, Segmenter, UperNet
from vimcore.weights.dense import levels

SMALL: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 4, "class_token": "none"}
Make = Callable[[vimcore.VisionMamba, int], Segmentation]
HEADS: dict[str, Make] = {
    "fcn": FCN,
    "linear": lambda backbone, classes: FCN(backbone, classes, convs=0),
    "grouped": lambda backbone, classes: FCN(backbone, classes, channels=8, head_norm="group"),
    "uper": lambda backbone, classes: UperNet(backbone, classes, channels=8),
    "mixer": lambda backbone, classes: UperNet(
        backbone, classes, channels=8, indices=[1, 1, -2, 2], taps="mixer", aux=False, head_norm="group"
    ),
    "segmenter": Segmenter,
}


def backbone(**options: Any) -> vimcore.VisionMamba:
    return vimcore.VisionMamba(**{**SMALL, "num_classes": 0, **options})


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def flops(module: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of convolutions and products, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    return counter.get_total_flops() // 2


# ---- published sizes ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "counts", "giga", "decoder"),
    [
        (
            "tiny",
            (7_113_600, 443_328, 4_272_918, 481_430, 12_311_276),
            ("7.93", "0.91", "30.57", "0.49", "39.4"),
            (1_029_996, "2.2", "10.1"),
        ),
        (
            "small",
            (25_728_768, 1_771_392, 17_024_406, 923_798, 45_448_364),
            ("27.63", "3.62", "121.3", "0.95", "152.6"),
            (4_050_348, "6.7", "34.3"),
        ),
    ],
)
def test_networks_of_ade20k(
    size: str, counts: tuple[int, ...], giga: tuple[str, ...], decoder: tuple[Any, ...]
) -> None:
    """150 classes, 512 px; multiply-adds in G as far as they are stated, and exactly as torch counts them."""
    own = vimcore.create_model(f"vim_{size}_patch16_224", img_size=512, num_classes=0, class_token="none")
    model, segmenter = UperNet(own, 150).eval(), Segmenter(own, 150).eval()
    assert model.options["channels"] == own.embed_dim
    assert model.options["indices"] == [5, 11, 17, 23]
    parts = (own, model.neck, model.decode_head, model.auxiliary_head, model)
    assert tuple(map(count, parts)) == counts
    assert count(segmenter.decode_head) == decoder[0]
    assert segmenter.decode_head.blocks[0].attn.heads == own.embed_dim // 64
    model, segmenter = model.to("meta"), segmenter.to("meta")  # nothing is computed
    one = [torch.empty(1, own.embed_dim, 32, 32, device="meta")] * 4
    maps = model.neck(one)
    assert [tuple(x.shape[2:]) for x in maps] == [(128, 128), (64, 64), (32, 32), (16, 16)]
    counted = [flops(model.neck, one), flops(model.decode_head, maps), flops(model.auxiliary_head, maps[2])]
    assert model.flops() == own.flops() + counted[0] + counted[1]
    for value, stated in zip([own.flops(), *counted, model.flops()], giga):
        assert f"{value / 1e9:.{len(stated.partition('.')[2])}f}" == stated
    masks = flops(segmenter.decode_head, torch.empty(1, 1024, own.embed_dim, device="meta"))
    assert segmenter.flops() == own.flops() + masks
    assert (f"{masks / 1e9:.1f}", f"{segmenter.flops() / 1e9:.1f}") == decoder[1:]


def test_fcn_of_the_scenes() -> None:
    own = backbone(img_size=48, embed_dim=64)
    model = FCN(own, 11, channels=48)
    assert 224_000 < count(model) < 226_000
    maps = torch.empty(1, 64, 12, 12)
    assert model.flops() - own.flops() == flops(model.decode_head, maps)
    linear = FCN(own, 11, convs=0)
    assert count(linear.decode_head) == 64 * 11 + 11
    assert linear.flops(96) == own.flops(96) + 24 * 24 * 64 * 11


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_the_neck_has_strides_of_4_to_32(patch: int) -> None:
    model = UperNet(backbone(img_size=(64, 96), patch_size=patch), 3, channels=8).eval()
    maps = model.maps(images(1, 3, 64, 96))
    assert [tuple(x.shape[2:]) for x in maps] == [(64 // s, 96 // s) for s in (4, 8, 16, 32)]
    assert {name.split(".")[0] for name, _ in model.neck.named_parameters()} == {
        f"fpn{level}" for level, exponent in enumerate(levels(patch), 1) if exponent > 0
    }
    given = [torch.empty(1, 16, 64 // patch, 96 // patch)] * 4
    assert model.flops() == model.backbone.flops() + flops(model.neck, given) + flops(model.decode_head, maps)


# ---- other implementations ---------------------------------------------------------------------------------


def test_the_head_is_that_of_transformers() -> None:
    theirs, auxiliary = (head.double().eval() for head in upernet_oracle.heads(16, 8, 256, 5))
    model = UperNet(backbone().double(), 5, channels=8).eval()
    assert model.auxiliary_head is not None
    model.decode_head.load_state_dict(upernet_oracle.renamed(theirs.state_dict()))
    model.auxiliary_head.load_state_dict(upernet_oracle.renamed(auxiliary.state_dict()))
    maps = [torch.randn(2, 16, *size, dtype=torch.float64) for size in ((20, 28), (10, 14), (5, 7), (2, 3))]
    assert torch.equal(model.decode_head(maps), theirs(maps))
    assert torch.equal(model.auxiliary_head(maps[2]), auxiliary(maps))


def batch_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    weight, bias, mean, variance = (
        state[f"{name}.{part}"][:, None, None] for part in ("weight", "bias", "running_mean", "running_var")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def test_the_neck_step_by_step() -> None:
    model = UperNet(backbone(img_size=32, patch_size=16).double(), 5).eval()
    nn.init.uniform_(model.neck.fpn1[1].running_var, 0.5, 2)
    state = model.state_dict()
    x = [torch.randn(2, 16, 2, 2, dtype=torch.float64) for _ in range(4)]

    def enlarged(name: str, x: Tensor) -> Tensor:
        """Each pixel becomes four, by a matrix for each of them."""
        y = torch.einsum("bchw,cdij->bdhiwj", x, state[f"{name}.weight"])
        return y.flatten(4).flatten(2, 3) + state[f"{name}.bias"][:, None, None]

    first = batch_norm(state, "backbone.fpn1.1", enlarged("backbone.fpn1.0", x[0]))
    wanted = [
        enlarged("backbone.fpn1.3", first * 0.5 * (1 + torch.erf(first / 2**0.5))),
        enlarged("backbone.fpn2.0", x[1]),
        x[2],
        x[3].amax((2, 3), keepdim=True),
    ]
    for found, expected in zip(model.neck(x), wanted):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_taps() -> None:
    own = backbone(depth=8).double().eval()
    x = images(2, 3, 16, 16).double()
    streams = own.forward_intermediates(x, range(8))
    stream = UperNet(own, 3, channels=8).eval()
    mixer = UperNet(own, 3, channels=8, taps="mixer").eval()
    assert stream.options["indices"] == mixer.options["indices"] == [1, 3, 5, 7]
    for i, (a, b) in enumerate(zip(stream.maps(x), mixer.maps(x))):
        if i == 0:
            assert torch.equal(a, streams[1])
            assert torch.equal(b, streams[1] - streams[0])
        assert not torch.equal(a, b)


def test_segmenter_step_by_step() -> None:
    own = backbone(img_size=(16, 24), embed_dim=128, depth=2, class_token="middle").double()
    model = Segmenter(own, 3).double().eval()
    for p in model.decode_head.parameters():
        nn.init.normal_(p, std=0.3)
    state = {k.removeprefix("decode_head."): v for k, v in model.state_dict().items()}
    x = images(2, 3, 16, 24).double()

    def norm(name: str, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    tokens = own.forward_features(x)
    tokens = torch.cat([tokens[:, :12], tokens[:, 13:]], 1)
    x = torch.cat([linear("proj_dec", tokens), state["cls_emb"].repeat(2, 1, 1)], 1)
    for i in range(2):
        q, k, v = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x)).split(128, -1)
        heads = []
        for part in (slice(64), slice(64, 128)):
            scores = q[..., part] @ k[..., part].transpose(1, 2) / 8
            heads.append(scores.softmax(-1) @ v[..., part])
        x = x + linear(f"blocks.{i}.attn.proj", torch.cat(heads, -1))
        hidden = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))
        x = x + linear(f"blocks.{i}.mlp.fc2", hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5)))
    x = norm("decoder_norm", x)
    patches, classes = x[:, :24] @ state["proj_patch"], x[:, 24:] @ state["proj_classes"]
    patches, classes = (y / y.norm(dim=-1, keepdim=True) for y in (patches, classes))
    masks = norm("mask_norm", patches @ classes.transpose(1, 2)).transpose(1, 2).reshape(2, 3, 4, 6)
    wanted = F.interpolate(masks, (16, 24), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model(images(2, 3, 16, 24).double()), wanted, rtol=1e-10, atol=1e-10)


# ---- what is learnt ----------------------------------------------------------------------------------------


def total(model: Segmentation, x: Tensor) -> Tensor:
    """A scalar of all outputs."""
    found = model(x)
    outputs = [found] if isinstance(found, Tensor) else found
    return sum((y.square() * torch.linspace(0.5, 1, y.shape[1]).view(-1, 1, 1)).mean() for y in outputs)


@pytest.mark.parametrize("name", HEADS)
def test_gradients_agree_with_differences(name: str) -> None:
    """Along random directions, in training, through BatchNorm, heads and backbone."""
    torch.manual_seed(0)
    model = HEADS[name](backbone(class_token="middle"), 3).double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    x = images(2, 3, 16, 16).double()
    learnt = [p for p in model.parameters() if p.requires_grad]
    total(model, x).backward()
    assert all(p.grad is not None for p in learnt)
    for _ in range(3):
        steps = [1e-8 * torch.randn_like(p) for p in learnt]
        ahead, back = (_moved(model, learnt, [sign * step for step in steps], x) for sign in (1.0, -1.0))
        slope = sum((p.grad * step).sum() for p, step in zip(learnt, steps))
        torch.testing.assert_close((ahead - back) / 2, slope, rtol=1e-4, atol=1e-15)


@torch.no_grad()
def _moved(model: Segmentation, learnt: list[nn.Parameter], steps: list[Tensor], x: Tensor) -> Tensor:
    for p, step in zip(learnt, steps):
        p += step
    value = total(model, x)
    for p, step in zip(learnt, steps):
        p -= step
    return value


@pytest.mark.slow
def test_distributed_training_finds_all_gradients(tmp_path: Path) -> None:
    """DistributedDataParallel raises in the second step where a parameter got none."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for make in HEADS.values():
            model = nn.parallel.DistributedDataParallel(make(backbone(class_token="double"), 3))
            for _ in range(2):
                total(model, images(2, 3, 16, 16)).backward()
    finally:
        dist.destroy_process_group()


def test_what_no_head_sees_is_frozen() -> None:
    early = UperNet(backbone(), 3, indices=[0, 0, 1, 2])
    frozen = {name for name, p in early.named_parameters() if not p.requires_grad}
    assert frozen == {"backbone.norm_f.weight"} | {
        f"backbone.layers.3.{name}" for name, _ in early.backbone.layers[3].named_parameters()
    }
    assert all(p.requires_grad for p in Segmenter(backbone(), 3).parameters())


def test_the_auxiliary_head_is_for_training() -> None:
    model = UperNet(backbone(), 3)
    x = images(2, 3, 16, 16)
    outputs = model(x)
    assert [tuple(y.shape) for y in outputs] == [(2, 3, 16, 16)] * 2
    assert model.eval()(x).shape == (2, 3, 16, 16)
    assert UperNet(backbone(), 3, aux=False)(x).shape == (2, 3, 16, 16)


def test_dropout_sets_whole_channels_to_zero() -> None:
    model = UperNet(backbone(), 3, dropout=0.5).train()
    seen: list[Tensor] = []
    model.decode_head.conv_seg.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(images(2, 3, 16, 16))
    dead = (seen[0] == 0).flatten(2).all(-1)
    assert 4 < dead.sum() < 28  # of 32


# ---- batches and sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    ("size", "channels", "classes", "token"),
    [((16, 24), 3, 1, "middle"), ((24, 16), 4, 2, "double"), ((8, 8), 1, 3, "head"), ((4, 4), 3, 2, "none")],
)
def test_sizes_channels_classes(
    name: str, size: tuple[int, int], channels: int, classes: int, token: str
) -> None:
    own = backbone(img_size=size, in_chans=channels, class_token=token).double()
    model = HEADS[name](own, classes).eval()
    x = images(2, channels, *size).double()
    both = model(x)
    assert both.shape == (2, classes, *size)
    assert both.isfinite().all()
    torch.testing.assert_close(model(x[:1]), both[:1], rtol=1e-9, atol=1e-9)
    assert model(x[:0]).shape == (0, classes, *size)


def test_orientation() -> None:
    """A single bright patch changes the logits around it most, in a grid that is not square."""
    torch.manual_seed(0)
    model = FCN(backbone(img_size=(16, 32), directions="none", depth=1), 2, convs=0).eval()
    x = torch.zeros(1, 3, 16, 32)
    x[:, :, 4:8, 20:24] = 3
    changed = (model(x) - model(torch.zeros(1, 3, 16, 32))).abs().sum((0, 1))
    row, column = divmod(int(changed.argmax()), 32)
    assert 4 <= row < 8
    assert 20 <= column < 24


@pytest.mark.parametrize("name", HEADS)
def test_images_of_any_size(name: str) -> None:
    model = HEADS[name](backbone(dynamic_img_size=True, class_token="middle"), 3).eval()
    x = images(1, 3, 21, 30)
    found = model(x)
    assert found.shape == (1, 3, 21, 30)
    whole = model(F.pad(x, (0, 2, 0, 3)))
    assert torch.equal(found, whole[:, :, :21, :30])
    model.backbone.dynamic_img_size = False
    with pytest.raises(ValueError, match=r"dynamic_img_size=True, set_input_size\(\(24, 32\)\)"):
        model(x)
    model.backbone.set_input_size((24, 32))
    torch.testing.assert_close(model(x), found, rtol=1e-5, atol=1e-6)


def test_one_image_and_batch_norm() -> None:
    """Pooled to one pixel there is one value of each channel, of which BatchNorm learns nothing."""
    with pytest.raises(
        ValueError, match=r"BatchNorm cannot learn .* two or more images .* head_norm='group'"
    ):
        UperNet(backbone(), 3).train()(images(1, 3, 16, 16))
    for head_norm in ("batch", "group"):
        for make in (UperNet, FCN):
            model = make(backbone(), 3, head_norm=head_norm)
            if head_norm == "group" or make is FCN:
                total(model.train(), images(1, 3, 16, 16)).backward()
            assert model.eval()(images(1, 3, 16, 16)).shape == (1, 3, 16, 16)


def test_batch_norm_over_processes_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = UperNet(backbone(), 3)
    keys = list(model.state_dict())
    monkeypatch.setattr("vimcore.utils.distributed.world", lambda: 2)
    assert synchronized(model, torch.device("cpu")) is model
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
    other = synchronized(copy.deepcopy(model), torch.device("cuda"))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in other.modules())
    assert sorted(other.state_dict()) == sorted(keys)
    monkeypatch.setattr("vimcore.utils.distributed.world", lambda: 1)
    assert synchronized(model, torch.device("cuda")) is model


def test_types_follow_the_backbone() -> None:
    for make in HEADS.values():
        model = make(backbone().double(), 3).eval()
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert model(images(1, 3, 16, 16).double()).dtype == torch.float64


def test_weights_at_the_start() -> None:
    torch.manual_seed(0)
    head = UPerHead(64, 64, 150, "batch", 0.1)
    weight = head.fpn_bottleneck.conv.weight.detach()
    assert weight.std() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)  # fan_out
    assert head.conv_seg.weight.detach().std() == pytest.approx(0.01, rel=0.05)
    assert not head.conv_seg.bias.any()
    decoder = Segmenter(backbone(embed_dim=128), 150).decode_head
    assert decoder.proj_patch.detach().std() == pytest.approx(128**-0.5, rel=0.05)
    assert decoder.cls_emb.detach().std() == pytest.approx(0.02, rel=0.05)
    assert decoder.blocks[1].mlp.fc2.weight.detach().std() == pytest.approx(0.02, rel=0.05)


def test_state_dicts_have_the_published_names() -> None:
    model = UperNet(backbone(img_size=32, patch_size=16, rope=True), 3)
    names = set(model.state_dict())
    assert {"backbone.fpn1.0.weight", "backbone.fpn1.1.running_var", "backbone.fpn1.3.bias"} < names
    assert {
        "backbone.fpn2.0.weight",
        "auxiliary_head.convs.0.bn.bias",
        "auxiliary_head.conv_seg.weight",
    } < names
    for i, part in itertools.product(range(4), ("conv.weight", "bn.weight", "bn.num_batches_tracked")):
        assert f"decode_head.psp_modules.{i}.1.{part}" in names
    assert not any(name.startswith("neck.") for name in names)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.neck.fpn1[0].weight)
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    assert torch.equal(other.neck.fpn1[0].weight, model.neck.fpn1[0].weight)
    averaged = torch.optim.swa_utils.AveragedModel(model)  # within another module
    averaged.load_state_dict(averaged.state_dict())
    assert "module.backbone.fpn2.0.bias" in averaged.state_dict()


# ---- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FCN(vimcore.VisionMamba(**SMALL, num_classes=3), 3), r"reset_classifier\(0\)"),
        (lambda: FCN(nn.Linear(2, 2), 3), "expected a VisionMamba, got Linear"),
        (lambda: FCN(backbone(stride=2), 3), "patches of 4 every 2 pixels do not tile"),
        (lambda: FCN(backbone(img_size=18), 3), "do not tile 18 x 18"),
        (lambda: FCN(backbone(), 0), "num_classes: expected 1 or more, got 0"),
        (lambda: FCN(backbone(), 256), "expected 255 or fewer, got 256"),
        (lambda: FCN(backbone(), 3, convs=-1), "convs: expected 0 to 256, got -1"),
        (lambda: FCN(backbone(), 3, convs=0, channels=8), "they are the backbone's 16, got 8"),
        (lambda: FCN(backbone(), 3, channels=0), "channels: expected 1 to 65536, got 0"),
        (
            lambda: FCN(backbone(), 3, head_norm="layer"),
            "head_norm: expected 'batch' or 'group', got 'layer'",
        ),
        (lambda: FCN(backbone(), 3, dropout=1), "dropout: expected a number from 0 to below 1, got 1"),
        (lambda: UperNet(backbone(img_size=6, patch_size=6), 3), "patches every 4, 8 or 16 pixels, got 6"),
        (lambda: UperNet(backbone(), 3, indices=[1, 2, 3]), "expected four layers"),
        (lambda: UperNet(backbone(), 3, indices=[1, 2, 3, 4]), "expected -4 to 3, got 4"),
        (lambda: UperNet(backbone(), 3, taps="norm"), "taps: expected 'stream' or 'mixer', got 'norm'"),
        (lambda: UperNet(backbone(), 3, taps="mixer"), "which the first layer"),
        (lambda: UperNet(backbone(directions="block"), 3, taps="mixer"), "take 'stream'"),
        (lambda: UperNet(backbone(directions="block"), 3, indices=[0, 1, 2, 3]), "only odd layers"),
        (lambda: Segmenter(backbone(), 3, layers=0), "layers: expected 1 to 256, got 0"),
    ],
)
def test_errors_name_what_and_why(make: Callable[[], Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        make()


def test_default_layers_of_shallow_networks() -> None:
    for depth, wanted in ((1, [0, 0, 0, 0]), (2, [0, 0, 0, 1]), (6, [0, 2, 3, 5])):
        assert UperNet(backbone(depth=depth), 2).options["indices"] == wanted
    pairs = UperNet(backbone(directions="block"), 2)
    assert pairs.options["indices"] == [1, 1, 3, 3]
    assert pairs.eval()(images(1, 3, 16, 16)).shape == (1, 2, 16, 16)

# SPDX-License-Identifier: Apache-2.0
"""What users do to a network's modules that cannot be followed, and what its own call follows.

What makes it run layer by layer is in test_layerwise.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import vimcore
from golden import relative
from helpers import SMALL, build, images_for, small
from test_weights import fresh
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

Model = vimcore.VisionMamba


def another_stride(model: Model) -> None:
    model.patch_embed.proj = nn.Conv2d(3, 16, 4, stride=2)


def a_bias(model: Model) -> None:
    model.layers[0].mixer.in_proj.bias = nn.Parameter(torch.ones(64))


def a_layer_more(model: Model) -> None:
    model.layers.append(model.layers[0])


def a_layer_less(model: Model) -> None:
    model.layers = model.layers[:1]


def inside_a_layer(model: Model) -> None:
    model.layers[1].adapter = nn.Linear(16, 16)


def dilated(model: Model) -> None:
    model.layers[0].mixer.conv1d.dilation = (2,)


def parameter_renamed(model: Model) -> None:
    mixer = model.layers[0].mixer
    mixer.E = mixer.D
    del mixer.D


def weight_removed(model: Model) -> None:
    del model.norm_f.weight


HANGS: dict[str, tuple[Callable[[Model], Any], str]] = {
    "another stride": (another_stride, r"patch_embed\.proj: stride expected \(4, 4\), got \(2, 2\)"),
    "bias": (a_bias, r"layers\.0\.mixer\.in_proj: has parameters that the network does not know: bias"),
    "layer more": (a_layer_more, r"layers: has modules that the network does not know: 2"),
    "layer less": (a_layer_less, r"layers\.1: expected .*Layer, got none"),
    "module in a layer": (inside_a_layer, r"layers\.1: has modules that the network does not know: adapter"),
    "dilated": (dilated, r"layers\.0\.mixer\.conv1d: dilation expected \(1,\), got \(2,\)"),
    "no head": (
        lambda m: setattr(m, "head", None),
        r"head: expected a module, got none.*reset_classifier\(0\)",
    ),
    "head removed": (lambda m: delattr(m, "head"), r"head: expected a module, got none"),
    "no class token": (lambda m: setattr(m, "cls_token", None), r"cls_token: .*none"),
    "position removed": (lambda m: delattr(m, "pos_embed"), r"pos_embed: .*none"),
    "no weight": (lambda m: setattr(m.norm_f, "weight", None), r"norm_f.*: .*(without weight|none)"),
    "parameter renamed": (parameter_renamed, r"layers\.0\.mixer.*(does not know: E|D: .*none)"),
    "weight removed": (weight_removed, r"norm_f: is without weight"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize(("hang", "message"), HANGS.values(), ids=HANGS)
def test_what_would_be_passed_over_is_refused(hang: Callable[[Model], Any], message: str, used: bool) -> None:
    model, images = build(SMALL), images_for(SMALL, 1, torch.float32)
    if used:
        model(images)
    hang(model)
    with pytest.raises((RuntimeError, TypeError), match=message):
        model(images)


ROTATED = small(class_token="head", rope=True)
ROTATIONS: dict[str, tuple[Callable[[Model], Any], str]] = {
    "written to": (lambda m: m.rope.freqs_cos.zero_(), r"rope\.freqs_cos: not the rotation of rope_grid=14"),
    "loaded": (
        lambda m: m.load_state_dict({**m.state_dict(), "rope.freqs_sin": -m.rope.freqs_sin}),
        r"rope\.freqs_sin: not the rotation",
    ),
    "of another size": (
        lambda m: setattr(m.rope, "freqs_sin", m.rope.freqs_sin[:1]),
        r"rope\.freqs_sin: expected \(6, 16\), got \(1, 16\)",
    ),
    "removed": (lambda m: delattr(m, "rope"), r"rope: expected .*Rope, got none"),
}


@pytest.mark.parametrize(("change", "message"), ROTATIONS.values(), ids=ROTATIONS)
def test_rotations_are_those_of_the_configuration(change: Callable[[Model], Any], message: str) -> None:
    model, images = build(ROTATED).eval(), images_for(ROTATED, 1, torch.float32)
    wanted = model(images)
    model.rope.bfloat16().float()
    assert torch.equal(model(images), wanted)
    change(model)
    with pytest.raises(RuntimeError, match=message):
        model(images)


@pytest.mark.parametrize("own", ["hook", "forward", "compiled"])
@pytest.mark.parametrize("classes", [0, 3])
def test_what_hangs_on_a_head_runs(classes: int, own: str) -> None:
    model, images, ran = build(small(num_classes=classes)).eval(), images_for(SMALL, 1, torch.float32), []
    wanted = model(images)
    call = model.head.forward

    def forward(x: Tensor) -> Tensor:
        ran.append(x)
        return call(x)

    if own == "hook":
        model.head.register_forward_hook(lambda *_: ran.append(None))
    elif own == "forward":
        model.head.forward = forward
    else:
        model.head.forward = forward
        model.head.compile(backend="eager")
    assert relative(model(images), wanted) < 1e-5
    assert ran


def test_replaced_dictionaries_are_noticed() -> None:
    """Copies of modules as torch makes them share what is in their dictionaries, not the dictionaries."""
    model, images = build(SMALL), images_for(SMALL, 1, torch.float32)
    model(images)
    mixer = model.layers[0].mixer
    mixer._parameters = {k: nn.Parameter(2 * p) for k, p in mixer._parameters.items()}
    model._parameters = {k: nn.Parameter(2 * p) for k, p in model._parameters.items()}
    assert torch.equal(model(images), fresh(model, images))


def test_replicas_compute_with_their_own_weights() -> None:
    """As `nn.DataParallel` makes them, with tensors in the place of parameters."""
    model, images = build(SMALL).eval(), images_for(SMALL, 1, torch.float32)
    before = model(images)

    def replica(module: nn.Module) -> nn.Module:
        copy = module._replicate_for_data_parallel()
        for key, child in module._modules.items():
            copy._modules[key] = None if child is None else replica(child)
        for key, p in module._parameters.items():
            if p is not None:
                setattr(copy, key, 2 * p.detach())
        return copy

    doubled = build(SMALL).eval()
    with torch.no_grad():
        for p in doubled.parameters():
            p.mul_(2)
    assert torch.equal(replica(model)(images), doubled(images))
    assert torch.equal(model(images), before)


# ---- what is followed --------------------------------------------------------------------------------------


def test_hooks_of_the_head_and_of_the_network_run() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    wanted, seen = model(images), []
    features = model.forward_features(images)[:, model._config.class_position]
    model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.register_forward_hook(lambda module, args, out: seen.append(out))
    logits = model(images)
    assert relative(logits, wanted) < 1e-5
    assert len(seen) == 2
    assert torch.equal(seen[0], features)
    assert seen[1] is logits


def test_a_hooked_head_of_a_random_class_token() -> None:
    """The token stands somewhere in training, hook or not."""
    model = build(small(class_token="random")).train()
    images, seen = images_for(SMALL, 2, torch.float32), []
    torch.manual_seed(5)
    wanted = [model(images) for _ in range(4)]
    model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(5)
    assert all(relative(model(images), w) < 1e-5 for w in wanted)
    assert not torch.equal(wanted[0], wanted[1])
    assert len(seen) == 4


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_parametrizations_are_followed() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    other = build(SMALL).eval()
    model(images)
    parametrize.register_parametrization(model.layers[0].mixer.in_proj, "weight", Half())
    parametrize.register_parametrization(model.layers[1].mixer, "A_log", Half())
    parametrizations.weight_norm(model.head)
    with torch.no_grad():
        other.layers[0].mixer.in_proj.weight.div_(2)
        other.layers[1].mixer.A_log.div_(2)
    assert relative(model(images), other(images)) < 1e-6
    model(images).sum().backward()
    assert model.layers[0].mixer.in_proj.parametrizations.weight.original.grad.abs().sum() > 0


def test_modules_of_a_subclass_are_its_own() -> None:
    class Two(vimcore.VisionMamba):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.second, self.scale = nn.Linear(16, 2), nn.Parameter(torch.ones(1))

        def forward(self, images: Tensor) -> Tensor:
            return self.second(self.forward_features(images).mean(1)) * self.scale

    model, images = Two(**build(SMALL).config), images_for(SMALL, 2, torch.float32)
    model.second.register_forward_hook(lambda *_: None)
    model(images).sum().backward()
    assert model.second.weight.grad is not None
    assert model.scale.grad is not None

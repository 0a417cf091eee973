# SPDX-License-Identifier: Apache-2.0
"""Hooks, adapters and other modules in a network: it runs layer by layer and computes the same."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import vimcore
from golden import relative
from helpers import SMALL, build, images_for, run, small
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

Model = vimcore.VisionMamba


def deep(model: Model) -> None:
    """Hooks that change nothing, on every module."""
    for module in model.modules():
        if module is not model:
            module.register_forward_hook(lambda *_: None)


def shallow(model: Model) -> None:
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: None)


DROPS = {"drop_rate": 0.2, "drop_path_rate": 0.3}
DESIGNS: dict[str, dict[str, Any]] = {
    "ssm_conv": DROPS,
    "ssm": {"directions": "ssm", **DROPS},
    "none": {"directions": "none", "class_token": "none", "pool": "all"},
    "block": {"directions": "block", "depth": 4, **DROPS},
    "sequence": {"directions": "sequence", "rope": True, "class_token": "none", "pool": "last", **DROPS},
    "sum": {"average_directions": False, "layer_scale": 0.5, "norm": "layer", "class_token": "double"},
    "random": {"class_token": "random"},
    "registers": {"class_token": "registers", "registers": 4, "neck_reduction": 2, "norm": "layer", **DROPS},
    "rope": {"rope": True, "rope_residual": True, "class_token": "head", "pos_embed": False},
    "max": {"class_token": "none", "pool": "max", "d_state": 3, "d_conv": 2, "expand": 1},
    "clips": {"frames": 2, "class_token": "head"},
}


@pytest.mark.parametrize("hang", [shallow, deep])
@pytest.mark.parametrize("design", DESIGNS)
def test_equals_the_network_as_a_whole(design: str, hang: Callable[[Model], None]) -> None:
    """Training with the same draws, gradients, and inference, in float64."""
    config = small(img_size=(12, 12), **DESIGNS[design])
    fused, images = build(config, dtype=torch.float64).train(), images_for(config, 3)
    layered = copy.deepcopy(fused)
    hang(layered)
    torch.manual_seed(3)
    wanted, wanted_gradients = run(fused, images)
    torch.manual_seed(3)
    logits, gradients = run(layered, images)
    assert relative(logits, wanted) < 1e-12
    for name, gradient in wanted_gradients.items():
        assert relative(gradients[name], gradient) < 1e-9, name
    fused.eval(), layered.eval()
    assert relative(layered(images), fused(images)) < 1e-12
    assert relative(layered.forward_features(images), fused.forward_features(images)) < 1e-12
    for ours, whole in zip(layered.forward_intermediates(images), fused.forward_intermediates(images)):
        assert relative(ours, whole) < 1e-12


@pytest.mark.parametrize("hang", [shallow, deep])
@pytest.mark.parametrize("memory", ["least", "lean", "fast"])
def test_float32(memory: str, hang: Callable[[Model], None]) -> None:
    fused, images = build(SMALL, memory=memory), images_for(SMALL, 3, torch.float32)
    layered = copy.deepcopy(fused)
    hang(layered)
    wanted, wanted_gradients = run(fused, images)
    logits, gradients = run(layered, images)
    assert relative(logits, wanted) < 1e-6
    assert max(relative(gradients[name], g) for name, g in wanted_gradients.items()) < 1e-5


@pytest.mark.parametrize("hang", [shallow, deep])
def test_autocast(hang: Callable[[Model], None]) -> None:
    """bfloat16 activations, wide parameters and gradients."""
    fused, images = build(SMALL), images_for(SMALL, 3, torch.float32)
    layered = copy.deepcopy(fused)
    hang(layered)
    truth = fused(images)
    with torch.autocast("cpu"):
        wanted, found = fused(images), layered(images)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert relative(found.float(), truth) < 2 * relative(wanted.float(), truth) + 1e-2
    found.float().sum().backward()
    assert layered.layers[0].mixer.in_proj.weight.grad.dtype == torch.float32
    assert layered(images.bfloat16()).dtype == torch.bfloat16  # without autocast


def test_images_of_other_sizes() -> None:
    model = build(SMALL, dtype=torch.float64).eval()
    model.dynamic_img_size = True
    images = torch.randn(2, 3, 16, 8, dtype=torch.float64)
    wanted = model(images)
    deep(model)
    assert relative(model(images), wanted) < 1e-12
    model.dynamic_img_size = False
    with pytest.raises(ValueError, match=r"images: expected .*other sizes by dynamic_img_size"):
        model(images)


# ---- hooks -------------------------------------------------------------------------------------------------


def test_hooks_see_and_change_what_layers_give() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    seen: dict[str, Any] = {}
    wanted, streams = model(images), model.forward_intermediates(images, [0])
    hook = model.layers[0].register_forward_hook(lambda m, a, out: seen.update(out=out))
    model.layers[1].mixer.in_proj.register_forward_pre_hook(lambda m, a: seen.update(v=a[0]))
    model.norm_f.register_forward_hook(lambda m, a, out: seen.update(tokens=out))
    assert relative(model(images), wanted) < 1e-6
    out, residual = seen["out"]
    stream = (out + residual)[:, [i for i in range(out.shape[1]) if i != model._config.class_position]]
    assert relative(stream.transpose(1, 2), streams[0].flatten(2)) < 1e-6
    assert relative(seen["tokens"], model.forward_features(images)) < 1e-6
    assert seen["v"].shape == out.shape
    hook.remove()
    model.layers[0].register_forward_hook(lambda m, a, out: (2 * out[0], out[1]))
    assert relative(model(images), wanted) > 1e-2


def test_grad_cam() -> None:
    """Activations and their gradients, as such tools take them by hooks."""
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    found: dict[str, Tensor] = {}
    model.layers[-1].norm.register_forward_hook(lambda m, a, out: found.update(activation=out))
    model.layers[-1].norm.register_full_backward_hook(lambda m, gin, gout: found.update(gradient=gout[0]))
    model(images)[:, 1].sum().backward()
    assert found["activation"].shape == found["gradient"].shape == (2, 7, 16)
    assert found["gradient"].abs().sum() > 0


def test_hooks_of_all_modules_are_called() -> None:
    model, images, seen = build(SMALL).eval(), images_for(SMALL, 1, torch.float32), set()
    wanted = model(images)
    hook = torch_module.register_module_forward_hook(lambda m, a, out: seen.add(m))
    try:
        assert relative(model(images), wanted) < 1e-6
    finally:
        hook.remove()
    called = {m for m in model.modules() if not isinstance(m, nn.ModuleList)}
    assert seen == called
    assert torch.equal(model(images), wanted)


def test_a_removed_hook_is_forgotten() -> None:
    model, images = build(SMALL), images_for(SMALL, 1, torch.float32)
    wanted = model(images)
    hook = model.layers[0].register_forward_hook(lambda *_: None)
    model(images)
    hook.remove()
    assert torch.equal(model(images), wanted)
    prune.l1_unstructured(model.layers[0].mixer.in_proj, "weight", 0.5)
    prune.remove(model.layers[0].mixer.in_proj, "weight")
    assert torch.equal(model(images), build(SMALL, model.state_dict())(images))


@pytest.mark.parametrize("part", ["layers.0.mixer.in_proj.weight", "layers.1.mixer.A_log", "norm_f.weight"])
def test_pruned(part: str) -> None:
    """Whose weights a hook computes at every call."""
    path, _, leaf = part.rpartition(".")
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    prune.random_unstructured(model.get_submodule(path), leaf, 0.5)
    with torch.no_grad():
        model.get_submodule(path).get_parameter(f"{leaf}_orig").mul_(2)
    found = model(images)
    prune.remove(model.get_submodule(path), leaf)
    assert relative(found, model(images)) < 1e-6


def test_who_reads_weights_alone_refuses() -> None:
    model = build(SMALL).eval()
    model.layers[0].mixer.register_forward_hook(print)
    message = r"layers\.0\.mixer: has the hook print.*constant_weights"
    with pytest.raises(RuntimeError, match=message), model.constant_weights():
        pass


# ---- other modules -----------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """A low-rank adapter around a linear map, whose weight it shows as its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


PROJECTIONS = ["in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj"]


@pytest.mark.parametrize("directions", ["ssm_conv", "ssm", "none"])
def test_adapters_learn_and_merge(directions: str) -> None:
    model = build(small(directions=directions), dtype=torch.float64).eval()
    images = images_for(SMALL, 2)
    wanted = model(images)
    model.requires_grad_(False)
    for layer in model.layers:
        for name in PROJECTIONS:
            if hasattr(layer.mixer, name):
                adapter = Adapter(getattr(layer.mixer, name)).double()
                nn.init.zeros_(adapter.up.weight), nn.init.zeros_(adapter.up.bias)
                setattr(layer.mixer, name, adapter)
    assert relative(model(images), wanted) < 1e-12
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    for adapter in adapters:
        nn.init.normal_(adapter.up.weight, std=0.1)
    changed = model(images)
    assert relative(changed, wanted) > 1e-2
    changed.sum().backward()
    assert all(a.up.weight.grad.abs().sum() > 0 and a.down.weight.grad.abs().sum() > 0 for a in adapters)
    assert all(a.base_layer.weight.grad is None for a in adapters)
    for layer in model.layers:
        for name in PROJECTIONS:
            if hasattr(layer.mixer, name):
                adapter = getattr(layer.mixer, name)
                with torch.no_grad():
                    adapter.base_layer.weight += adapter.up.weight @ adapter.down.weight
                setattr(layer.mixer, name, adapter.base_layer)
    assert relative(model(images), changed) < 1e-12


def test_peft() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 6, torch.float32)
    wanted, labels = model(images), torch.tensor([0, 1, 2, 0, 1, 2])
    lora = peft.LoraConfig(r=4, target_modules=["in_proj", "x_proj", "out_proj"], modules_to_save=["head"])
    adapted = peft.get_peft_model(model, lora)
    assert relative(adapted(images), wanted) < 1e-6
    learnt = [p for p in adapted.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(learnt, 2e-2), []
    for _ in range(12):
        loss = F.cross_entropy(adapted(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in learnt)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    found = adapted(images)
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.save("nowhere.safetensors")
    merged = adapted.merge_and_unload()
    assert relative(merged(images), found) < 1e-5


class OtherLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def twice(model: Model) -> None:
    model.layers[1].mixer.out_proj.__class__ = OtherLinear


def twice_by_its_forward(model: Model) -> None:
    out_proj = model.layers[1].mixer.out_proj
    out_proj.forward = lambda x: 2 * F.linear(x, out_proj.weight)


def twice_by_its_layer(model: Model) -> None:
    layer = model.layers[1]
    call = layer.forward

    def forward(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        out, total = call(x, residual)
        return 2 * out, total

    layer.forward = forward


@pytest.mark.parametrize("change", [twice, twice_by_its_forward, twice_by_its_layer])
def test_another_module_in_its_place(change: Callable[[Model], None]) -> None:
    model, other = build(SMALL, dtype=torch.float64), build(SMALL, dtype=torch.float64)
    images = images_for(SMALL, 2)
    change(model)
    with torch.no_grad():
        other.layers[1].mixer.out_proj.weight *= 2
    assert relative(model(images), other(images)) < 1e-12


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any) -> Any:
        return checkpoint(self.inner, *args, use_reentrant=False)


class PlainNorm(nn.Module):
    """A module of its own, which gets the sum."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-5)


def test_modules_around_and_instead_of_others() -> None:
    model, images = build(SMALL, dtype=torch.float64), images_for(SMALL, 2)
    wanted, gradients = run(model, images)
    model.layers[0] = Checkpointed(model.layers[0])
    model.layers[1].norm = PlainNorm(model.layers[1].norm.weight)
    model.norm_f = PlainNorm(model.norm_f.weight)
    model.layers[1].mixer.conv1d = nn.Sequential(nn.Identity(), model.layers[1].mixer.conv1d)
    logits, found = run(model, images)
    assert relative(logits, wanted) < 1e-12
    name = "layers.0.mixer.A_log"
    assert relative(found[name.replace(".0.", ".0.inner.")], gradients[name]) < 1e-9


def test_compiled_layers() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    wanted = model(images)
    model.layers[0] = torch.compile(model.layers[0], backend="eager", fullgraph=True)
    model.layers[1].compile(backend="eager", fullgraph=True)
    assert relative(model(images), wanted) < 1e-6


@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantized() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    wanted = model(images)
    small_model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert type(small_model.layers[0].mixer.in_proj) is not nn.Linear
    with torch.no_grad():
        assert 1e-6 < relative(small_model(images), wanted) < 0.1


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def test_parametrizations_beside_hooks() -> None:
    model, images = build(SMALL, dtype=torch.float64).eval(), images_for(SMALL, 2)
    parametrize.register_parametrization(model.layers[0].mixer.in_proj, "weight", Half())
    parametrize.register_parametrization(model.layers[1].mixer, "A_log", Half())
    wanted = model(images)
    shallow(model)
    assert relative(model(images), wanted) < 1e-12
    deep(model)
    assert relative(model(images), wanted) < 1e-12


def test_sharded_layers_are_refused_by_name(tmp_path: Any) -> None:
    """Beside a hook as without one."""
    model = build(SMALL)
    kind = type("FSDPLinear", (nn.Linear,), {})
    model.layers[0].mixer.in_proj.__class__ = kind
    model.norm_f.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match=r"in_proj: .*FSDPLinear.*shard the network as a whole"):
        model(images_for(SMALL, 1, torch.float32))


def test_copies_and_pickles_run_layer_by_layer() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 1, torch.float32)
    twice(model)
    wanted = model(images)
    assert torch.equal(copy.deepcopy(model)(images), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), wanted)
    for module in model.modules():  # as an earlier version wrote it
        if module is not model:
            for key in ("_config", "_made", "eps"):
                vars(module).pop(key, None)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), wanted)

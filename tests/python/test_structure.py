# SPDX-License-Identifier: Apache-2.0
"""What users hang on a network's modules, and what torch wraps around its tensors: followed, or refused."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vimcore
from golden import relative
from helpers import SMALL, build, images_for, small
from test_weights import fresh
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations, parametrize, prune

Model = vimcore.VisionMamba


class Adapter(nn.Module):
    """A low-rank adapter around a linear map, whose weight it shows as its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


class OtherLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def adapted(model: Model) -> None:
    mixer = model.layers[0].mixer
    mixer.in_proj = Adapter(mixer.in_proj)


def another_class(model: Model) -> None:
    mixer = model.layers[1].mixer
    mixer.out_proj = OtherLinear(mixer.out_proj.in_features, mixer.out_proj.out_features, bias=False)


def another_stride(model: Model) -> None:
    model.patch_embed.proj = nn.Conv2d(3, 16, 4, stride=2)


def own_forward(model: Model) -> None:
    layer = model.layers[0]
    layer.forward = lambda x: x


def a_bias(model: Model) -> None:
    model.layers[0].mixer.in_proj.bias = nn.Parameter(torch.ones(64))


def a_layer_more(model: Model) -> None:
    model.layers.append(model.layers[0])


def a_layer_less(model: Model) -> None:
    model.layers = model.layers[:1]


def inside_a_layer(model: Model) -> None:
    model.layers[1].adapter = nn.Linear(16, 16)


def class_swapped(model: Model) -> None:
    model.layers[0].mixer.in_proj.__class__ = OtherLinear


def dilated(model: Model) -> None:
    model.layers[0].mixer.conv1d.dilation = (2,)


def compiled_layer(model: Model) -> None:
    model.layers[0] = torch.compile(model.layers[0], backend="eager")


def parameter_renamed(model: Model) -> None:
    mixer = model.layers[0].mixer
    mixer.E = mixer.D
    del mixer.D


def weight_removed(model: Model) -> None:
    del model.norm_f.weight


HANGS: dict[str, tuple[Callable[[Model], Any], str]] = {
    "adapter": (adapted, r"layers\.0\.mixer\.in_proj: expected linear\.Linear, got .*Adapter"),
    "another class": (another_class, r"layers\.1\.mixer\.out_proj: expected .* got .*OtherLinear"),
    "another stride": (another_stride, r"patch_embed\.proj: stride expected \(4, 4\), got \(2, 2\)"),
    "own forward": (own_forward, r"layers\.0: has a forward of its own"),
    "bias": (a_bias, r"layers\.0\.mixer\.in_proj: has parameters that the network does not know: bias"),
    "layer more": (a_layer_more, r"layers: has modules that the network does not know: 2"),
    "layer less": (a_layer_less, r"layers\.1: expected .*Layer, got none"),
    "module in a layer": (inside_a_layer, r"layers\.1: has modules that the network does not know: adapter"),
    "class swapped": (class_swapped, r"layers\.0\.mixer\.in_proj: expected .* got .*OtherLinear"),
    "dilated": (dilated, r"layers\.0\.mixer\.conv1d: dilation expected \(1,\), got \(2,\)"),
    "compiled layer": (compiled_layer, r"layers\.0: expected .* got .*OptimizedModule.*compile\(model\)"),
    "compiled in place": (
        lambda m: m.norm_f.compile(backend="eager"),
        r"norm_f: is compiled.*model\.compile\(\)",
    ),
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
    "quantized": (
        lambda m: setattr(m.layers[0].mixer, "x_proj", torch.ao.nn.quantized.dynamic.Linear(32, 11)),
        r"layers\.0\.mixer\.x_proj: expected linear\.Linear, got .*quantize nothing",
    ),
    "forward hook": (
        lambda m: m.layers[0].register_forward_hook(lambda *_: None),
        r"layers\.0: has the hook .*forward_intermediates",
    ),
    "pre-hook": (lambda m: m.norm_f.register_forward_pre_hook(lambda *_: None), r"norm_f: has the hook"),
    "backward hook": (
        lambda m: (
            m.layers[1].mixer.D.register_hook(lambda g: g)
            and m.layers[1].mixer.register_full_backward_hook(print)
        ),
        r"layers\.1\.mixer: has the hook print",
    ),
    "pruned": (
        lambda m: prune.l1_unstructured(m.layers[0].mixer.in_proj, "weight", 0.5),
        r"layers\.0\.mixer\.in_proj: has the hook L1Unstructured.*prune\.remove",
    ),
    "weight_norm by hooks": (
        lambda m: torch.nn.utils.weight_norm(m.layers[0].mixer.in_proj),
        r"layers\.0\.mixer\.in_proj: has the hook WeightNorm.*parametrizations",
    ),
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
    "hook": (lambda m: m.rope.register_forward_hook(print), r"rope: has the hook print"),
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


def test_a_removed_hook_is_forgotten() -> None:
    model, images = build(SMALL), images_for(SMALL, 1, torch.float32)
    wanted = model(images)
    hook = model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="hook"):
        model(images)
    hook.remove()
    assert torch.equal(model(images), wanted)
    prune.l1_unstructured(model.layers[0].mixer.in_proj, "weight", 0.5)
    prune.remove(model.layers[0].mixer.in_proj, "weight")
    assert torch.equal(model(images), fresh(model, images))


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
    features = model.forward_features(images)[:, model._facts["class_position"]]
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


# ---- tracers and wrapped tensors ---------------------------------------------------------------------------


def export(strict: bool) -> Callable[[Model, Tensor], Any]:
    return lambda model, x: torch.export.export(model, (x,), strict=strict)


TRACERS: dict[str, Callable[[Model, Tensor], Any]] = {
    "jit.trace": lambda model, x: torch.jit.trace(model, x, check_trace=False),
    "onnx, legacy": lambda model, x: torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False),
    "make_fx": lambda model, x: make_fx(model)(x),
    "make_fx, fake": lambda model, x: make_fx(model, tracing_mode="fake")(x),
    "make_fx, before dispatch": lambda model, x: make_fx(model, pre_dispatch=True)(x),
    "export": export(False),
    "export, strict": export(True),
    "jit.script": lambda model, x: torch.jit.script(model),
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("trace", TRACERS.values(), ids=TRACERS)
def test_tracers_are_refused(trace: Callable[[Model, Tensor], Any], grad: bool) -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    wanted = model(images)
    with torch.set_grad_enabled(grad), pytest.raises(Exception, match=r"vimcore|VisionMamba"):
        trace(model, images)
    assert torch.equal(model(images), wanted)  # and left as it was


TRANSFORMS: dict[str, Callable[[Model, Tensor], Any]] = {
    "vmap": lambda model, x: torch.vmap(model)(x[:, None]),
    "grad": lambda model, x: torch.func.grad(lambda t: model(t).sum())(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "functionalize": lambda model, x: torch.func.functionalize(model)(x),
    "vmap over weights": lambda model, x: torch.vmap(lambda w: torch.func.functional_call(model, w, (x,)))(
        {k: torch.stack([p, p]) for k, p in model.state_dict().items()}
    ),
    "ops": lambda model, x: torch.vmap(lambda t: vimcore.ops.rms_norm(t, torch.ones(12)))(x),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_functional_transforms_are_refused(transform: Callable[[Model, Tensor], Any]) -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    wanted = model(images)
    with pytest.raises(TypeError, match=r"expected a plain tensor, got one of torch\.func"):
        transform(model, images)
    assert torch.equal(model(images), wanted)


def dual(x: Tensor) -> Tensor:
    return forward_ad.make_dual(x, torch.ones_like(x))


@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_is_refused(grad: bool) -> None:
    """Also where nothing requires a gradient: the tangents would be lost."""
    model, images = build(SMALL).eval().requires_grad_(grad), images_for(SMALL, 2, torch.float32)
    head = {"head.weight": model.head.weight.detach()}
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        model(images)
        with pytest.raises(TypeError, match=r"images: .* a dual tensor of forward-mode"):
            model(dual(images))
        with pytest.raises(TypeError, match=r"head\.weight: .* a dual tensor of forward-mode"):
            torch.func.functional_call(model, {k: dual(v) for k, v in head.items()}, (images,))
        with pytest.raises(TypeError, match=r"\[rms_norm\] x: .* a dual tensor of forward-mode"):
            vimcore.ops.rms_norm(dual(images), torch.ones(12))


@pytest.mark.parametrize("second", [torch.autograd.functional.hessian, torch.autograd.functional.hvp])
def test_second_derivatives_are_no_zeros(second: Callable[..., Any]) -> None:
    """Also of a sum, whose incoming gradient is a constant."""
    model, images = build(SMALL).eval(), images_for(SMALL, 1, torch.float32)
    arguments = () if second is torch.autograd.functional.hessian else (images,)
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        second(lambda x: model(x).sum(), images, *arguments)
    with pytest.raises(RuntimeError, match="second derivatives are not available"):
        torch.autograd.functional.jvp(model, images, images)  # takes them of a gradient


Tensors = list[Tensor]
OPERATORS: dict[str, tuple[list[tuple[int, ...]], Callable[[Tensors], Tensor]]] = {
    "rms_norm": ([(1, 3, 4), (4,)], lambda t: vimcore.ops.rms_norm(*t)),
    "layer_norm": ([(1, 3, 4), (4,), (4,), (1, 3, 4)], lambda t: vimcore.ops.layer_norm(*t)[0]),
    "causal_conv1d": ([(1, 3, 4), (4, 2), (4,)], lambda t: vimcore.ops.causal_conv1d(*t)),
    "selective_scan": (
        [(1, 3, 4), (1, 3, 4), (4, 2), (1, 3, 2), (1, 3, 2)],
        lambda t: vimcore.ops.selective_scan(*t),
    ),
    "bidirectional_scan": (
        [(1, 3, 4), *[s for s in [(1, 3, 4), (1, 3, 5), (4, 2), (4,), (4, 1), (4,)] for _ in range(2)]],
        lambda t: vimcore.ops.bidirectional_scan(t[0], *[t[i : i + 2] for i in range(1, 13, 2)]),
    ),
    "vim_block": (
        [(1, 3, 16), (1, 3, 16)],
        lambda t: vimcore.ops.vim_block(t[0], dict(build(SMALL).layers[0].named_parameters()), t[1])[0],
    ),
}


@pytest.mark.parametrize(("shapes", "operator"), OPERATORS.values(), ids=OPERATORS)
def test_second_derivatives_of_operators_are_no_zeros(
    shapes: list[tuple[int, ...]], operator: Callable[[Tensors], Tensor]
) -> None:
    for chosen in range(len(shapes)):  # by one argument at a time
        tensors = [torch.rand(shape) for shape in shapes]
        tensors[chosen].requires_grad_()
        (gradient,) = torch.autograd.grad(operator(tensors).sum(), tensors[chosen], create_graph=True)
        with pytest.raises(RuntimeError, match="second derivatives are not available"):
            torch.autograd.grad(gradient.sum(), tensors[chosen])


def test_batches_of_gradients_are_refused() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 1, torch.float32)
    assert torch.autograd.functional.jacobian(model, images).shape == (1, 3, *images.shape)
    with pytest.raises(TypeError, match=r"one gradient at a time.*vectorize"):
        torch.autograd.functional.jacobian(model, images, vectorize=True)


def freed(images: Tensor) -> Tensor:
    images = images.clone()
    images.untyped_storage().resize_(0)
    return images


@pytest.mark.filterwarnings("ignore")
def test_images_that_are_no_array_are_refused() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    wanted = model(images)
    nested = torch.nested.nested_tensor(list(images))
    for other, kind in ((images.to_sparse(), "torch.sparse_coo"), (nested, "nested")):
        with pytest.raises(
            TypeError, match=rf"\[VisionMamba\] images: expected a dense tensor, got .*{kind}"
        ):
            model(other)
        with pytest.raises(TypeError, match=rf"\[rms_norm\] x: expected a dense tensor, got .*{kind}"):
            vimcore.ops.rms_norm(other, torch.ones(12))
    with pytest.raises(TypeError, match=r"images: expected a tensor with its memory"):
        model(freed(images))
    assert torch.equal(model(torch._neg_view(-images)), wanted)
    assert torch.equal(model(images.flip(0).flip(0)), wanted)


class Wrapper(Tensor):
    """A tensor whose memory is elsewhere, as quantized and sharded ones are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


class Named(Tensor):
    """A subclass that is its memory."""


def test_wrapped_tensors_are_refused() -> None:
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    wanted = model(images)
    with pytest.raises(TypeError, match=r"images: expected a plain tensor, got a .*Wrapper, whose memory"):
        model(Wrapper(images))
    with pytest.raises(TypeError, match=r"x: expected a plain tensor, got a .*Wrapper"):
        vimcore.ops.rms_norm(Wrapper(images), torch.ones(12))
    assert torch.equal(model(images.as_subclass(Named)), wanted)
    model.head.weight = nn.Parameter(Wrapper(model.head.weight.detach()), requires_grad=False)
    with pytest.raises(TypeError, match=r"head\.weight: expected a plain tensor, got a .*Wrapper"):
        model(images)


def test_distributed_tensors_are_refused(tmp_path: Path) -> None:
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
        model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(TypeError, match=r"head\.weight: .* a DTensor.*fully_shard\(model\)"):
            model(images)
        model = build(SMALL).eval()
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        with pytest.raises(RuntimeError, match=r"layers\.0: .*FSDP.*fully_shard\(model\)"):
            model(images)
    finally:
        dist.destroy_process_group()


def test_autocast_on_the_cpu_says_that_it_changes_nothing() -> None:
    from vimcore import place

    place._say_wide.cache_clear()
    model, images = build(SMALL).eval(), images_for(SMALL, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="autocast"):
        model(images)
    with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        model(images)

# SPDX-License-Identifier: Apache-2.0
"""vimcore on a GPU, from Python: agreement with the CPU in float64, streams, graphs, repeatability, training,
errors.

Not part of the ordinary test run: `tests/gpu/acceptance.sh test` calls it on a machine with a GPU.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vimcore
from torch import Tensor
from vimcore.data.digits import load_digits, split_digits
from vimcore.train.in_memory import fit

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))
import ddp
import golden
from helpers import build, images_for, small

CUDA = torch.device("cuda")
# Relative error of a small network by type of the activations: float32 sums in another order, else rounding.
TYPES = {
    "float32": (torch.float32, 1e-4),
    "bfloat16": (torch.bfloat16, 3e-2),
    "float16": (torch.float16, 5e-3),
}
NETWORKS: dict[str, dict[str, Any]] = {
    "none": {"directions": "none"},
    "sequence": {"directions": "sequence"},
    "block": {"directions": "block"},
    "ssm": {"directions": "ssm"},
    "ssm_conv": {},
    "sum of directions": {"average_directions": False},
    "head token": {"class_token": "head"},
    "double token": {"class_token": "double"},
    "random token": {"class_token": "random"},
    "mean": {"class_token": "none", "pool": "mean"},
    "max": {"class_token": "none", "pool": "max"},
    "last": {"class_token": "none", "pool": "last"},
    "all": {"class_token": "none", "pool": "all"},
    "layer norm": {"norm": "layer", "layer_scale": 0.5},
    "rope": {"class_token": "none", "rope": True, "rope_residual": True, "img_size": 16, "rope_grid": 4},
    "no positions": {"pos_embed": False},
    "stride": {"patch_size": 4, "stride": 2},
    "state 16": {"d_state": 16, "embed_dim": 64},
    "state 8": {"d_state": 8},
    "state 32": {"d_state": 32},
    "state 64": {"d_state": 64},
    "width 3": {"d_conv": 3},
    "one patch": {"img_size": 4},
    "longer than tiles": {"img_size": (60, 84), "d_state": 16, "embed_dim": 32},
}


@pytest.fixture(scope="module", autouse=True)
def _gpu() -> Iterator[None]:
    assert torch.cuda.is_available(), "these tests need a GPU that torch can use"
    assert vimcore.cuda_is_available(), f"vimcore was built without CUDA: {vimcore.build_info()}"
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    products = vimcore._core.cuda_products()
    assert products["built_in"] == 0, f"slow built-in kernels multiplied matrices: {products}"


def run(model: vimcore.VisionMamba, images: Tensor, dtype: torch.dtype) -> Tensor:
    """Logits of a network on CUDA; 16-bit types through autocast."""
    with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        return model(images)


def tiny(**options: Any) -> vimcore.VisionMamba:
    """A network with the published channel count and state, on the GPU."""
    torch.manual_seed(0)
    options = {"img_size": 64, "embed_dim": 192, "depth": 4, "num_classes": 10, **options}
    return vimcore.VisionMamba(**options).eval().to(CUDA)


@pytest.mark.parametrize("dtype", sorted(TYPES))
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_agrees_with_the_cpu(name: str, dtype: str) -> None:
    config = small(**NETWORKS[name])
    kind, tolerance = TYPES[dtype]
    model = build(config).eval()
    images = images_for(config, 3)
    with torch.no_grad():
        double = build(config, dtype=torch.float64).eval()
        truth, tokens = double(images), double.forward_features(images)
    model.to(CUDA)
    images = images.float().to(CUDA)
    logits = run(model, images, kind)
    assert logits.device.type == "cuda"
    assert logits.dtype == kind
    assert golden.relative(logits.cpu(), truth) < tolerance
    with torch.no_grad():
        features = model.forward_features(images.to(kind))  # 16-bit images without autocast
        assert golden.relative(features.cpu(), tokens) < tolerance
        maps = model.forward_intermediates(images)
        wanted = double.forward_intermediates(images.double().cpu())
    assert all(golden.relative(a.cpu(), b) < 1e-4 for a, b in zip(maps, wanted, strict=True))


@pytest.mark.parametrize("dtype", sorted(TYPES))
@pytest.mark.parametrize("name", golden.NAMES)
def test_golden(name: str, dtype: str) -> None:
    g = golden.load(name)
    kind, tolerance = TYPES[dtype]
    model = build(g.config, g.weights).eval().to(CUDA)
    assert golden.relative(run(model, g.input.to(CUDA), kind).cpu(), g.logits) < tolerance


@pytest.mark.parametrize("dtype", sorted(TYPES))
@pytest.mark.parametrize(
    "name", ["vim_tiny_patch16_224", "vim_small_patch16_224", "vim_tiny_patch16_stride8_224"]
)
def test_published_sizes(name: str, dtype: str) -> None:
    torch.manual_seed(0)
    model = vimcore.create_model(name).eval()
    kind, tolerance = TYPES[dtype]
    images = torch.randn(2, 3, 224, 224)
    found = run(model.to(CUDA), images.to(CUDA), kind).cpu()
    with torch.no_grad():
        truth = model.cpu().double()(images.double())
    assert golden.relative(found, truth) < tolerance


@pytest.mark.parametrize("dtype", sorted(TYPES))
def test_same_bits_again_and_for_every_split_of_the_batch(dtype: str) -> None:
    model, kind = tiny(), TYPES[dtype][0]
    images = torch.randn(7, 3, 64, 64, device=CUDA)
    logits = run(model, images, kind)
    for _ in range(3):
        assert torch.equal(run(model, images, kind), logits)
    for sizes in ([1] * 7, [2, 5], [4, 3]):
        parts = [run(model, part, kind) for part in images.split(sizes)]
        assert torch.equal(torch.cat(parts), logits), sizes
    assert run(model, images[:0], kind).shape == (0, 10)


def test_runs_on_the_current_stream() -> None:
    """Inputs that the stream has not made yet, and outputs that the stream reads at once."""
    model, side = tiny(), torch.cuda.Stream()
    images = torch.randn(4, 3, 64, 64, device=CUDA)
    wanted = 2 * run(model, images, torch.float32)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        late = torch.zeros_like(images)
        torch.cuda._sleep(50_000_000)
        late.copy_(images)
        found = 2 * run(model, late, torch.float32)
    side.synchronize()
    assert torch.equal(found, wanted)


def test_threads_with_streams_of_their_own() -> None:
    model = tiny()
    batches = [torch.randn(n, 3, 64, 64, device=CUDA) for n in (1, 2, 3, 4)]
    wanted = [run(model, images, torch.bfloat16) for images in batches]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[] for _ in batches]

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                found[index].append(run(model, batches[index], torch.bfloat16))
            torch.cuda.current_stream().synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, truth in zip(found, wanted, strict=True):
        assert len(outputs) == 20
        assert all(torch.equal(output, truth) for output in outputs)


@pytest.mark.parametrize("dtype", sorted(TYPES))
@pytest.mark.parametrize("batch", [1, 5])
def test_cuda_graph(batch: int, dtype: str) -> None:
    """Captured once, replayed for other images, also after eager calls have used the same network."""
    model, kind = tiny(), TYPES[dtype][0]
    images = torch.randn(batch, 3, 64, 64, device=CUDA)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run(model, images, kind)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        logits = run(model, images, kind)
    for seed in range(3):
        generator = torch.Generator(CUDA).manual_seed(seed)
        other = torch.randn(images.shape, device=CUDA, generator=generator)
        wanted = run(model, other, kind)
        run(model, torch.randn(2 * batch, 3, 64, 64, device=CUDA), kind)
        images.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(logits, wanted)
        for p in model.parameters():  # which nothing announces: replays read weights anew
            p.data.mul_(1.01)


def test_a_fused_optimizer_learns_as_the_others() -> None:
    """It writes without being counted by torch."""
    images, labels = torch.randn(8, 3, 64, 64, device=CUDA), torch.arange(8, device=CUDA)
    courses = []
    for options in ({"fused": True}, {"foreach": True}):
        model = tiny().train()
        optimizer, course = torch.optim.AdamW(model.parameters(), lr=1e-3, **options), []
        for _ in range(10):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(images)
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            course.append(loss.item())
        courses.append(course)
    assert courses[0] == pytest.approx(courses[1], rel=0.05)
    assert courses[0][-1] < courses[0][0] / 2


def test_weights_written_in_place_are_seen() -> None:
    model = tiny()
    images = torch.randn(2, 3, 64, 64, device=CUDA)
    before = run(model, images, torch.bfloat16)
    with torch.no_grad():
        model.layers[1].mixer.in_proj.weight.mul_(1.5)
    after = run(model, images, torch.bfloat16)
    assert golden.relative(after, before) > 1e-3
    with torch.no_grad():
        model.layers[1].mixer.in_proj.weight.div_(1.5)
    assert golden.relative(run(model, images, torch.bfloat16), before) < 1e-2


def test_takes_no_more_memory_with_every_call() -> None:
    model = tiny()
    images = torch.randn(8, 3, 64, 64, device=CUDA)
    for _ in range(3):
        run(model, images, torch.bfloat16)
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    for _ in range(50):
        run(model, images, torch.bfloat16)
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] >= free


@pytest.mark.parametrize("length", [1, 31, 32, 33, 197, 1025])
@pytest.mark.parametrize("state", [5, 8, 16, 32, 64])
def test_scan_agrees_with_the_cpu(state: int, length: int) -> None:
    batch, inner, rank = 2, 96, 3
    torch.manual_seed(0)

    def pair(*shape: int) -> list[Tensor]:
        return [torch.randn(shape, dtype=torch.float64) for _ in range(2)]

    z = torch.randn(batch, length, inner, dtype=torch.float64)
    u, q = pair(batch, length, inner), pair(batch, length, rank + 2 * state)
    A_log, D = [t.abs() for t in pair(inner, state)], pair(inner)
    weight, bias = pair(inner, rank), pair(inner)
    truth = vimcore.ops.bidirectional_scan(z, u, q, A_log, D, weight, bias)
    for kind, tolerance in TYPES.values():
        half = [[t.to(CUDA, kind) for t in values] for values in ([z], u, q)]
        wide = [[t.to(CUDA, torch.float32) for t in values] for values in (A_log, D, weight, bias)]
        with torch.no_grad():
            found = vimcore.ops.bidirectional_scan(half[0][0], half[1], half[2], *wide)
        assert found.dtype == kind
        assert golden.relative(found.cpu(), truth) < tolerance


def test_operators_agree_with_the_cpu() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 37, 24, dtype=torch.float64)
    residual, weight, bias = torch.randn_like(x), *torch.randn(2, 24, dtype=torch.float64)
    taps, A = torch.randn(24, 4, dtype=torch.float64), -torch.rand(24, 16, dtype=torch.float64)
    B, C = torch.randn(2, 2, 37, 16, dtype=torch.float64)
    delta = torch.rand_like(x)

    def outputs(dtype: torch.dtype, device: str) -> list[Tensor]:
        wide = torch.promote_types(dtype, torch.float32)
        x_, delta_, B_, C_ = (t.to(device, dtype) for t in (x, delta, B, C))
        residual_, weight_, bias_, taps_, A_ = (t.to(device, wide) for t in (residual, weight, bias, taps, A))
        with torch.no_grad():
            return [
                *vimcore.ops.rms_norm(x_, weight_, residual_),
                *vimcore.ops.layer_norm(x_, weight_, bias_, residual_),
                vimcore.ops.causal_conv1d(x_, taps_, bias_),
                vimcore.ops.causal_conv1d(x_, taps_, None, None, reverse=True),
                vimcore.ops.selective_scan(x_, delta_, A_, B_, C_, weight_, x_, bias_, True),
                vimcore.ops.selective_scan(x_, delta_, A_, B_, C_, reverse=True),
            ]

    truth = outputs(torch.float64, "cpu")
    for kind, tolerance in TYPES.values():
        for found, wanted in zip(outputs(kind, "cuda"), truth, strict=True):
            assert golden.relative(found.cpu(), wanted) < tolerance


@pytest.mark.parametrize("dtype", sorted(TYPES))
def test_block_agrees_with_the_cpu(dtype: str) -> None:
    kind, tolerance = TYPES[dtype]
    layer = tiny(depth=1).layers[0]
    x, residual = torch.randn(2, 3, 50, 192, dtype=torch.float64)
    with torch.no_grad():
        found = vimcore.ops.vim_block(
            x.to(CUDA, kind), dict(layer.named_parameters()), residual.float().to(CUDA)
        )
        truth = vimcore.ops.vim_block(x, dict(layer.cpu().double().named_parameters()), residual)
    for a, b in zip(found, truth, strict=True):
        assert golden.relative(a.cpu(), b) < tolerance


def test_runtime(tmp_path: Path) -> None:
    model = tiny()
    model.save(tmp_path / "vim.safetensors")
    images = torch.randn(11, 3, 64, 64).numpy()
    wanted = vimcore.Runtime(tmp_path / "vim.safetensors")
    found = vimcore.Runtime(tmp_path / "vim.safetensors", device="cuda")
    for a, b in ((found(images), wanted(images)), (found.features(images), wanted.features(images))):
        assert golden.relative(torch.from_numpy(a), torch.from_numpy(b)) < 1e-4


class Foreign:
    """An array of some other library on the GPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.tensor.__dlpack_device__()


def test_takes_arrays_of_other_libraries() -> None:
    model, images = tiny(), torch.randn(2, 3, 64, 64, device=CUDA)
    with torch.no_grad():
        assert torch.equal(model(Foreign(images)), model(images))  # type: ignore[arg-type]


def test_errors_name_what_does_not_fit() -> None:
    model, images = tiny(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"images: expected .*cuda.*got .*cpu"):
            model(images)
        with pytest.raises(ValueError, match=r"images: expected .*f64 cuda"):
            model(images.double().to(CUDA))
        model.head.cpu()
        with pytest.raises(ValueError, match=r"head\.weight.*cpu"):
            model(images.to(CUDA))
        x = torch.randn(1, 5, 8, device=CUDA)
        with pytest.raises(ValueError, match=r"\[rms_norm\] weight: .*cpu"):
            vimcore.ops.rms_norm(x, torch.ones(8))
        with pytest.raises(ValueError, match=r"\[rms_norm\] x: .*f64"):
            vimcore.ops.rms_norm(x.double(), torch.ones(8, device=CUDA))


# ---- training ----------------------------------------------------------------------------------------------

# Gradients: every activation and its gradient are rounded.
GRADIENTS = {"float32": 1e-3, "bfloat16": 0.15, "float16": 3e-2}


def gradients(
    model: vimcore.VisionMamba, images: Tensor, probe: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Of sum(logits * probe), by parameter and of the images; 16-bit types through autocast."""
    model.zero_grad()
    x = images.detach().clone().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype in (torch.bfloat16, torch.float16)):
        logits = model(x)
    (logits * probe.to(logits)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {name: g.clone() for name, g in found.items()} | {"images": x.grad}


def agree(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    """Gradients that are nearly nothing are measured against the largest."""
    assert found.keys() == truth.keys()
    largest = max(float(g.norm()) for name, g in truth.items() if name != "images")
    for name, g in truth.items():
        assert found[name].dtype == torch.float32
        error = float((found[name].double().cpu() - g.double().cpu()).norm())
        assert error < tolerance * max(float(g.norm()), 1e-3 * largest), name


@pytest.mark.parametrize("memory", ["least", "lean", "fast"])
@pytest.mark.parametrize("dtype", sorted(TYPES))
@pytest.mark.parametrize("name", sorted(NETWORKS))
def test_gradients_agree_with_the_cpu(name: str, dtype: str, memory: str) -> None:
    if name == "max" and dtype != "float32":
        return  # in 16 bits other tokens may be the largest: there the gradient is another one
    config = small(**NETWORKS[name])
    images = images_for(config, 3)
    double = build(config, dtype=torch.float64).eval()
    probe = torch.randn(double(images).shape, dtype=torch.float64)
    truth = gradients(double, images, probe, torch.float64)
    model = build(config, memory=memory).eval().to(CUDA)
    x, kind = images.float().to(CUDA), TYPES[dtype][0]
    found = gradients(model, x, probe.to(CUDA), kind)
    agree(found, truth, GRADIENTS[dtype])
    again = gradients(model, x, probe.to(CUDA), kind)
    assert all(torch.equal(g, again[key]) for key, g in found.items())


@pytest.mark.parametrize("name", golden.NAMES)
def test_golden_gradients(name: str) -> None:
    g = golden.load(name)
    model = build(g.config, g.weights).to(CUDA)
    found = gradients(model, g.input.to(CUDA), g.probe.to(CUDA), torch.float32)
    wanted = {**g.grads, "images": g.grads["input"]}
    assert all(golden.relative(found[key].cpu(), wanted[key]) < 1e-3 for key in found)


@pytest.mark.parametrize("dtype", sorted(TYPES))
def test_published_size_trains_with_the_same_bits(dtype: str) -> None:
    torch.manual_seed(0)
    model = vimcore.create_model("vim_tiny_patch16_224").to(CUDA).eval()
    images, probe = torch.randn(4, 3, 224, 224, device=CUDA), torch.randn(4, 1000, device=CUDA)
    kind = TYPES[dtype][0]
    found = gradients(model, images, probe, kind)
    for _ in range(2):
        again = gradients(model, images, probe, kind)
        assert all(torch.equal(g, again[name]) for name, g in found.items())
    double = vimcore.create_model("vim_tiny_patch16_224").double().eval()
    double.load_state_dict(model.state_dict())
    agree(
        found, gradients(double, images.double().cpu(), probe.double().cpu(), torch.float64), GRADIENTS[dtype]
    )


@pytest.mark.parametrize("dtype", sorted(TYPES))
def test_training_steps(dtype: str) -> None:
    """AdamW with a gradient scaler, dropout and drop path; the loss falls, memory does not grow."""
    model = tiny(drop_rate=0.1, drop_path_rate=0.1).train()
    images, labels = torch.randn(16, 3, 64, 64, device=CUDA), torch.arange(16, device=CUDA) % 10
    kind = TYPES[dtype][0]
    scaler = torch.amp.GradScaler("cuda", enabled=kind == torch.float16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses, free = [], 0
    for step in range(60):
        with torch.autocast("cuda", kind, enabled=kind != torch.float32):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if step == 10:
            free = torch.cuda.mem_get_info()[0]
    assert losses[-1] < 0.3 * losses[0]
    assert torch.cuda.mem_get_info()[0] >= free


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_learns_to_read_digits(dtype: str) -> None:
    """Training from start to end on real images."""
    images, labels = load_digits()
    kept, held = (torch.from_numpy(part) for part in split_digits(labels))
    pixels = (torch.from_numpy(images).float()[:, None] / 8 - 1).to(CUDA)
    classes = torch.from_numpy(labels).to(CUDA)
    options = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 2}
    torch.manual_seed(0)
    model = vimcore.VisionMamba(**options, num_classes=10).to(CUDA)
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == "bfloat16"):
        history = fit(
            model,
            (pixels[kept], classes[kept]),
            (pixels[held], classes[held]),
            epochs=12,
            warmup=1,
            lr=3e-3,
            progress=False,
        )
    assert history.valid_accuracy[-1] > 0.95


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_captured_training(dtype: str) -> None:
    """A whole step as one graph, the optimiser's included: replays give what eager steps give."""
    kind = TYPES[dtype][0]
    images, labels = torch.randn(4, 3, 64, 64, device=CUDA), torch.arange(4, device=CUDA)

    def step(model: vimcore.VisionMamba, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        loss = torch.nn.functional.cross_entropy(model(images.to(kind)).float(), labels)
        loss.backward()
        optimizer.step()
        return loss

    eager, recorded = tiny(), tiny()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02) for m in (eager, recorded)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(recorded, optimizers[1])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        loss = step(recorded, optimizers[1])
    for _ in range(3):
        step(eager, optimizers[0])
    for _ in range(5):
        graph.replay()
        wanted = step(eager, optimizers[0])
        torch.cuda.synchronize()
        assert torch.equal(loss, wanted)
    for a, b in zip(recorded.parameters(), eager.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("world", "backend"), [(1, "nccl"), (2, "gloo")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_distributed_gradients_are_those_of_the_joined_batch(
    dtype: str, world: int, backend: str, tmp_path: Path
) -> None:
    kind = TYPES[dtype][0]
    truth = ddp.alone("cuda:0", kind)
    found = ddp.together(tmp_path, world, backend, "cuda:0", kind)
    ddp.assert_agree(found, truth, 1e-3 if dtype == "float32" else 2e-2)


def test_activations_copied_on_a_side_stream() -> None:
    """A hook copies what is saved on a stream of its own and lets go of it: nobody writes there before."""
    model, side = tiny(), torch.cuda.Stream()
    images = torch.randn(2, 8, 3, 64, 64, device=CUDA)

    def pack(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # so that the next forward comes first
            copy = tensor.to("cpu", non_blocking=True) if tensor.dtype == torch.uint8 else tensor
            event = side.record_event()
        tensor.record_stream(side)
        return copy, event

    def unpack(packed: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        packed[1].synchronize()
        return packed[0].to(CUDA)

    found = []
    for hooks in (contextlib.nullcontext(), torch.autograd.graph.saved_tensors_hooks(pack, unpack)):
        with hooks:
            losses = [model(x).square().sum() for x in images]
        found.append([torch.autograd.grad(loss, list(model.parameters())) for loss in losses])
    for first, second in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("memory", ["least", "fast"])
def test_activations_offloaded_to_the_host(memory: str) -> None:
    """As `save_on_cpu` has it: the same gradients, and the memory of the GPU is free in between."""
    model, images = tiny(memory=memory), torch.randn(16, 3, 64, 64, device=CUDA)
    found: list[dict[str, Tensor]] = []
    for hooks in (contextlib.nullcontext(), torch.autograd.graph.save_on_cpu(pin_memory=True)):
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            with hooks, torch.autocast("cuda", torch.bfloat16):
                loss = model(images).float().square().sum()
            loss.backward()
        found.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert found[0]
    assert all(torch.equal(g, found[1][key]) for key, g in found[0].items())


def test_training_on_streams_of_their_own() -> None:
    models = [tiny() for _ in range(3)]
    batches = [torch.randn(n, 3, 64, 64, device=CUDA) for n in (1, 2, 3)]
    probes = [torch.randn(len(b), 10, device=CUDA) for b in batches]
    wanted = [gradients(m, b, p, torch.bfloat16) for m, b, p in zip(models, batches, probes, strict=True)]
    torch.cuda.synchronize()
    same: list[bool] = []

    def work(index: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                found = gradients(models[index], batches[index], probes[index], torch.bfloat16)
                torch.cuda.current_stream().synchronize()
                same.append(all(torch.equal(g, wanted[index][key]) for key, g in found.items()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 30


@pytest.mark.parametrize("dtype", sorted(TYPES))
def test_gradients_of_operators(dtype: str) -> None:
    torch.manual_seed(0)
    kind = TYPES[dtype][0]
    shapes = {"x": (2, 37, 24), "delta": (2, 37, 24), "B": (2, 37, 16), "C": (2, 37, 16)}
    wide = {"residual": (2, 37, 24), "weight": (24,), "bias": (24,), "taps": (24, 4), "A": (24, 16)}
    values = {name: torch.randn(shape, dtype=torch.float64) for name, shape in {**shapes, **wide}.items()}
    values["A"] = -values["A"].abs()
    layer = tiny(depth=1).layers[0]
    block = {name: p.detach().double().cpu() for name, p in layer.named_parameters()}
    values |= {"block x": torch.randn(2, 50, 192, dtype=torch.float64)}

    def run_all(dtype: torch.dtype, device: str) -> list[Tensor]:
        full = torch.promote_types(dtype, torch.float32)
        t = {
            name: v.to(device, full if name in wide else dtype).requires_grad_() for name, v in values.items()
        }
        p = {name: v.to(device, full).requires_grad_() for name, v in block.items()}
        ops = vimcore.ops
        outputs = [
            *ops.rms_norm(t["x"], t["weight"], t["residual"]),
            *ops.layer_norm(t["x"], t["weight"], t["bias"], t["residual"]),
            ops.causal_conv1d(t["x"], t["taps"], t["bias"]),
            ops.causal_conv1d(t["x"], t["taps"], None, None, reverse=True),
            ops.selective_scan(
                t["x"], t["delta"], t["A"], t["B"], t["C"], t["weight"], t["x"], t["bias"], True
            ),
            ops.vim_block(t["block x"], p)[0],
        ]
        total = sum(o.double().square().sum() for o in outputs)
        assert isinstance(total, Tensor)
        total.backward()
        return [v.grad for v in [*t.values(), *p.values()] if v.grad is not None]

    truth = run_all(torch.float64, "cpu")
    found = run_all(kind, "cuda")
    assert len(found) == len(truth)
    assert all(golden.relative(a.cpu(), b) < GRADIENTS[dtype] for a, b in zip(found, truth, strict=True))

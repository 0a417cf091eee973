# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmark measures of training: one block and the whole network, forward and backward.

The authors' steps keep float32 weights that autocast casts at every step, as in their training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import deit
import torch
import torch.nn.functional as F
import vim_official
from cases import TYPES, Setting, graphs, relative, vim
from timing import Call, Device
from torch import Tensor, nn

EXACT_TOKENS = 1025  # the float64 gradient of longer sequences takes longer than the measurement


def autocast(device: Device, kind: torch.dtype) -> torch.autocast:
    """As the authors train: 16-bit matrix products."""
    return torch.autocast(device.torch.type, kind, enabled=kind in (torch.bfloat16, torch.float16))


def measured(
    setting: Setting, calls: Mapping[str, Call], row: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Peak memory and time of every side; a side other than ours may fail, for lack of memory, say."""
    row |= {"memory": {}, "failed": {}}
    sides: dict[str, list[Call]] = {}
    for name, call in calls.items():
        try:
            row["memory"][name] = setting.device.memory(call)
            sides[name] = [call]
        except RuntimeError as error:
            if name == "vimcore":
                raise
            row["failed"][name] = str(error).splitlines()[0]
    return setting.timed(graphs(sides, setting.device, row), seconds)


def sorted_parameters(module: nn.Module) -> list[Tensor]:
    """By name: ours and the authors' register them in another order."""
    return [p for _, p in sorted(module.named_parameters())]


def joined(gradients: Iterable[Tensor]) -> Tensor:
    """One after the other, in float64."""
    return torch.cat([g.double().flatten() for g in gradients])


# ---- one block ---------------------------------------------------------------------------------------------


def block_backward_case(
    setting: Setting, width: int, side: int, batch: int, dtype: str, seconds: float
) -> dict[str, Any]:
    """Forward and backward of one block, residual add and norm included; error: of its weights' gradient."""
    import vimcore

    device, kind, length = setting.device, TYPES[dtype], (side // 16) ** 2 + 1
    row: dict[str, Any] = {"kind": "block_backward", "width": width, "side": side}
    row |= {"batch": batch, "dtype": dtype}
    layer = vimcore.VisionMamba(img_size=32, embed_dim=width, depth=1).layers[0].to(device.torch)
    parameters = dict(layer.named_parameters())
    official = [vim_official.Layer(width).to(device.torch) for _ in range(2)]
    for peer in official:
        peer.load_state_dict(layer.state_dict())
    exact, peer = official[0].double(), official[1]
    shape = (batch, length, width)
    x, dout = (torch.randn(shape, device=device.torch).to(kind) for _ in range(2))
    residual, dresidual = (torch.randn(shape, device=device.torch) for _ in range(2))

    def call(
        block: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        weights: list[Tensor],
        given: tuple[Tensor, ...],
    ) -> Call:
        """The gradients of x, residual and all weights."""
        h, r = (t.detach().requires_grad_() for t in given[:2])
        leaves = [h, r, *weights]

        def step() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(block(h, r), leaves, given[2:])

        return step

    def ours(memory: str, given: tuple[Tensor, ...]) -> Call:
        def block(h: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            return vimcore.ops.vim_block(h, parameters, r, memory=memory)

        return call(block, sorted_parameters(layer), given)

    def theirs(given: tuple[Tensor, ...]) -> Call:
        def block(h: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
            with autocast(device, kind):
                return peer(h, r)

        return call(block, sorted_parameters(peer), given)

    given = (x, residual, dout, dresidual)
    few = tuple(t[:1].contiguous() for t in given)
    truth = joined(call(exact, sorted_parameters(exact), tuple(t.double() for t in few))()[2:])
    row["error"] = {"vimcore": relative(joined(ours("lean", few)()[2:]), truth)}
    calls = {"vimcore": ours("lean", given), "vimcore fast": ours("fast", given)}
    if setting.peer("scan"):
        row["error"]["official"] = relative(joined(theirs(few)()[2:]), truth)
        calls["official"] = theirs(given)
    del truth
    row |= measured(setting, calls, row, seconds)
    return row


# ---- the whole network -------------------------------------------------------------------------------------


def training_networks(
    device: Device, size: str, side: int, kind: torch.dtype, names: list[str]
) -> dict[str, nn.Module]:
    """Networks of this size for images in `kind`; ours and the authors' have the same random weights."""
    found: dict[str, nn.Module] = {}
    with torch.device(device.torch):  # large position tables are drawn there
        for name, memory in (("vimcore", "lean"), ("vimcore fast", "fast")):
            found[name] = vim(size, side, memory=memory)
        if "official" in names:
            found["official"] = vim_official.build(size, side)
        for model in found.values():
            model.load_state_dict(found["vimcore"].state_dict())
        if "deit" in names:
            found["deit"] = deit.build(size, side).to(kind)
    return {name: model.train() for name, model in found.items()}


def gradient(model: nn.Module) -> Tensor:
    """Of all parameters, joined."""
    return joined(p.grad for p in sorted_parameters(model) if p.grad is not None)


def train_case(
    setting: Setting, size: str, side: int, batch: int, dtype: str, names: list[str], seconds: float
) -> dict[str, Any]:
    """Forward and backward of the cross-entropy, `memory` lean and fast, against the authors' steps and DeiT.

    error: of the gradient of all parameters for the first image.
    """
    device, kind = setting.device, TYPES[dtype]
    row: dict[str, Any] = {"kind": "train", "size": size, "side": side, "batch": batch, "dtype": dtype}
    if not setting.peer("scan"):
        names = [name for name in names if name != "official"]
    models = training_networks(device, size, side, kind, names)
    images = torch.randn(batch, 3, side, side, device=device.torch).to(kind)
    labels = torch.randint(1000, (batch,), device=device.torch)

    def call(name: str, count: int) -> Call:
        model, given, wanted = models[name], images[:count], labels[:count]

        def step() -> None:
            model.zero_grad(set_to_none=True)
            with torch.enable_grad():
                with autocast(device, kind if name == "official" else torch.float32):
                    loss = F.cross_entropy(model(given), wanted)
                loss.backward()

        return step

    if (side // 16) ** 2 + 1 <= EXACT_TOKENS:
        exact = vim(size, side).double()
        exact.load_state_dict(models["vimcore"].state_dict())
        with torch.enable_grad():
            F.cross_entropy(exact(images[:1].cpu().double()), labels[:1].cpu()).backward()
        truth, row["error"] = gradient(exact), {}
        for name in [name for name in models if name != "deit"]:
            call(name, 1)()
            row["error"][name] = relative(gradient(models[name]).cpu(), truth)
            models[name].zero_grad(set_to_none=True)
        del exact, truth
    calls = {name: call(name, batch) for name in models}
    row |= measured(setting, calls, row, seconds)
    found = []
    for _ in range(2):
        calls["vimcore"]()
        found.append(gradient(models["vimcore"]))
    row["repeats"] = torch.equal(*found)
    row["images_per_second"] = {name: batch / s for name, s in row["seconds"].items()}
    return row


def long_case(setting: Setting, size: str, side: int, dtype: str, seconds: float) -> dict[str, Any]:
    """One large image, forward and backward, in each memory mode that the plan says fits: time, plan, peak.

    `seconds` is not used: a mode is run twice. Peak and plan are without weights and images.
    """
    from vimcore.tools import plan

    device, kind = setting.device, TYPES[dtype]
    row: dict[str, Any] = {"kind": "long", "size": size, "side": side, "dtype": dtype}
    row |= {"tokens": (side // 16) ** 2 + 1, "seconds": {}, "planned": {}, "memory": {}, "skipped": {}}
    with torch.device(device.torch):
        model = vim(size, side).train()
    images = torch.randn(1, 3, side, side, device=device.torch, dtype=kind)
    free = torch.cuda.mem_get_info()[0] if device.cuda else None
    spelled = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[dtype]

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            model(images).float().square().sum().backward()

    for memory in ("fast", "lean", "least"):
        parts = plan.needed(model.config, 1, f"training, {memory}", device.torch.type, spelled)
        needed = sum(parts[name] for name in ("saved", "scratch", "gradients"))
        row["planned"][memory] = needed
        if free is not None and needed + parts["packed"] > free:
            row["skipped"][memory] = f"planned {plan.readable(needed)}, free {plan.readable(free)}"
            continue
        model.memory = memory
        step()  # packs weights
        row["memory"][memory] = device.memory(step)
        row["seconds"][memory] = device.seconds(step)
        if not all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None):
            raise RuntimeError(f"{memory}: a gradient is not finite")
        device.release()
    return row

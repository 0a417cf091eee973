# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmark measures: each function makes the sides of one case and returns its row."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import floors
import torch
import torch.nn.functional as F
from timing import Call, Device, captured, interleave, sequence, summary
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import deit
import vim_official

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
STATE = 16
ITEM = {"f32": 4, "bf16": 2, "f16": 2}


@dataclass
class Setting:
    """What all cases share."""

    device: Device
    rates: floors.Rates | None = None  # None: no fractions of the floor
    rounds: int = 15

    def timed(self, sides: Mapping[str, Call], seconds: float, calls: int = 1) -> dict[str, Any]:
        """The summary of samples some milliseconds long; a call of a side does the work `calls` times."""
        counts = {name: self.device.repeats(call) for name, call in sides.items()}
        repeated = {name: sequence([call] * counts[name]) for name, call in sides.items()}
        found = interleave(repeated, self.device.seconds, self.rounds, seconds)
        each = {name: [s / (calls * counts[name]) for s in samples] for name, samples in found.items()}
        return summary(each)

    def peer(self, part: str) -> str | None:
        """The kernel of a peer; None for plain torch on a GPU, which takes minutes and says nothing."""
        name = vim_official.kernels(self.device.torch)[part]
        return None if self.device.cuda and name == "torch" else name


def relative(found: Tensor, truth: Tensor) -> float:
    """||found - truth|| / ||truth|| in float64."""
    truth = truth.double()
    return float((found.double().to(truth.device) - truth).norm() / truth.norm())


def graphs(sides: Mapping[str, list[Call]], device: Device, row: dict[str, Any]) -> dict[str, Call]:
    """Every side as a replay of one CUDA graph, or as plain calls where it cannot be captured; see `row`."""
    found = {}
    row["graph"] = {}
    for name, calls in sides.items():
        try:
            found[name] = captured(calls, device)
            row["graph"][name] = device.cuda
        except RuntimeError as error:
            device.synchronize()
            found[name] = sequence(calls)
            row["graph"][name] = str(error).splitlines()[0]
    return found


# ---- the scan ----------------------------------------------------------------------------------------------


def scan_inputs(
    device: torch.device, batch: int, inner: int, length: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Random inputs of both directions, distributed as in a network at its first step; channel-last."""
    rank = -(-inner // 32)
    steps = torch.empty(inner).uniform_(-6.9, -2.3).exp()
    pairs: dict[str, Any] = {
        "u": [F.silu(torch.randn(batch, length, inner, device=device)).to(dtype) for _ in range(2)],
        "q": [torch.randn(batch, length, rank + 2 * STATE, device=device).to(dtype) for _ in range(2)],
        "A_log": [torch.arange(1, STATE + 1).log().repeat(inner, 1).to(device) for _ in range(2)],
        "D": [torch.ones(inner, device=device) for _ in range(2)],
        "dt_weight": [torch.empty(inner, rank, device=device).uniform_(-1, 1) / rank**0.5 for _ in range(2)],
        "dt_bias": [(steps + (-torch.expm1(-steps)).log()).to(device) for _ in range(2)],
    }
    # as the network has them on a GPU: rows of whole pieces of 16 bytes
    more = -(rank + 2 * STATE) % 8 if device.type == "cuda" and dtype.itemsize == 2 else 0
    pairs["rows"] = [F.pad(q, (0, more)) if more else q for q in pairs["q"]]
    return {"xz": torch.randn(batch, length, 2 * inner, device=device).to(dtype), **pairs}


def our_scan(inputs: Mapping[str, Any]) -> Tensor:
    """Both directions as the network calls them: no copy of the gate, no states kept."""
    from vimcore import _core
    from vimcore.autograd.tensors import exported, place

    xz = inputs["xz"]
    out = xz.new_empty(*xz.shape[:2], xz.shape[2] // 2)
    names = ("u", "rows", "A_log", "D", "dt_weight", "dt_bias")
    passes = [[exported(inputs[name][d]) for name in names] for d in range(2)]
    _core.scan_forward(exported(xz), passes, [[None], [None]], 0.5, 64, exported(out), place(out))
    return out


def peer_scan_inputs(inputs: Mapping[str, Any], dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """The arguments of the peer's two calls: channel-major, dt projected, the reverse direction flipped."""
    found = []
    for d in range(2):
        u, q = inputs["u"][d].to(dtype), inputs["q"][d].to(dtype)
        z = inputs["xz"].chunk(2, 2)[1].to(dtype)
        if d:
            u, q, z = u.flip(1), q.flip(1), z.flip(1)
        wide = torch.promote_types(dtype, torch.float32)
        weight, bias, A_log, D = (inputs[n][d].to(wide) for n in ("dt_weight", "dt_bias", "A_log", "D"))
        dt, Bm, Cm = q.split([weight.shape[1], STATE, STATE], 2)
        delta = F.linear(dt, weight.to(dtype))
        u, delta, Bm, Cm, z = (t.transpose(1, 2).contiguous() for t in (u, delta, Bm, Cm, z))
        found.append((u, delta, -A_log.exp(), Bm.unsqueeze(1), Cm.unsqueeze(1), D, z, bias))
    return found


def peer_scan(inputs: Mapping[str, Any], dtype: torch.dtype) -> Tensor:
    """The peer's whole way from our inputs to our output."""
    forward, reverse = (vim_official.scan(*arguments) for arguments in peer_scan_inputs(inputs, dtype))
    return ((forward + reverse.flip(2)) / 2).transpose(1, 2)


def first(inputs: Mapping[str, Any], batch: int) -> dict[str, Any]:
    """The inputs of the first images."""
    found = dict(inputs, xz=inputs["xz"][:batch])
    for name in ("u", "q", "rows"):
        found[name] = [t[:batch].contiguous() for t in inputs[name]]
    return found


def scan_case(
    setting: Setting, batch: int, inner: int, length: int, dtype: str, seconds: float
) -> dict[str, Any]:
    """Both directions of the scan against two calls of the peer's kernel, without its flips and copies."""
    device, kind = setting.device, TYPES[dtype]
    row: dict[str, Any] = {"kind": "scan", "batch": batch, "inner": inner, "length": length, "dtype": dtype}
    one = 6 * batch * length * inner * ITEM[dtype]
    count = max(1, min(8, -(-2 * device.cache_bytes() // one)))
    sets = [scan_inputs(device.torch, batch, inner, length, kind) for _ in range(count)]
    peer = setting.peer("scan")
    few = first(sets[0], min(batch, 2))
    truth = peer_scan(few, torch.float64)
    row["error"] = {"vimcore": relative(our_scan(few), truth)}
    sides: dict[str, list[Call]] = {"vimcore": [lambda s=s: our_scan(s) for s in sets]}
    if peer:
        row["error"][peer] = relative(peer_scan(few, kind), truth)
        arguments = [peer_scan_inputs(s, kind) for s in sets]
        sides[peer] = [lambda a=a: [vim_official.scan(*x) for x in a] for a in arguments]
    del few, truth
    row |= setting.timed(graphs(sides, device, row), seconds, count)
    if setting.rates:
        sizes = floors.Sizes(batch, length, inner // 2)
        row["floor"] = floors.scan(setting.rates, sizes, ITEM[dtype])
        row["share_of_floor"] = {u: s / row["seconds"]["vimcore"] for u, s in row["floor"].items()}
    return row


class OurScanGradients:
    """The gradients of both directions from one set of inputs, after a forward pass that keeps states."""

    def __init__(self, inputs: Mapping[str, Any], dout: Tensor, chunk: int = 64) -> None:
        from vimcore import _core
        from vimcore.autograd.tensors import exported, place

        xz, wide = inputs["xz"], inputs["D"][0].dtype
        (batch, length), inner = xz.shape[:2], xz.shape[2] // 2
        names = ("u", "rows", "A_log", "D", "dt_weight", "dt_bias")
        self.gradients = [[torch.zeros_like(inputs[name][d]) for name in names] for d in range(2)]
        states = xz.new_empty(2, batch, -(-length // chunk), STATE, inner, dtype=wide)
        self.results = (torch.empty_like(dout), torch.empty_like(xz))
        self.held = (inputs, dout, states)
        passes = [[inputs[name][d] for name in names] for d in range(2)]

        def call(function: Callable[..., None], gradients: list[list[Tensor]], *rest: Tensor) -> None:
            values = [[exported(t) for t in one] for one in passes]
            outputs = [[exported(states[d]), *map(exported, gradients[d])] for d in range(2)]
            arguments = [*map(exported, rest), place(self.results[0])]
            function(exported(xz), values, outputs, 0.5, chunk, *arguments)

        call(_core.scan_forward, [[], []], self.results[0])
        out, dxz = self.results
        self.run = lambda: call(_core.scan_backward, self.gradients, out, dout, dxz)

    def __call__(self) -> Tensor:
        """The gradient of the forward direction's u; those of parameters grow from call to call."""
        self.run()
        return self.gradients[0][0]


def peer_scan_gradients(
    inputs: Mapping[str, Any], dout: Tensor, dtype: torch.dtype
) -> list[Callable[[], tuple[Tensor, ...]]]:
    """The peer's two backward calls, after its two forward calls. Each direction has a gate of its own."""
    given = (dout / 2).to(dtype).transpose(1, 2)
    arguments = peer_scan_inputs(inputs, dtype)
    return [
        vim_official.scan_gradients(*arguments[0], dout=given.contiguous()),
        vim_official.scan_gradients(*arguments[1], dout=given.flip(2).contiguous()),
    ]


def scan_backward_case(
    setting: Setting, batch: int, inner: int, length: int, dtype: str, seconds: float
) -> dict[str, Any]:
    """The gradients of both directions against two calls of the peer's kernel; error: of one du."""
    device, kind = setting.device, TYPES[dtype]
    row: dict[str, Any] = {"kind": "scan_backward", "batch": batch, "inner": inner}
    row |= {"length": length, "dtype": dtype}
    one = 10 * batch * length * inner * ITEM[dtype]
    count = max(1, min(4, -(-2 * device.cache_bytes() // one)))
    sets = [scan_inputs(device.torch, batch, inner, length, kind) for _ in range(count)]
    douts = [torch.randn(batch, length, inner, device=device.torch).to(kind) for _ in sets]
    peer = setting.peer("scan")
    few, dout = first(sets[0], min(batch, 2)), douts[0][:2].contiguous()
    truth = peer_scan_gradients(few, dout, torch.float64)[0]()[0].transpose(1, 2)
    row["error"] = {"vimcore": relative(OurScanGradients(few, dout)(), truth)}
    sides: dict[str, list[Call]] = {"vimcore": [OurScanGradients(s, d) for s, d in zip(sets, douts)]}
    if peer:
        found = peer_scan_gradients(few, dout, kind)[0]()[0].transpose(1, 2)
        row["error"][peer] = relative(found, truth)
        calls = [peer_scan_gradients(s, d, kind) for s, d in zip(sets, douts)]
        sides[peer] = [lambda c=c: [call() for call in c] for c in calls]
        del found
    del few, truth
    row |= setting.timed(graphs(sides, device, row), seconds, count)
    if setting.rates:
        sizes = floors.Sizes(batch, length, inner // 2)
        row["floor"] = floors.scan_backward(setting.rates, sizes, ITEM[dtype])
        row["share_of_floor"] = {u: s / row["seconds"]["vimcore"] for u, s in row["floor"].items()}
    return row


# ---- one block ---------------------------------------------------------------------------------------------


def block_case(
    setting: Setting, width: int, side: int, batch: int, dtype: str, seconds: float
) -> dict[str, Any]:
    """One block, residual add and norm included, against the authors' steps."""
    import vimcore

    device, kind, length = setting.device, TYPES[dtype], (side // 16) ** 2 + 1
    row: dict[str, Any] = {"kind": "block", "width": width, "side": side, "batch": batch, "dtype": dtype}
    layer = vimcore.VisionMamba(img_size=32, embed_dim=width, depth=1).layers[0].to(device.torch)
    parameters = dict(layer.named_parameters())
    x = torch.randn(batch, length, width, device=device.torch).to(kind)
    residual = torch.randn(batch, length, width, device=device.torch)

    def ours(h: Tensor, r: Tensor) -> Tensor:
        return vimcore.ops.vim_block(h, parameters, r)[0]

    official = [vim_official.Layer(width).to(device.torch) for _ in range(2)]
    for peer in official:
        peer.load_state_dict(layer.state_dict())
    exact, peer = official[0].double(), official[1].cast(kind)

    few = (x[:1].contiguous(), residual[:1].contiguous())
    truth = exact(few[0].double(), few[1].double())[0]
    row["error"] = {"vimcore": relative(ours(*few), truth)}
    sides: dict[str, list[Call]] = {"vimcore": [lambda: ours(x, residual)]}
    if setting.peer("scan"):
        row["error"]["official"] = relative(peer(*few)[0], truth)
        sides["official"] = [lambda: peer(x, residual)]
    row |= setting.timed(graphs(sides, device, row), seconds)
    if setting.rates:
        stages = floors.block(setting.rates, floors.Sizes(batch, length, width), ITEM[dtype], dtype)
        row["floor"] = stages
        row["share_of_floor"] = sum(stages.values()) / row["seconds"]["vimcore"]
    return row


# ---- the whole network -------------------------------------------------------------------------------------


def attention_kernel(model: torch.nn.Module, images: Tensor) -> str:
    """What torch picked for `scaled_dot_product_attention`: operator and, where visible, GPU kernel."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if images.is_cuda else [])
    with profile(activities=activities) as report:
        model(images)
        if images.is_cuda:
            torch.cuda.synchronize()
    names = [event.key for event in report.key_averages()]
    found = [n.removeprefix("aten::") for n in names if n.startswith("aten::_scaled_dot_product")]
    found = found or ["scaled_dot_product_attention"]
    marks = ("flash", "fmha", "attention", "cudnn_generated")
    seen = [n for n in names if not n.startswith("aten::") and any(m in n.lower() for m in marks)]
    return " / ".join([found[0], *(n[:80] for n in seen[:1])])


def vim(size: str, side: int, **options: Any) -> Any:
    """vimcore's network of this size."""
    import vimcore

    width, depth = vim_official.SIZES[size], vim_official.DEPTHS[size]
    return vimcore.VisionMamba(img_size=side, embed_dim=width, depth=depth, **options)


def networks(
    device: Device, size: str, side: int, kind: torch.dtype, names: list[str]
) -> dict[str, torch.nn.Module]:
    """Networks of this size with random weights, ready for images in `kind`."""
    found: dict[str, torch.nn.Module] = {}
    with torch.device(device.torch):  # large position tables are drawn there
        found["vimcore"] = vim(size, side).eval()
        if "official" in names:
            peer = vim_official.build(size, side).eval()
            peer.load_state_dict(found["vimcore"].state_dict())
            found["official"] = peer.cast(kind)
        if "deit" in names:
            found["deit"] = deit.build(size, side).eval().to(kind)
    return found


def model_case(
    setting: Setting, size: str, side: int, batch: int, dtype: str, names: list[str], seconds: float
) -> dict[str, Any]:
    """Images to logits against the authors' steps and DeiT of the same size: throughput, peak memory."""
    device, kind = setting.device, TYPES[dtype]
    row: dict[str, Any] = {"kind": "model", "size": size, "side": side, "batch": batch, "dtype": dtype}
    row |= {"memory": {}, "failed": {}}
    if not setting.peer("scan"):
        names = [name for name in names if name != "official"]
    models = networks(device, size, side, kind, names)
    images = torch.randn(batch, 3, side, side, device=device.torch).to(kind)
    sides: dict[str, list[Call]] = {}
    for name, model in models.items():
        call: Call = lambda m=model: m(images)  # noqa: E731
        try:
            row["memory"][name] = device.memory(call)
            sides[name] = [call]
            if name == "deit":
                row["attention"] = attention_kernel(model, images)
        except RuntimeError as error:  # out of memory, say: the others are still of interest
            if name == "vimcore":
                raise
            row["failed"][name] = str(error).splitlines()[0]
    row |= setting.timed(graphs(sides, device, row), seconds)
    row["images_per_second"] = {name: batch / s for name, s in row["seconds"].items()}
    if setting.rates:
        sizes = floors.Sizes(batch, (side // 16) ** 2 + 1, vim_official.SIZES[size])
        row["floor"] = floors.model(setting.rates, sizes, ITEM[dtype], dtype, vim_official.DEPTHS[size])
        row["share_of_floor"] = row["floor"] / row["seconds"]["vimcore"]
    return row


def latency_case(setting: Setting, size: str, side: int, dtype: str, seconds: float) -> dict[str, Any]:
    """One image from call to result on the host's clock, eager and as a graph replay."""
    device, kind = setting.device, TYPES[dtype]
    row: dict[str, Any] = {"kind": "latency", "size": size, "side": side, "dtype": dtype}
    names = ["deit"] + (["official"] if setting.peer("scan") else [])
    images = torch.randn(1, 3, side, side, device=device.torch).to(kind)
    models = networks(device, size, side, kind, names)
    eager: dict[str, Call] = {name: lambda m=model: m(images) for name, model in models.items()}
    rounds = 4 * setting.rounds
    row["eager"] = summary(interleave(eager, device.latency, rounds, seconds / 2))["seconds"]
    replays = graphs({name: [call] for name, call in eager.items()}, device, row)
    row |= summary(interleave(replays, device.latency, rounds, seconds / 2))
    return row


def error_case(setting: Setting, size: str, side: int, dtype: str, seconds: float) -> dict[str, Any]:
    """Logits of two images against vimcore in float64 on the CPU; takes the seconds it takes."""
    device, kind = setting.device, TYPES[dtype]
    row: dict[str, Any] = {"kind": "error", "size": size, "side": side, "dtype": dtype}
    images = torch.randn(2, 3, side, side)
    models = networks(device, size, side, kind, ["official"] if setting.peer("scan") else [])
    given = images.to(device.torch, kind)
    found = {name: model(given).cpu() for name, model in models.items()}
    truth = models["vimcore"].cpu().double()(given.cpu().double())
    row["error"] = {name: relative(logits, truth) for name, logits in found.items()}
    return row


Case = Callable[[Setting, float], dict[str, Any]]

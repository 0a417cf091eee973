# SPDX-License-Identifier: Apache-2.0
"""The bridge between torch's autograd and the C++ core. Users take `vimcore.nn` and `vimcore.ops`.

No mathematics here: every Function calls one forward and one backward of `vimcore._core` on its arrays.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from . import _core
from .checks import refuse_batched, refuse_layout
from .draws import Draws
from .place import exported, place, wide

NAMES = {torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16"}


def describe(value: Any) -> str:
    """ "(2, 197, 192) f32 cpu" of a tensor; the type of anything else."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    dtype = NAMES.get(value.dtype, str(value.dtype).removeprefix("torch."))
    return f"{tuple(value.shape)} {dtype} {value.device}"


class _NoSecondDerivative(torch.autograd.Function):
    """Passes gradients on; differentiating them, by whatever they were computed from, is an error."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError("vimcore: second derivatives are not available (backward through a gradient)")


def _once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """For the backward of a Function: its results may not be differentiated again.

    Unlike torch's decorator it also says so where the incoming gradient is a constant. The error stands
    between the results and what they depend on, as far as it was saved: every argument, or an output. Without
    a path torch takes second derivatives for zero.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_batched(gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        present = [t for t in results if t is not None]
        if not torch.is_grad_enabled() or not present:
            return results
        sources = [t for t in (*gradients, *ctx.saved_tensors) if t is not None and t.requires_grad]
        anchor = torch.empty(0, requires_grad=True)
        guarded = iter(_NoSecondDerivative.apply(len(present), *present, anchor, *sources))
        return tuple(None if t is None else next(guarded) for t in results)

    return wrapper


# ---- the whole network -------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What one call of the network computes."""

    kind: str  # "logits", "tokens" or "layers"
    layers: tuple[int, ...] = ()
    draws: Draws = Draws()
    memory: str = "lean"


class _Bound(NamedTuple):
    places: tuple[list[int], list[torch.Size], list[Any]]  # addresses, shapes, strides that matter
    held: list[Tensor]  # what the core's views point at
    copies: list[int]  # of these parameters, which are not contiguous
    weights: _core.Weights


class Core:
    """The C++ network of one architecture and the weights it was bound to last. Threads may share it."""

    def __init__(self, config_json: str) -> None:
        self.network = _core.Network(config_json)
        self.names: list[str] = [name for name, _ in _core.param_shapes(config_json)]
        config, facts = json.loads(config_json), _core.config_facts(config_json)
        self.tokens: tuple[int, int] = (facts["tokens"], config["embed_dim"])
        outputs = config["num_classes"] or config["embed_dim"]
        per_token = config["class_token"] == "none" and config["pool"] == "all"
        self.logits: tuple[int, ...] = (facts["tokens"], outputs) if per_token else (outputs,)
        self._bound: _Bound | None = None
        self._lock = threading.Lock()
        self._parts: dict[tuple[str, tuple[int, ...]], list[bool]] = {}
        self._layouts: dict[tuple[bool, ...], tuple[int, list[int], list[int]]] = {}

    def weights(self, params: Sequence[Tensor], copy: bool = True) -> _core.Weights:
        """The parameters, in the order of `names`, as the core sees them; bound again when they moved.

        Args:
            copy: whether copies of parameters that are not contiguous are brought up to date.
        """
        try:
            contiguous = all(map(Tensor.is_contiguous, params))  # of hundreds of tensors, at every call
            strides = [] if contiguous else list(map(Tensor.stride, params))
            places = ([p.data_ptr() for p in params], list(map(Tensor.size, params)), strides)
        except RuntimeError:
            for name, p in zip(self.names, params):
                refuse_layout("VisionMamba", name, p)
            raise
        with self._lock:
            bound = self._bound
            if bound is not None and bound.places == places:
                if copy:
                    for index in bound.copies:
                        bound.held[index].copy_(params[index].detach())
                return bound.weights
            held = [p.detach() for p in params]
            for name, p in zip(self.names, held):
                if p.is_meta or p.device != held[0].device:
                    device = "the cpu or cuda" if held[0].is_meta else held[0].device
                    raise ValueError(
                        f"[VisionMamba] {name}: expected a tensor on {device}, got {describe(p)}"
                    )
                if p.is_contiguous() and p.untyped_storage().nbytes() < p.nbytes:
                    raise ValueError(
                        f"[VisionMamba] {name}: {describe(p)} without its memory, which was freed or is "
                        "sharded: call the wrapper (FSDP, say), not the network in it"
                    )
            held = [p.resolve_conj().resolve_neg().contiguous() for p in held]
            copies = [i for i, p in enumerate(params) if held[i].data_ptr() != p.data_ptr()]
            weights = self.network.bind([exported(p) for p in held])
            self._bound = _Bound(places, held, copies, weights)
            return weights

    def run(
        self,
        request: Request,
        images: Tensor,
        params: Sequence[Tensor],
        saved: _core.Saved | None,
        constant: _core.Weights | None = None,
    ) -> tuple[Tensor, ...]:
        """The outputs that `request` names, freshly allocated.

        Args:
            constant: what the parameters are bound to, if it is known that they did not change.
        """
        batch = images.shape[0]
        where: dict[str, Any] = {}
        if request.kind == "layers":
            outputs = [images.new_empty((batch, *self.tokens)) for _ in request.layers]
            where = {"layers": list(request.layers), "intermediates": [exported(y) for y in outputs]}
        else:
            shape = self.tokens if request.kind == "tokens" else self.logits
            outputs = [images.new_empty((batch, *shape))]
            where = {request.kind: exported(outputs[0])}
        threads, stream, capturing = place(images)
        weights = constant or self.weights(params)
        if batch:
            self.network.forward(
                weights,
                exported(images),
                saved=saved,
                threads=threads,
                stream=stream,
                capturing=capturing,
                constant=constant is not None,
                **where,
                **request.draws.arguments(),
            )
        return tuple(outputs)

    def taking_part(self, kind: str, layers: Sequence[int]) -> list[bool]:
        """For every parameter whether these outputs depend on it."""
        found = self._parts.get((kind, tuple(layers)))
        if found is None:
            found = [kind == "logits" or self._takes_part(name, kind, layers) for name in self.names]
            self._parts[(kind, tuple(layers))] = found
        return found

    @staticmethod
    def _takes_part(name: str, kind: str, layers: Sequence[int]) -> bool:
        if name.startswith("head.") or (kind == "layers" and name.startswith("norm_f.")):
            return False
        return kind == "tokens" or not name.startswith("layers.") or int(name.split(".")[1]) <= max(layers)

    def layout(self, params: Sequence[Tensor], wanted: tuple[bool, ...]) -> tuple[int, list[int], list[int]]:
        """One buffer for the gradients of the wanted parameters.

        Returns:
            its length, the offset of every parameter (-1: not wanted), the padded sizes of the wanted ones.
        """
        found = self._layouts.get(wanted)
        if found is None:
            total, offsets, sizes = 0, [], []
            for p, want in zip(params, wanted):
                offsets.append(total if want else -1)
                if want:
                    sizes.append((p.numel() + 15) // 16 * 16)
                    total += sizes[-1]
            found = self._layouts[wanted] = (total, offsets, sizes)
        return found


def _aligned(token: Tensor) -> Tensor:
    """What was saved, where a saved-tensor hook brought it back to an odd address."""
    return token.clone() if token.data_ptr() % 64 else token


class NetworkFunction(torch.autograd.Function):
    """The whole network as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        core: Core,
        request: Request,
        constant: _core.Weights | None,
        images: Tensor,
        *params: Tensor,
    ) -> tuple[Tensor, ...]:
        _, stream, capturing = place(images)
        saved = core.network.saved(request.memory, stream, capturing)
        outputs = core.run(request, images, params, saved, constant)
        # The token is what was saved: autograd frees it with its other saved tensors, hooks may move it.
        ctx.save_for_backward(from_dlpack(saved.token), images, *params)
        ctx.set_materialize_grads(False)
        ctx.core, ctx.request = core, request
        return outputs

    @staticmethod
    @_once
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        core, request = ctx.core, ctx.request
        wanted = ctx.needs_input_grad[4:]
        nothing: tuple[Tensor | None, ...] = (None,) * (4 + len(wanted))
        if all(g is None for g in gradients):
            return nothing
        token, images, *params = ctx.saved_tensors
        dimages = torch.zeros_like(images) if ctx.needs_input_grad[3] else None
        # named, so that they live until the call has queued its work
        incoming = [None if g is None else g.contiguous() for g in gradients]
        where: dict[str, Any] = {}
        if request.kind == "layers":
            pairs = [(i, exported(g)) for i, g in zip(request.layers, incoming) if g is not None]
            where = {"layers": [i for i, _ in pairs], "dintermediates": [g for _, g in pairs]}
        else:
            where = {"dtokens" if request.kind == "tokens" else "dlogits": exported(incoming[0])}
        part = core.taking_part(request.kind, where.get("layers", ()))
        wanted = tuple([want and p for want, p in zip(wanted, part)])
        total, offsets, sizes = core.layout(params, wanted)
        flat = params[0].new_zeros(total)
        if images.shape[0]:
            threads, stream, capturing = place(images)
            core.network.backward(
                core.weights(params, copy=False),
                exported(images),
                exported(_aligned(token)),
                memory=request.memory,
                gradients=exported(flat),
                offsets=offsets,
                dimages=exported(dimages),
                threads=threads,
                stream=stream,
                capturing=capturing,
                **where,
                **request.draws.arguments(),
            )
        pieces = iter(flat.split(sizes))
        dparams = [
            next(pieces)[: p.numel()].view(p.shape) if want else None for p, want in zip(params, wanted)
        ]
        return (None, None, None, dimages, *dparams)


# ---- operators ---------------------------------------------------------------------------------------------


def _fresh(like: Tensor | None) -> Tensor | None:
    return None if like is None else torch.zeros_like(like)


def _narrow(total: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A place for the gradient of x beside the wide one of its sum with the residual; None where one does."""
    return None if total.dtype == dtype else torch.empty_like(total, dtype=dtype)


def _exported(tensors: Sequence[Tensor | None]) -> list[Any]:
    return [exported(t) for t in tensors]


def _contiguous(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.contiguous()


class NormFunction(torch.autograd.Function):
    """x (B, L, D), weight, bias or None (D), residual or None -> out, x + residual."""

    @staticmethod
    def forward(
        ctx: Any,
        kind: str,
        eps: float,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        out, total = torch.empty_like(x), torch.empty_like(x, dtype=wide(x.dtype))
        x_, residual_, weight_, bias_, total_, out_ = _exported([x, residual, weight, bias, total, out])
        _core.norm_forward(kind, eps, x_, residual_, weight_, bias_, total_, out_, *place(out))
        ctx.save_for_backward(total, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.kind, ctx.eps, ctx.dtype = kind, eps, x.dtype
        return out, total

    @staticmethod
    @_once
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, bias = ctx.saved_tensors
        residual = ctx.needs_input_grad[5]
        if dout is None:
            dx = None if dtotal is None else dtotal.to(ctx.dtype)
            return None, None, dx, None, None, dtotal if residual else None
        dsum, dx = torch.empty_like(total), _narrow(total, ctx.dtype)
        dweight, dbias = torch.zeros_like(weight), _fresh(bias)
        dout, dtotal = dout.contiguous(), _contiguous(dtotal)
        arguments = [*_exported([total, weight, dout, dtotal, dsum, dx, dweight, dbias]), *place(total)]
        _core.norm_backward(ctx.kind, ctx.eps, *arguments)
        if dx is None:
            dx = dsum.clone() if residual else dsum
        return None, None, dx, dweight, dbias, dsum if residual else None


class Conv1dFunction(torch.autograd.Function):
    """x (B, L, E), weight (E, K), bias (E) or None -> (B, L, E)."""

    @staticmethod
    def forward(
        ctx: Any, silu: bool, reverse: bool, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        out = torch.empty_like(x)
        x_, weight_, bias_, out_ = _exported([x, weight, bias, out])
        _core.conv1d_forward(x_, weight_, bias_, silu, reverse, out_, *place(out))
        ctx.save_for_backward(x, weight, bias, out.detach())
        ctx.silu, ctx.reverse = silu, reverse
        return out

    @staticmethod
    @_once
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, out = ctx.saved_tensors
        dx, dweight, dbias = torch.zeros_like(x), torch.zeros_like(weight), _fresh(bias)
        dout = dout.contiguous()
        x_, weight_, bias_ = _exported([x, weight, bias])
        arguments = [*_exported([out, dout, dx, dweight, dbias]), *place(x)]
        _core.conv1d_backward(x_, weight_, bias_, ctx.silu, ctx.reverse, *arguments)
        return None, None, dx, dweight, dbias


class SelectiveScanFunction(torch.autograd.Function):
    """u, delta, A, B, C, then D, z, delta_bias or None -> out (B, L, E)."""

    @staticmethod
    def forward(ctx: Any, softplus: bool, reverse: bool, *inputs: Tensor | None) -> Tensor:
        assert inputs[0] is not None
        out = torch.empty_like(inputs[0])
        _core.selective_scan_forward(_exported(inputs), softplus, reverse, exported(out), *place(out))
        ctx.save_for_backward(*inputs)
        ctx.softplus, ctx.reverse = softplus, reverse
        return out

    @staticmethod
    @_once
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        gradients = [_fresh(t) for t in inputs]
        dout = dout.contiguous()
        out = torch.empty_like(dout)
        inputs_, gradients_, (out_, dout_) = _exported(inputs), _exported(gradients), _exported([out, dout])
        _core.selective_scan_backward(
            inputs_, ctx.softplus, ctx.reverse, out_, dout_, gradients_, *place(out)
        )
        return (None, None, *gradients)


class BidirectionalScanFunction(torch.autograd.Function):
    """z (B, L, E), then u, q, A_log, D, dt_weight, dt_bias, forward then reverse direction -> (B, L, E)."""

    @staticmethod
    def forward(ctx: Any, scale: float, chunk: int, z: Tensor, *inputs: Tensor) -> Tensor:
        batch, length, inner = z.shape
        xz = z.new_zeros(batch, length, 2 * inner)
        xz[:, :, inner:] = z.detach()
        shape = (batch, (length + chunk - 1) // chunk, inputs[2].shape[1], inner)
        needed = any(ctx.needs_input_grad)
        states = [z.new_empty(shape, dtype=wide(z.dtype)) if needed else None for _ in range(2)]
        out = torch.empty_like(z)
        values = _exported(inputs)
        outputs = [[exported(state)] for state in states]
        passes = [values[:6], values[6:]]
        _core.scan_forward(exported(xz), passes, outputs, scale, chunk, exported(out), *place(out))
        ctx.save_for_backward(z, xz, *states, *inputs)  # z: see _once
        ctx.scale, ctx.chunk = scale, chunk
        return out

    @staticmethod
    @_once
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        _, xz, first, second, *inputs = ctx.saved_tensors
        gradients = [torch.zeros_like(t) for t in inputs]
        dout = dout.contiguous()
        dxz, out = torch.zeros_like(xz), torch.empty_like(dout)
        passes = [_exported([first, *gradients[:6]]), _exported([second, *gradients[6:]])]
        values = [_exported(inputs[:6]), _exported(inputs[6:])]
        arguments = [*_exported([out, dout, dxz]), *place(out)]
        _core.scan_backward(exported(xz), values, passes, ctx.scale, ctx.chunk, *arguments)
        return (None, None, dxz[:, :, xz.shape[2] // 2 :].contiguous(), *gradients)


class BlockFunction(torch.autograd.Function):
    """x (B, L, D), residual or None, parameters in state-dict order -> mixer output, residual + x."""

    @staticmethod
    def forward(
        ctx: Any,
        config_json: str,
        reverse: bool,
        memory: str,
        x: Tensor,
        residual: Tensor | None,
        *params: Tensor,
    ) -> tuple[Tensor, Tensor]:
        _, _, capturing = place(x)
        saved = _core.Saved(memory, capturing) if any(ctx.needs_input_grad) else None
        out, total = torch.empty_like(x), torch.empty_like(x, dtype=wide(x.dtype))
        x_, residual_, total_, out_, *params_ = _exported([x, residual, total, out, *params])
        _core.block_forward(config_json, params_, x_, residual_, reverse, total_, out_, saved, *place(out))
        if saved is None:
            return out, total
        ctx.save_for_backward(from_dlpack(saved.token), total, *params)
        ctx.set_materialize_grads(False)
        ctx.config_json, ctx.reverse, ctx.memory, ctx.dtype = config_json, reverse, memory, x.dtype
        return out, total

    @staticmethod
    @_once
    def backward(ctx: Any, dout: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        token, total, *params = ctx.saved_tensors
        token, residual = _aligned(token), ctx.needs_input_grad[4]
        gradients = [torch.zeros_like(p) for p in params]
        dsum, dx = torch.zeros_like(total), _narrow(total, ctx.dtype)
        dout = torch.zeros_like(total, dtype=ctx.dtype) if dout is None else dout.contiguous()
        dtotal = _contiguous(dtotal)
        total_, params_ = exported(total), _exported(params)
        arguments = [*_exported([dout, dtotal, dsum, dx]), _exported(gradients), *place(total)]
        _core.block_backward(
            ctx.config_json, params_, total_, ctx.reverse, exported(token), ctx.memory, *arguments
        )
        if dx is None:
            dx = dsum.clone() if residual else dsum
        return (None, None, None, dx, dsum if residual else None, *gradients)


def block_parameters(config_json: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of one block in the core's order; ValueError lists missing and unexpected names."""
    layer = "layers.0."
    names = [
        name.removeprefix(layer) for name, _ in _core.param_shapes(config_json) if name.startswith(layer)
    ]
    missing = [name for name in names if name not in parameters]
    unexpected = [name for name in parameters if name not in names]
    if missing or unexpected:
        raise ValueError(f"[vim_block] parameters: missing {missing}, unexpected {unexpected}")
    return {name: parameters[name] for name in names}
